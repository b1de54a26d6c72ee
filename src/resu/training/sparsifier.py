"""``Sparsifier``: the one driver that owns masks, hooks and counters while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from resu.core.counting import check_sparsity
from resu.core.layers import select
from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state
from resu.core.pattern import Pattern, Unstructured, get_pattern
from resu.core.randomness import derived_generator
from resu.pruning.allocation import Allocation, global_masks, needs_scores
from resu.training import driver_state
from resu.training.agreement import Agreement
from resu.training.algorithms.base import Algorithm, View
from resu.training.budget import keeps_at
from resu.training.closures import after_backward
from resu.training.divergence import divergence_told
from resu.training.driver_checks import check_layers, check_rule
from resu.training.gradients import add_penalty, gathered_gradient, is_no_step
from resu.training.held_layer import HeldLayer
from resu.training.report import SparsityReport, make_report
from resu.training.wrappers import plain_optimizer, unwrap

__all__ = ["Sparsifier"]


class Sparsifier:
    """Sparse training in one added line; the loop stays as it was.

    It prunes the model when it is made if the algorithm is due at step 0, counts the steps of ``optimizer``
    (an AMP step that was skipped is no step), updates the topology when due, and keeps pruned positions
    exactly zero under any optimizer until :meth:`commit`, also after the schedule has ended.

    With several processes every one makes it alike: under ``DistributedDataParallel``, or after ``fully_shard``
    (FSDP2), where masks, θ and counters are sharded with their weights. All decide from the same reduced gradients, and
    a checksum of the masks is compared after each update.

    Args:
        model: The module to train; ``torch.compile`` and data-parallel wrappers are looked through.
        optimizer: Holds the weights. Its state at positions that change sides follows the contract: zeroed, unless
            the algorithm keeps learning them (``RESU``, ``STE``). Under optimizers of Adam's kind the first step of a
            grown weight is capped at the learning rate.
        algorithm: The topology rule, e.g. ``RigL(sparsity=0.9, end_step=4000)``.
        pattern: Which positions compete: a :class:`~resu.core.pattern.Pattern` or a name such as ``"row"``, ``"2:4"``,
            ``"block:16x1"``; None: single weights within the tensor.
        distribution: How the budget is divided over layers: ``"erk"``, ``"er"``, ``"uniform"``, ``"global"``, a mapping
            ``{glob: sparsity}`` (unmatched layers stay dense) or a function. N:M fixes every layer's share itself.
        include: Globs of weights to prune; None: all linear and convolution weights (:func:`~resu.core.layers.select`).
        exclude: Globs of weights to leave dense.
        seed: Of every random choice; choices depend on (seed, layer, step) alone.
        process_group: Of the processes that train this model together; None: the wrapper's, or all.

    Attributes:
        step: Optimizer steps done.
        committed: Whether :meth:`commit` was called: nothing is held any more.

    Raises:
        TypeError: If there is no rule, or no optimizer of torch.
        ValueError: If a glob matches nothing, no selected weight belongs to the optimizer, the pattern
            cannot have the algorithm's sparsity, or the algorithm cannot keep to the pattern.

    Warns:
        UserWarning: Of selected weights that this optimizer does not train.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> from resu.training import RigL
        >>> sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.9, interval=2, end_step=8))
        >>> for _ in range(10):
        ...     loss = model(torch.randn(16, 20)).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> sparsifier.sparsity
        0.9
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        algorithm: Algorithm,
        *,
        pattern: Pattern | str | None = None,
        distribution: str | Mapping[str, float] | Allocation = "erk",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        self.model = unwrap(model)
        self.optimizer = optimizer = plain_optimizer(optimizer)
        self.algorithm = algorithm
        self.pattern = get_pattern(pattern)
        self.seed = seed
        self.step = 0
        self.committed = self._only_shapes = False
        self.layers = select(self.model, include, exclude)
        self._agreement = Agreement(model, process_group)
        self.distribution = check_rule(algorithm, self.pattern, distribution, self.layers)
        check_layers(self.layers, optimizer)
        self._held = {name: HeldLayer(layer) for name, layer in self.layers.items()}
        # What the pruning at step 0 took from each weight, given back if a state is loaded (see load_state_dict), and
        # where the optimizer's state is to be cleared once the first step comes.
        self._undo: dict[str, tuple[Tensor, Tensor, int]] | None = {}
        self._unclear: dict[str, Tensor] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        try:
            if algorithm.due(0):
                self._update(algorithm.target(0))
        except BaseException:  # nothing stays behind: no hook, no pruned weight
            self._release()
            self._give_back()
            raise
        for held in self._held.values():
            held.start()
        self._prepare()

    # -- what is -------------------------------------------------------------------------------------
    @property
    def masks(self) -> dict[str, SparseMask]:
        """The present mask of every weight, by parameter name; under FSDP2 gathered, so every rank must ask."""
        return {name: held.mask for name, held in self._held.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of all selected weights that is pruned now."""
        total = sum(held.numel for held in self._held.values())
        return (total - sum(held.keep for held in self._held.values())) / total

    def report(self, example_inputs: Any = None) -> SparsityReport:
        """Per layer: kept, sparsity, R_s (positions ever active; ITOP, arXiv 2102.02887), growth; prints as a table.

        Args:
            example_inputs: One batch (a tensor, a tuple of arguments, or a dictionary of them) that the model is run on
                once, to count how often each weight is multiplied. With it the report holds FLOPs against dense
                training and inference. Under FSDP2 every rank must ask for these, since the model runs.
        """
        return make_report(self.model, self._held, self.step, example_inputs)

    # -- the step ------------------------------------------------------------------------------------
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if is_dynamo_compiling():  # a decorator would import the compiler for all
            return torch.compiler.disable(self._before_step)(optimizer, args, kwargs)  # type: ignore[no-any-return]
        self._only_shapes = is_no_step(optimizer, self._held.values())
        if self._only_shapes:
            return None
        for name, where in self._unclear.items():
            clear_state(optimizer, self.layers[name].weight, where)
        self._unclear = {}
        for name, held in self._held.items():
            if held.replaced:
                raise RuntimeError(
                    f"{name!r} is another parameter than when the Sparsifier was made (fully_shard, a parametrization "
                    "or load_state_dict(assign=True) replaces parameters); make the Sparsifier after that"
                )
        if self._moved:
            for held in self._held.values():
                held.find_newborn()
        return after_backward(args, kwargs, self._after_backward) if self._looks else None

    @torch.no_grad()
    def _after_backward(self) -> None:
        # Fused optimizers unscale inside their own step, and say here by how much; for others it is done already.
        scale = getattr(self.optimizer, "grad_scale", None)
        active = self.algorithm.gradient == "active" and self.algorithm.due(self.step + 1)
        for held in self._held.values():
            held.gradient = gathered_gradient(held, self._agreement, active, scale)
            if held.theta is not None:
                add_penalty(held, self.algorithm, scale)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_dynamo_compiling():
            torch.compiler.disable(self._after_step)(optimizer, args, kwargs)
            return
        found_inf = getattr(optimizer, "found_inf", None)  # fused optimizers skip inside their own step
        if self._only_shapes or (isinstance(found_inf, Tensor) and bool(found_inf)):
            return
        self._undo = None
        self.step += 1
        due = self.algorithm.due(self.step)
        beta = self.algorithm.gradient_memory
        for held in self._held.values():
            held.count_work()
            if held.newborn is not None:
                held.cap_newborn(optimizer)
            if held.theta is not None:
                held.absorb(self.algorithm.damping)  # which zeroes the pruned positions as well
            elif due:
                held.constraint.enforce()
            if beta is not None and held.gradient is not None:
                if held.momentum is None:
                    held.momentum = torch.zeros_like(held.gradient)
                # One overflow at a pruned position, which no GradScaler sees, would stay in the mean for ever.
                held.momentum.lerp_(held.gradient.nan_to_num_(0.0, 0.0, 0.0), 1 - beta)
        if due:
            with divergence_told(self._held, self.step):
                self._update(self.algorithm.target(self.step))
        self._prepare()

    def prune_to(self, sparsity: float) -> None:
        """Update the topology now, between two steps, to ``sparsity``; the schedule goes on as before."""
        check_sparsity(sparsity)
        if self.committed:
            raise RuntimeError("this Sparsifier holds nothing since commit(); make another one to prune further")
        self._update(sparsity)
        self._prepare()

    def _prepare(self) -> None:
        """Set the hooks up for the coming step: what learns, and whose gradient is caught."""
        rule = self.algorithm
        learning = rule.learns_pruned and rule.learning(self.step)
        remembers = rule.gradient_memory is not None and (rule.end_step is None or self.step < rule.end_step)
        due = rule.gradient != "none" and rule.due(self.step + 1)
        watched = remembers or (due and rule.gradient == "dense")
        # Whether the coming step has something to do before the optimizer: most have not.
        self._looks = watched or due or (learning and type(rule).penalty is not Algorithm.penalty)
        corrects = any("betas" in group for group in self.optimizer.param_groups)
        self._moved = corrects and self.step > 0 and rule.clears_state and rule.due(self.step)
        for held in self._held.values():
            if learning and held.theta is None:
                held.theta = torch.zeros_like(held.weight)
            elif not learning and held.theta is not None:
                clear_state(self.optimizer, held.layer.weight, held.constraint.held())
                held.theta = None
                held.set_reach(None, self.optimizer)
            held.constraint.mask_gradient = not learning or held.reach is not None
            held.observe(watched)
            held.gradient = None
            if not remembers:
                held.momentum = None

    # -- the topology --------------------------------------------------------------------------------
    @torch.no_grad()
    def _update(self, sparsity: float) -> None:
        """One topology update of all layers."""
        if self.algorithm.learns_pruned and self.algorithm.learning(self.step):
            for held in self._held.values():
                held.theta = torch.zeros_like(held.weight) if held.theta is None else held.theta
        if self._together():
            views = {name: self._view(name) for name in self.layers}
            if sparsity > 0 and self._ranks_globally():
                new = global_masks({n: self.algorithm.scores(view) for n, view in views.items()}, sparsity)
                for name, view in views.items():
                    self._move(name, view.mask, new[name])
            else:
                keeps = self._allocate(views, sparsity)
                for name, view in views.items():
                    self._move(name, view.mask, self._new_mask(dataclasses.replace(view, keep=keeps[name]), sparsity))
        else:  # one layer at a time is gathered
            keeps = self._allocate({}, sparsity)
            for name in self.layers:
                view = dataclasses.replace(self._view(name), keep=keeps[name])
                self._move(name, view.mask, self._new_mask(view, sparsity))
        reaches = type(self.algorithm).reach is not Algorithm.reach
        for name, held in self._held.items():
            if reaches and held.theta is not None:
                held.set_reach(self.algorithm.reach(self._view(name)), self.optimizer)
        self._agreement.check_same(self.step)

    def _together(self) -> bool:
        """Whether an update must look at all layers before it can decide on one."""
        plain = type(self.algorithm).redistribute is Algorithm.redistribute
        return needs_scores(self.distribution) or not plain

    def _new_mask(self, view: View, sparsity: float) -> Tensor:
        if view.keep == view.mask.numel():
            return torch.ones_like(view.mask)
        return self.algorithm.update_mask(view, sparsity, self.step)

    def _ranks_globally(self) -> bool:
        """Whether one ranking over all layers gives the masks at once: the counts and the best of each layer."""
        plain = type(self.algorithm).update_mask is Algorithm.update_mask
        return plain and self.distribution == "global" and self.pattern == Unstructured()

    def _view(self, name: str) -> View:
        held = self._held[name]

        def seen(part: Tensor | None) -> Tensor | None:
            return None if part is None else held.matrix(part)

        return View(
            name=name,
            weight=held.matrix(held.weight),
            mask=held.layer.matrix(held.mask.mask),
            keep=held.keep,
            generator=derived_generator(self.seed, name, self.step),
            pattern=self.pattern,
            step=self.step,
            theta=seen(held.theta),
            gradient=seen(held.gradient),
            momentum=seen(held.momentum),
        )

    def _allocate(self, views: Mapping[str, View], sparsity: float) -> dict[str, int]:
        shapes = {
            name: torch.Size(layer.matrix(torch.empty(layer.weight.shape, device="meta")).shape)
            for name, layer in self.layers.items()
        }
        scores = None
        if needs_scores(self.distribution) and sparsity > 0:
            scores = {name: self.algorithm.scores(view) for name, view in views.items()}
        keeps = keeps_at(self.distribution, shapes, sparsity, self.algorithm.sparsity, scores)
        if views and sparsity > 0:
            views = {name: dataclasses.replace(view, keep=keeps[name]) for name, view in views.items()}
            keeps = self.algorithm.redistribute(views)
        return {
            n: keep if keep == shapes[n].numel() else self.pattern.reachable(shapes[n], keep)
            for n, keep in keeps.items()
        }

    def _move(self, name: str, old: Tensor, new: Tensor) -> None:
        """Make ``new`` the mask of a layer, and clear the optimizer's state where it changed."""
        held = self._held[name]
        self._agreement.note(new)
        version = held.weight._version
        if (moved := held.move(old, new)) is None:
            return
        changed, before = moved
        if self._undo is None or self.step > 0:
            if self.algorithm.clears_state:
                clear_state(self.optimizer, held.layer.weight, changed)
            return
        # Before the first step everything can be taken back, also what prune_to() did since.
        if self.algorithm.clears_state:
            self._unclear[name] = torch.cat([self._unclear.get(name, changed[:0]), changed])
        where, value, last = self._undo.get(name, (changed[:0], before[:0], version))
        if last != version:  # somebody has written to it since
            where, value = where[:0], value[:0]
        fresh = torch.isin(changed, where, invert=True)
        joined = torch.cat([where, changed[fresh]]), torch.cat([value, before[fresh]])
        self._undo[name] = *joined, held.weight._version

    @torch.no_grad()
    def _give_back(self) -> None:
        """Undo the pruning at step 0 in every weight that nobody has written to since."""
        for name, (changed, value, version) in (self._undo or {}).items():
            weight = self._held[name].weight
            if weight._version == version:
                weight[torch.unravel_index(changed, weight.shape)] = value
        self._undo = None

    # -- end and resume ------------------------------------------------------------------------------
    def commit(self) -> dict[str, SparseMask]:
        """Make the present state the plain model: hooks and θ go, zeros stay zeros but are no longer held.

        A second call changes nothing.

        Returns:
            The final masks.
        """
        if not self.committed:
            for held in self._held.values():
                held.constraint.enforce()
            self._release()
        return self.masks

    def __getstate__(self) -> Any:
        raise TypeError(
            "a Sparsifier is tied to one model and one optimizer and is neither copied nor pickled; keep it out of "
            "what is, make another for the copy, and carry state_dict() over"
        )

    def _release(self) -> None:
        self.committed = True
        for held in self._held.values():
            held.constraint.remove()
            held.theta = held.momentum = held.gradient = None
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Masks, θ, counters and settings: tensors and plain values, safe for ``torch.load(weights_only=True)``.

        Saved beside the model's and the optimizer's, it resumes a run bit for bit. Under FSDP2 the tensors are
        ``DTensor`` with the layout of their weights, for ``torch.distributed.checkpoint``.
        """
        return driver_state.save(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the model and the optimizer as well, in any order.

        Raises:
            ValueError: If the state is of another algorithm, other settings or other layers; nothing has changed then.
            RuntimeError: After :meth:`commit`.
        """
        driver_state.load(self, state)

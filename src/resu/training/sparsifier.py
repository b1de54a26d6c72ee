"""``Sparsifier``: the one driver that owns masks, hooks and counters while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.counting import check_sparsity, positions
from resu.core.enforcement import Constraint, is_held
from resu.core.layers import Layer, select
from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state
from resu.core.pattern import NM, Pattern, Unstructured, get_pattern
from resu.core.randomness import derived_generator
from resu.pruning.allocation import Allocation, described, global_masks, needs_scores
from resu.pruning.budget import check_stacks, stack_rows
from resu.training.algorithms.base import Algorithm, View
from resu.training.budget import check_distribution, keeps_at
from resu.training.report import LayerReport, SparsityReport
from resu.training.wrappers import unwrap

__all__ = ["Sparsifier"]

_FORMAT = 1


class Sparsifier:
    """Sparse training in one added line; the loop stays as it was.

    It prunes the model when it is made if the algorithm is due at step 0, counts the steps of ``optimizer``
    (an AMP step that was skipped is no step), updates the topology when due, and keeps pruned positions
    exactly zero under any optimizer until :meth:`commit`, also after the schedule has ended.

    Args:
        model: The module to train; ``torch.compile`` and data-parallel wrappers are looked through.
        optimizer: Holds the weights. Its state at positions that change sides follows the contract: zeroed, unless
            the algorithm keeps learning them (``RESU``).
        algorithm: The topology rule, e.g. ``RESU(sparsity=0.9, end_step=4000)``.
        pattern: Which positions compete: a :class:`~resu.core.pattern.Pattern` or a name such as ``"row"``, ``"2:4"``,
            ``"block:16x1"``; None: single weights within the tensor.
        distribution: How the budget is divided over layers: ``"erk"``, ``"er"``, ``"uniform"``, ``"global"``, a mapping
            ``{glob: sparsity}`` (unmatched layers stay dense) or a function. N:M fixes every layer's share itself.
        include: Globs of weights to prune; None: all linear and convolution weights (:func:`~resu.core.layers.select`).
        exclude: Globs of weights to leave dense.
        seed: Of every random choice; choices depend on (seed, layer, step) alone.

    Attributes:
        step: Optimizer steps done.

    Raises:
        ValueError: If a glob matches nothing, no selected weight belongs to the optimizer, or the pattern
            cannot have the algorithm's sparsity.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> from resu.training import RESU
        >>> sparsifier = Sparsifier(model, optimizer, RESU(sparsity=0.9, interval=2, end_step=8), distribution="global")
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
    ) -> None:
        self.model = unwrap(model)
        self.optimizer = optimizer
        self.algorithm = algorithm
        self.pattern = get_pattern(pattern)
        self.distribution = distribution
        self.seed = seed
        self.step = 0
        self.layers: dict[str, Layer] = select(self.model, include, exclude)
        self._check()
        full = {
            name: SparseMask(torch.ones_like(layer.weight, dtype=torch.bool)) for name, layer in self.layers.items()
        }
        self._constraints = {n: Constraint(self.layers[n].weight, full[n]) for n in self.layers}
        self._theta: dict[str, Tensor] = {}
        self._ever: dict[str, SparseMask] = {}
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
        self._ever = self.masks
        self._set_learning()

    def _check(self) -> None:
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(layer.weight) in owned for layer in self.layers.values()):
            raise ValueError(
                f"none of the {len(self.layers)} selected weights belongs to the optimizer; build the optimizer from "
                "the parameters of this model, after moving it to its device"
            )
        held = [name for name, layer in self.layers.items() if is_held(layer.weight)]
        if held:
            raise ValueError(
                f"{', '.join(held[:5])} {'is' if len(held) == 1 else 'are'} held by a mask already; call commit() on "
                "the Sparsifier that made it, or remove_mask() on the layer, before another takes over"
            )
        check_stacks(self.pattern, stack_rows(self.layers))
        shapes = {name: layer.weight.shape for name, layer in self.layers.items()}
        check_distribution(self.distribution, shapes, self.algorithm.sparsity)
        if isinstance(self.pattern, NM) and isinstance(self.distribution, str):
            self.distribution = "uniform"  # N:M fixes every layer's share; no other budget can be kept
        if isinstance(self.pattern, NM) and abs(self.algorithm.sparsity - self.pattern.sparsity) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern.n}:{self.pattern.m} has sparsity {self.pattern.sparsity:g}, the algorithm asks "
                f"for {self.algorithm.sparsity:g}; set the algorithm's sparsity to the pattern's"
            )

    # -- what is -------------------------------------------------------------------------------------
    @property
    def masks(self) -> dict[str, SparseMask]:
        """The present mask of every weight, by parameter name."""
        return {name: constraint.mask for name, constraint in self._constraints.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of all selected weights that is pruned now."""
        masks = self.masks.values()
        return sum(m.n_pruned for m in masks) / sum(m.numel for m in masks)

    def report(self) -> SparsityReport:
        """Per layer: kept, sparsity, R_s (positions ever active; ITOP, arXiv 2102.02887). Prints as a table."""
        return SparsityReport(
            step=self.step,
            layers=tuple(
                LayerReport(
                    name=name,
                    shape=tuple(mask.shape),
                    keep=mask.n_active,
                    sparsity=mask.sparsity,
                    explored=self._ever[name].n_active / mask.numel,
                )
                for name, mask in self.masks.items()
            ),
        )

    # -- the step ------------------------------------------------------------------------------------
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name, where in self._unclear.items():
            clear_state(optimizer, self.layers[name].weight, where)
        self._unclear = {}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # fused optimizers skip inside their own step
        if isinstance(found_inf, Tensor) and bool(found_inf):
            return
        self._undo = None
        self.step += 1
        due = self.algorithm.due(self.step)
        if self._theta:
            self._absorb()  # which zeroes the pruned positions as well
        elif due:
            for constraint in self._constraints.values():
                constraint.enforce()
        if due:
            self._update(self.algorithm.target(self.step))
        self._set_learning()

    def prune_to(self, sparsity: float) -> None:
        """Update the topology now, between two steps, to ``sparsity``; the schedule goes on as before."""
        check_sparsity(sparsity)
        self._update(sparsity)
        self._set_learning()

    @torch.no_grad()
    def _absorb(self) -> None:
        """θ += γ·Δ: take what the optimizer did at pruned positions out of the weight."""
        gamma = self.algorithm.damping
        for name, theta in self._theta.items():
            constraint, weight = self._constraints[name], self.layers[name].weight
            if (theta.dtype, theta.device) != (weight.dtype, weight.device):  # model.to(…) since the last step
                theta = self._theta[name] = theta.to(weight.device, weight.dtype)
            update = weight.detach().clone()
            constraint.mask.zero_(update, active=True)
            theta.add_(update, alpha=gamma)
            constraint.enforce()

    def _set_learning(self) -> None:
        """Open or close the gradient of pruned positions; θ ends with its learning."""
        learning = self.algorithm.learns_pruned and self.algorithm.learning(self.step)
        for name, constraint in self._constraints.items():
            if learning and name not in self._theta:
                self._theta[name] = torch.zeros_like(constraint.parameter)  # type: ignore[arg-type]
            elif not learning and constraint.mask_gradient is False:
                clear_state(self.optimizer, self.layers[name].weight, constraint.held())
            constraint.mask_gradient = not learning
        if not learning:
            self._theta = {}

    @torch.no_grad()
    def _update(self, sparsity: float) -> None:
        """One topology update of all layers."""
        views = {name: self._view(name) for name in self.layers}
        if sparsity > 0 and self._ranks_globally():
            scores = {name: self.algorithm.scores(view) for name, view in views.items()}
            for name, new in global_masks(scores, sparsity).items():
                self._move(name, views[name].mask, new)
            return
        keeps = self._allocate(views, sparsity)
        for name, view in views.items():
            view = dataclasses.replace(view, keep=keeps[name])
            if view.keep == view.mask.numel():
                new = torch.ones_like(view.mask)
            else:
                new = self.algorithm.update_mask(view, sparsity, self.step)
            self._move(name, view.mask, new)

    def _ranks_globally(self) -> bool:
        """Whether one ranking over all layers gives the masks at once: the counts and the best of each layer."""
        plain = type(self.algorithm).update_mask is Algorithm.update_mask
        return plain and self.distribution == "global" and self.pattern == Unstructured()

    def _view(self, name: str) -> View:
        weight, mask = self.layers[name].weight.detach(), self._constraints[name].mask.mask
        theta = self._theta.get(name)
        matrix = self.layers[name].matrix  # rules and patterns see [out, in]
        weight, mask, theta = matrix(weight), matrix(mask), None if theta is None else matrix(theta)
        return View(
            name=name,
            weight=weight,
            mask=mask,
            keep=0,
            generator=derived_generator(self.seed, name, self.step),
            pattern=self.pattern,
            theta=theta,
        )

    def _allocate(self, views: Mapping[str, View], sparsity: float) -> dict[str, int]:
        shapes = {name: view.weight.shape for name, view in views.items()}
        scores = None
        if needs_scores(self.distribution) and sparsity > 0:
            scores = {name: self.algorithm.scores(view) for name, view in views.items()}
        keeps = keeps_at(self.distribution, shapes, sparsity, self.algorithm.sparsity, scores)
        return {
            n: keep if keep == shapes[n].numel() else self.pattern.reachable(shapes[n], keep)
            for n, keep in keeps.items()
        }

    def _move(self, name: str, old: Tensor, new: Tensor) -> None:
        """Make ``new`` the mask of a layer: dropped weights to 0 (or to θ), grown ones from θ (or 0)."""
        old, new = self.layers[name].unmatrix(old), self.layers[name].unmatrix(new)
        weight, constraint = self.layers[name].weight, self._constraints[name]
        theta = self._theta.get(name)
        if theta is None and self.algorithm.learns_pruned and self.algorithm.learning(self.step):
            theta = self._theta[name] = torch.zeros_like(weight)
        # Few positions change in one update, so only those are touched; by coordinates, for any memory format.
        changed = positions(old ^ new)
        if changed.numel() == 0:
            return
        grown = new.reshape(-1)[changed]
        at = torch.unravel_index(changed, weight.shape)
        value = weight[at]
        if self._undo is not None and self.step == 0:
            self._undo.setdefault(name, (changed, value.clone(), 0))
        if theta is not None:
            value += theta[at]
            theta[at] = torch.where(grown, 0, value)
            weight[at] = torch.where(grown, value, 0)
        else:
            weight[at] = torch.where(grown, value, 0)
        if self.algorithm.clears_state:
            if self._undo is not None and self.step == 0:
                self._unclear[name] = changed
            else:
                clear_state(self.optimizer, weight, changed)
        constraint.mask = SparseMask(new)
        if self._undo is not None and name in self._undo:
            self._undo[name] = (*self._undo[name][:2], weight._version)
        if name in self._ever:
            self._ever[name] = self._ever[name] | constraint.mask

    @torch.no_grad()
    def _give_back(self) -> None:
        """Undo the pruning at step 0 in every weight that nobody has written to since."""
        for name, (changed, value, version) in (self._undo or {}).items():
            weight = self.layers[name].weight
            if weight._version == version:
                weight[torch.unravel_index(changed, weight.shape)] = value
        self._undo = None

    # -- end and resume ------------------------------------------------------------------------------
    def commit(self) -> dict[str, SparseMask]:
        """Make the present state the plain model: hooks and θ go, zeros stay zeros but are no longer held.

        Returns:
            The final masks.
        """
        for constraint in self._constraints.values():
            constraint.enforce()
        self._release()
        return self.masks

    def _release(self) -> None:
        for constraint in self._constraints.values():
            constraint.remove()
        for hook in self._hooks:
            hook.remove()
        self._theta = {}

    def _settings(self) -> dict[str, Any]:
        return {
            "algorithm": type(self.algorithm).__name__,
            "options": dataclasses.asdict(self.algorithm),
            "pattern": repr(self.pattern),
            "distribution": described(self.distribution),
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Masks, θ, counters and settings: tensors and plain values, safe for ``torch.load(weights_only=True)``.

        Saved beside the model's and the optimizer's, it resumes a run bit for bit.
        """
        return {
            "format": _FORMAT,
            "step": self.step,
            "settings": self._settings(),
            "masks": {name: mask.state_dict() for name, mask in self.masks.items()},
            "explored": {name: mask.state_dict() for name, mask in self._ever.items()},
            "theta": {name: theta.detach().clone() for name, theta in self._theta.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the model and the optimizer as well, in any order.

        Raises:
            ValueError: If the state is of another algorithm, other settings or other layers; nothing has changed then.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"sparsifier state has format {state.get('format')!r}, this version reads {_FORMAT}")
        settings = self._settings()
        different = [
            f"{key}: saved {state['settings'].get(key)!r}, here {settings[key]!r}"
            for key in settings
            if state["settings"].get(key) != settings[key]
        ]
        if different:
            raise ValueError("the saved run has other settings; build the Sparsifier alike: " + "; ".join(different))
        if set(state["masks"]) != set(self.layers):
            odd = sorted(set(state["masks"]) ^ set(self.layers))
            raise ValueError(f"the saved run has other layers; not in both: {', '.join(odd[:10])}")
        masks = {n: SparseMask.from_state_dict(s) for n, s in state["masks"].items()}
        ever = {n: SparseMask.from_state_dict(s) for n, s in state["explored"].items()}
        theta: dict[str, Tensor] = dict(state["theta"])
        for name, value in theta.items():
            if name not in self.layers or value.shape != self.layers[name].weight.shape:
                raise ValueError(f"the saved run has θ {tuple(value.shape)} for {name!r}: no such weight here")
        for name, mask in masks.items():
            if mask.shape != self.layers[name].weight.shape:
                raise ValueError(
                    f"saved mask of {name!r} has shape {tuple(mask.shape)}, "
                    f"the weight {tuple(self.layers[name].weight.shape)}"
                )
        # If the model was loaded before this Sparsifier was made, the pruning at step 0 took weights that the saved
        # mask keeps: give them back. If it was loaded since, the weights are the saved ones already.
        self._give_back()
        self.step = int(state["step"])
        if self.step > 0:
            self._unclear = {}  # done in the saved run
        self._ever = {n: m.to(self.layers[n].weight.device) for n, m in ever.items()}
        for name, constraint in self._constraints.items():
            constraint.mask = masks[name].to(self.layers[name].weight.device)
        weights = {name: self.layers[name].weight for name in theta}
        self._theta = {n: t.to(weights[n].device, weights[n].dtype, copy=True) for n, t in theta.items()}
        for constraint in self._constraints.values():
            constraint.mask_gradient = not self._theta

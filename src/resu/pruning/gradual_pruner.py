"""Gradual pruning beside a training loop: a cubic ramp whose masks hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.counting import check_sparsity
from resu.core.mask import SparseMask
from resu.core.pattern import NM
from resu.core.schedule import Cubic, Every
from resu.pruning.compression import CompressionStats
from resu.pruning.holding import HeldMasks
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.pruner import Pruner, check_pruner, pruners, record

__all__ = ["GradualPruner"]

_SETTINGS = ("initial_sparsity", "final_sparsity", "begin_step", "end_step", "frequency")


@pruners.register("gradual")
class GradualPruner:
    """Prunes a little more every ``frequency`` steps, along the cubic ramp of Zhu & Gupta (arXiv 1710.01878, eq. 1).

    Call :meth:`step` once per training step. Sparsity starts at ``initial_sparsity`` at ``begin_step`` and is exactly
    ``final_sparsity`` from ``end_step`` on, whether or not ``frequency`` divides the ramp, and even where steps were
    left out. What is pruned stays pruned. Masks hold between calls and after the end, under any
    ``torch.optim.Optimizer``, until :meth:`release`. ``training.Magnitude`` with a ``Sparsifier`` does the same
    without a call in the loop; this one is for loops that keep their own count of steps.

    Args:
        pruner: What to prune by; its own sparsity is not used. None: ``MagnitudePruner(final_sparsity)``.
        initial_sparsity: At ``begin_step``.
        final_sparsity: From ``end_step`` on; None: the pruner's.
        begin_step: First step of the ramp; before it nothing is pruned.
        end_step: Last step of the ramp.
        frequency: Steps between prunings.
        model: The model, where a state is to be loaded before the first :meth:`step`.
        optimizer: Its state is set to zero at newly pruned positions, if given.

    Raises:
        ValueError: If sparsity falls along the ramp, steps are out of order, or the pruner's pattern has one sparsity
            only (N:M).

    Example:
        >>> import torch
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> gradual = GradualPruner(final_sparsity=0.9, begin_step=2, end_step=9, frequency=3)
        >>> for step in range(12):
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = gradual.step(model, step)
        >>> [(entry["step"], round(entry["actual"], 2)) for entry in gradual.history]
        [(2, 0.0), (5, 0.73), (8, 0.9), (9, 0.9)]
        >>> int((model.weight == 0).sum())
        180
    """

    def __init__(
        self,
        pruner: Pruner | None = None,
        initial_sparsity: float = 0.0,
        final_sparsity: float | None = None,
        begin_step: int = 0,
        end_step: int = 1000,
        frequency: int = 100,
        *,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        check_pruner(pruner)
        if final_sparsity is None:
            if pruner is None:
                raise ValueError("give a final_sparsity, or a pruner that has one")
            if isinstance(pruner.sparsity, Mapping):
                raise ValueError("a ramp needs one final_sparsity; the pruner has a sparsity per layer")
            final_sparsity = pruner.sparsity
        check_sparsity(initial_sparsity, "initial_sparsity")
        check_sparsity(final_sparsity, "final_sparsity")
        if initial_sparsity > final_sparsity:
            raise ValueError(
                f"sparsity cannot fall from initial_sparsity {initial_sparsity!r} to final_sparsity "
                f"{final_sparsity!r}: what is pruned stays pruned"
            )
        pattern = getattr(pruner, "pattern", None)
        if isinstance(pattern, NM) and (initial_sparsity, final_sparsity) != (pattern.sparsity, pattern.sparsity):
            raise ValueError(
                f"{pattern.n}:{pattern.m} has sparsity {pattern.sparsity:g} and no other, so there is no ramp to it; "
                "prune once with the pruner itself"
            )
        self.pruner: Pruner = MagnitudePruner(final_sparsity) if pruner is None else pruner
        self.initial_sparsity, self.final_sparsity = initial_sparsity, final_sparsity
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        self.schedule = Cubic(initial_sparsity, final_sparsity, begin_step, end_step)
        self._due = Every(frequency, begin_step, end_step)  # checks frequency too
        self.model = model
        self.optimizer = optimizer
        self.history: list[dict[str, Any]] = []
        self._step: int | None = None
        self._done: int | None = None
        self._held: HeldMasks | None = None

    # -- what is -------------------------------------------------------------------------------------
    @property
    def masks(self) -> dict[str, SparseMask]:
        """The present mask of every pruned weight; empty before ``begin_step``."""
        return {} if self._held is None else self._held.masks

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned weights that is removed now."""
        masks = self.masks.values()
        numel = sum(mask.numel for mask in masks)
        return sum(mask.n_pruned for mask in masks) / numel if numel else 0.0

    @property
    def finished(self) -> bool:
        """Whether the final sparsity is reached."""
        return self._done is not None and self._done >= self.end_step

    @property
    def stats(self) -> CompressionStats:
        """Bytes in each layout now.

        Raises:
            ValueError: Before anything was pruned.
        """
        if self._held is None:
            raise ValueError("there is nothing to count yet: no step was due")
        return CompressionStats.of(self.masks, self._held.model)

    # -- the step ------------------------------------------------------------------------------------
    def step(self, model: nn.Module | None = None, step: int | None = None) -> bool:
        """Prune if a step of the ramp is due; call it once per training step, after ``optimizer.step()``.

        Args:
            model: The model, the same in every call; None: that of the call before, or of the constructor.
            step: Number of the training step, over the whole training and not per epoch; None: one more than last time
                (0 at first). A number that repeats does nothing.

        Returns:
            Whether the masks changed.

        Raises:
            ValueError: If steps go back, another model is given, or weights are NaN.
        """
        model = self._known(model)
        now = (0 if self._step is None else self._step + 1) if step is None else step
        if isinstance(now, bool) or not isinstance(now, int):
            raise TypeError(f"step must be an integer, got {now!r}")
        if self._step is not None and now < self._step:
            raise ValueError(
                f"step {now} comes after step {self._step}: steps count over the whole training, not per epoch"
            )
        due = self._latest_due(now)
        if due is None or (self._done is not None and due <= self._done):
            self._step = now
            return False
        before = {name: mask.mask for name, mask in self.masks.items()}
        wanted = self.schedule(due)
        masks = self.pruner.compute_masks(model, wanted, within=before)
        if self._held is None:
            self._held = HeldMasks(model, {})
        self._held.update(masks, self.optimizer)
        self.history.append({"step": now, **record(masks, before, wanted)})
        self._step, self._done = now, due
        return bool(self.history[-1]["newly_pruned"])

    def _latest_due(self, step: int) -> int | None:
        """The last step up to ``step`` at which the ramp moves: steps left out are made up for."""
        if step < self.begin_step:
            return None
        if step >= self.end_step:
            return self.end_step
        return step - (step - self.begin_step) % self.frequency

    def _known(self, model: nn.Module | None) -> nn.Module:
        model = self.model if model is None else model
        if model is None:
            raise ValueError("which model? Pass it to step(), or to the constructor")
        if self._held is not None and self._held.model is not model:
            raise ValueError("this pruner holds the masks of another model; make a pruner for each")
        self.model = model
        return model

    def release(self) -> None:
        """Let go of the masks, only when asked: a fine-tuning run after the ramp would otherwise densify the model."""
        if self._held is not None:
            self._held.release()

    # -- resume --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Masks (packed bits), counters, history and settings: tensors and plain values."""
        return {
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "step": self._step,
            "done": self._done,
            "masks": {name: mask.state_dict() for name, mask in self.masks.items()},
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module | None = None) -> None:
        """Go on where another left off; the masks hold at once.

        Load the model's weights first. The continued run equals the uninterrupted one bit for bit.

        Args:
            state: From :meth:`state_dict`.
            model: The model, unless the constructor or :meth:`step` had it: its masks have to hold from the next
                optimizer step on, which comes before the next call of :meth:`step`.

        Raises:
            ValueError: If the state is of other settings, or there is no model to hold its masks.
        """
        mine = {name: getattr(self, name) for name in _SETTINGS}
        other = {name: value for name, value in state["settings"].items() if mine.get(name) != value}
        if other:
            said = ", ".join(f"{name}={value!r} (here {mine.get(name)!r})" for name, value in other.items())
            raise ValueError(f"the state is of another ramp: {said}; make the pruner with the same settings")
        masks = {name: SparseMask.from_state_dict(given) for name, given in state["masks"].items()}
        target = self.model if model is None else model
        if masks and target is None:
            raise ValueError("pass model= to load_state_dict: masks that are loaded have to hold from now on")
        if self._held is not None:
            self._held.release()
            self._held = None
        if masks:
            assert target is not None
            self._held = HeldMasks(target, masks)
        self.model = target
        self._step, self._done = state["step"], state["done"]
        self.history = [dict(entry) for entry in state["history"]]

    def compute_masks(
        self, model: nn.Module, sparsity: float | None = None, *, within: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Masks of the inner pruner, at ``final_sparsity`` unless said otherwise; the model is not changed."""
        return self.pruner.compute_masks(model, self.final_sparsity if sparsity is None else sparsity, within=within)

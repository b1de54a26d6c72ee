"""``RESUTrainer``: the loop around resurrection cycles, with evaluation, progress and resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.layers import select
from resu.core.mask import SparseMask
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.training.config import RESUConfig
from resu.training.cycle import CycleStats, RESUCycle
from resu.training.dormant import DormantPlan
from resu.training.feed import Feed
from resu.training.phases import leave, prune_layers, sparsity_of
from resu.training.progress import Progress

__all__ = ["RESUTrainer"]

_FORMAT = 1


class RESUTrainer:
    """Train, prune and resurrect a model in cycles; it ends sparse, exact to one weight.

    The model's linear and convolution layers become RESU layers in place (their parameters stay the same objects).
    It owns the loop: ``zero_grad``, ``backward``, ``step``, fresh optimizer state for θ, evaluation, progress, resume.

    Args:
        model: Any module.
        config: See :class:`~resu.training.config.RESUConfig`; checked again here.
        optimizer: Over the model's parameters; trains everything outside the RESU phases.
        train_fn: ``(model, batch) -> scalar loss``.
        eval_fn: ``model -> float`` (higher is better), called after each cycle in eval mode without gradients.
        pruner: ``(trainer, sparsity) -> None``: prunes ``trainer.layers`` instead of ``config.pruning_method``.
        stabilizer: ``trainer -> None``: called at the start of STABILIZE, e.g. for a refinement of the masks.
        callbacks: ``(trainer, event, info) -> None`` with events ``"phase"``, ``"step"`` and ``"cycle"``.
        include: Globs of weights to prune (see :func:`resu.core.layers.select`).
        exclude: Globs of weights to leave dense.
        scheduler: A learning-rate scheduler of ``optimizer``, stepped once per optimizer step of any phase.
        scaler: A ``torch.amp.GradScaler``. Selective θ updates are unscaled too.
        accumulate: Micro-batches per optimizer step.
        progress: Show a bar (needs rich; never where the output is not a terminal).

    Example:
        >>> from resu.training import RESUConfig
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(5)]
        >>> def train_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> config = RESUConfig(target_sparsity=0.8, num_cycles=2, steps_per_cycle=10)
        >>> trainer = RESUTrainer(model, config, optimizer, train_fn, progress=False)
        >>> [round(stats.actual_sparsity, 2) for stats in trainer.train(batches)]
        [0.4, 0.8]
    """

    def __init__(
        self,
        model: nn.Module,
        config: RESUConfig,
        optimizer: Optimizer,
        train_fn: Callable[[nn.Module, Any], Tensor],
        eval_fn: Callable[[nn.Module], float] | None = None,
        *,
        pruner: Callable[[RESUTrainer, float], None] | None = None,
        stabilizer: Callable[[RESUTrainer], None] | None = None,
        callbacks: Sequence[Callable[[RESUTrainer, str, dict[str, Any]], None]] = (),
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        scheduler: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        progress: bool = True,
    ) -> None:
        config.validate()
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        chosen = select(model, include, exclude)
        model = convert_to_resu(model, include, exclude)
        modules = get_resu_modules(model)
        self.layers = {n: modules[n] for n in (layer.module_name for layer in chosen.values()) if n in modules}
        self.model, self.config, self.optimizer = model, config, optimizer
        self.train_fn, self.eval_fn = train_fn, eval_fn
        self.pruner, self.stabilizer, self.callbacks = pruner, stabilizer, tuple(callbacks)
        self.scheduler, self.scaler, self.accumulate = scheduler, scaler, accumulate
        self.progress = progress
        self._check()
        for group in optimizer.param_groups:
            if config.base_lr is not None:
                group["lr"] = config.base_lr
            if config.weight_decay is not None:
                group["weight_decay"] = config.weight_decay
        self.history: list[CycleStats] = []
        self.step = 0
        self._loss = math.nan
        self._feed: Feed | None = None
        self._feed_state: dict[str, Any] | None = None
        self._free_masks: dict[str, Any] | None = None
        self.dormant: DormantPlan | None = None
        if config.resurrection == "dormant":
            self.dormant = DormantPlan(model, optimizer, self.layers, config)
        elif config.initial_sparsity > 0:
            prune_layers(self.layers, config.initial_sparsity, config, optimizer, -1)
        self._cycle: RESUCycle | None = None

    def _check(self) -> None:
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(layer.weight) in owned for layer in self.layers.values()):
            raise ValueError(
                "none of the layers' weights belongs to the optimizer; build it from the parameters of this model"
            )
        tied = [name for name, layer in self.layers.items() if layer._shared_with]
        if self.config.quantize_bits is not None and tied:
            raise ValueError(
                f"{', '.join(tied)}: a weight shared with another module cannot be quantized; exclude it or leave "
                "quantize_bits unset"
            )
        if self.config.resurrection == "dormant" and (self.pruner or self.stabilizer):
            raise ValueError("dormant cycles have neither a pruner nor a stabilizer; use resurrection='inline'")

    # -- what is -----------------------------------------------------------------------------------------
    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights over all layers, now."""
        return self.dormant.sparsity if self.dormant is not None else sparsity_of(self.layers)

    @property
    def phase(self) -> str:
        """Name of the present phase; ``"done"`` between cycles."""
        return self._cycle.phase if self._cycle is not None else "done"

    def get_training_summary(self) -> dict[str, Any]:
        """``final_sparsity, total_resurrected, cycles, total_steps, final_loss, final_eval, best_eval``, history."""
        evaluations = [s.eval for s in self.history if s.eval is not None]
        return {
            "cycles": len(self.history),
            "total_steps": self.step,
            "final_sparsity": self.sparsity,
            "total_resurrected": sum(s.n_resurrected for s in self.history),
            "final_loss": self.history[-1].train_loss if self.history else math.nan,
            "final_eval": self.history[-1].eval if self.history else None,
            "best_eval": max(evaluations) if evaluations else None,
            "seconds": sum(s.duration_seconds for s in self.history),
            "history": [asdict(s) for s in self.history],
        }

    # -- the loop ----------------------------------------------------------------------------------------
    def train(
        self, train_loader: Iterable[Any], num_cycles: int | None = None, *, max_steps: int | None = None
    ) -> list[CycleStats]:
        """Run the plan from where it stands.

        Args:
            train_loader: Gives batches at each ``iter()``; read epoch after epoch.
            num_cycles: Finish at most this many cycles now (the schedule stays the plan's).
            max_steps: Do at most this many optimizer steps now; call again to go on, also in the middle of a cycle.

        Returns:
            The cycles finished in this call.
        """
        if self._feed is None or self._feed.loader is not train_loader:
            self._feed = Feed(train_loader)
            if self._feed_state is not None:
                self._feed.load_state_dict(self._feed_state)
                self._feed_state = None
        first = len(self.history)
        last = self.config.cycles if num_cycles is None else min(first + num_cycles, self.config.cycles)
        budget = math.inf if max_steps is None else max_steps
        if not self.model.training:
            self.model.train()
        with Progress(self, enabled=self.progress) as bar:
            while len(self.history) < last:
                if self._cycle is None:
                    self._cycle = RESUCycle(self, len(self.history))
                    self._cycle.begin()
                while self._cycle.phase != "done":
                    if budget <= 0:
                        return self.history[first:]
                    self._loss = self._cycle.advance()
                    self.step += 1
                    budget -= 1
                    bar.update(self._loss)
                    self.notify("step", step=self.step, loss=self._loss, phase=self.phase)
                self._finish(self._cycle)
        return self.history[first:]

    def _finish(self, cycle: RESUCycle) -> None:
        if self.dormant is not None and cycle.cycle == self.config.cycles - 1:
            self.dormant.finish()
        stats = cycle.stats(self._evaluate())
        self._cycle = None
        self.history.append(stats)
        self.notify("cycle", stats=stats)

    def _evaluate(self) -> float | None:
        if self.eval_fn is None:
            return None
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                return float(self.eval_fn(self.model))
        finally:  # modules that were in eval mode, a frozen batch norm say, stay there
            for module in training:
                module.training = True

    def notify(self, event: str, **info: Any) -> None:
        """Tell the callbacks."""
        for callback in self.callbacks:
            callback(self, event, info)

    # -- one step ----------------------------------------------------------------------------------------
    def optimizer_step(self, optimizer: Optimizer | None, update: Callable[[], None] | None = None) -> float:
        """Gradients of ``accumulate`` micro-batches, then one step of ``optimizer`` (None: the layers update θ)."""
        assert self._feed is not None
        self.forget_gradients()
        total = 0.0
        for _ in range(self.accumulate):
            total += self.backward(next(self._feed), 1.0 / self.accumulate, scaled=optimizer is not None)
        if optimizer is not None:
            if self.scaler is not None:
                self.scaler.step(optimizer)
                self.scaler.update()
            else:
                optimizer.step()
        if update is not None:
            update()
        if self.scheduler is not None:
            self.scheduler.step()
        return total

    def backward(self, batch: Any, weight: float = 1.0, scaled: bool = False) -> float:
        """Loss of one batch and its gradients, times ``weight``."""
        loss = self.train_fn(self.model, batch) * weight
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("train_fn must return a scalar tensor, the loss of the batch")
        (self.scaler.scale(loss) if scaled and self.scaler is not None else loss).backward()
        return float(loss.detach())

    def feed_last(self) -> Any:
        """The batch of the last step."""
        assert self._feed is not None
        return self._feed.last

    def forget_gradients(self) -> None:
        """Free every gradient."""
        self.model.zero_grad(set_to_none=True)

    def make_theta_optimizer(self) -> Optimizer | None:
        """A fresh Adam for θ, without weight decay; None where the layers update θ themselves."""
        parameters = resurrection_parameters(self.model)
        return torch.optim.Adam(parameters, lr=self.config.resu_lr) if parameters else None

    def free_actives(self) -> None:
        """RESU phase without frozen actives: everything trains, the masks wait."""
        self._free_masks = {name: layer.mask for name, layer in self.layers.items()}
        for layer in self.layers.values():
            if layer.mask is not None:
                layer.remove_mask()

    def merge(self) -> dict[str, Any]:
        """End the RESU phase: dense weights everywhere; returns the masks from before."""
        if self._free_masks is not None:
            masks, self._free_masks = self._free_masks, None
            return masks
        return {name: leave(layer) for name, layer in self.layers.items()}

    # -- resume ------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit: model, optimizer, θ, phase, place in the data, random state."""
        return {
            "format": _FORMAT,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "step": self.step,
            "history": [asdict(stats) for stats in self.history],
            "cycle": None if self._cycle is None else self._cycle.state_dict(),
            "free_masks": None
            if self._free_masks is None
            else {n: None if m is None else m.state_dict() for n, m in self._free_masks.items()},
            "dormant": None if self.dormant is None else self.dormant.state_dict(),
            "feed": self._feed_state if self._feed is None else self._feed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, in a trainer built alike.

        Raises:
            ValueError: If the saved run has another format or other settings.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"trainer state has format {state.get('format')!r}, this version reads {_FORMAT}")
        here = self.config.to_dict()
        different = [
            f"{k}: saved {state['config'].get(k)!r}, here {v!r}" for k, v in here.items() if state["config"].get(k) != v
        ]
        if different:
            raise ValueError("the saved run has other settings; build the trainer alike: " + "; ".join(different))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.history = [CycleStats(**stats) for stats in state["history"]]
        self._free_masks = None
        if state["free_masks"] is not None:
            self._free_masks = {
                n: None if m is None else SparseMask.from_state_dict(m) for n, m in state["free_masks"].items()
            }
        if self.dormant is not None:
            self.dormant.load_state_dict(state["dormant"])
        self._cycle = None
        if state["cycle"] is not None:
            self._cycle = RESUCycle(self, state["cycle"]["cycle"])
            self._cycle.load_state_dict(state["cycle"])
        self._feed, self._feed_state = None, state["feed"]

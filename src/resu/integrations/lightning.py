"""Sparse training in the ``Trainer`` of Lightning: one callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from resu.core.layers import select
from resu.integrations.driving import Recipe, check_zeros, gathered_state, plain_optimizer, release, sparsity_metrics
from resu.training.algorithms.base import Algorithm
from resu.training.sparsifier import Sparsifier
from resu.training.wrappers import unwrap

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError("this needs Lightning: pip install 'resu-torch[lightning]'", name=error.name) from error

__all__ = ["SparsityCallback"]


class SparsityCallback(Callback):
    """Sparse training with Lightning: ``Trainer(…, callbacks=[SparsityCallback(RESU(sparsity=0.9, …))])``.

    The driver is made when training starts, and counts steps of its optimizer. Its state is part of the checkpoints of
    Lightning, as tensors and plain values; a run that resumes by ``fit(ckpt_path=…)`` equals the uninterrupted one bit
    for bit, and ``test(ckpt_path="best")`` brings the masks of the weights it loads. Sparsity and R_s are logged with
    ``pl_module.log``. When training has ended, the masks go on holding: ``callback.sparsifier.commit()`` gives the
    plain model. A second ``fit()`` begins anew, from the weights as they are.

    Works with ``lightning`` and with ``pytorch_lightning``.

    Args:
        algorithm: A topology rule, or a function from the number of optimizer steps (``estimated_stepping_batches``) to
            one.
        optimizer: With several optimizers, the index of the one whose weights are pruned. None: the only one that owns
            weights to prune. For more, give one callback each.
        prefix: Of the names in the logs; callbacks beside each other need different ones.
        **options: ``pattern``, ``distribution``, ``include``, ``exclude``, ``seed``, as of
            :class:`~resu.training.sparsifier.Sparsifier`. Names begin with the attribute of the ``LightningModule``.

    Example:
        >>> from resu.training import RESU
        >>> callback = SparsityCallback(lambda steps: RESU(sparsity=0.9, end_step=steps // 2), exclude="net.head")
    """

    def __init__(
        self,
        algorithm: Algorithm | Callable[[int], Algorithm],
        *,
        optimizer: int | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        self.recipe = Recipe(algorithm, options)
        self.optimizer = optimizer
        self.prefix = prefix
        self._sparsifier: Sparsifier | None = None
        self._loaded: dict[str, Any] | None = None
        self._follows = False

    @property
    def sparsifier(self) -> Sparsifier:
        """The driver; there is none before training starts."""
        if self._sparsifier is None:
            raise RuntimeError("there is no sparsifier yet: it is made when training starts, with the optimizer")
        return self._sparsifier

    @property
    def state_key(self) -> str:
        """Where the state lies in a checkpoint."""
        return self._generate_state_key(optimizer=self.optimizer, prefix=self.prefix)

    # -- events --------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before anything is loaded: let go of an earlier run when a new one begins."""
        self._loaded = None
        if stage == "fit":
            release(self._sparsifier)
        # Weights that are loaded to be tested are ours, if the module is: the masks go with them.
        driver = self._sparsifier
        holds = driver is not None and not driver.committed and driver.model is unwrap(pl_module)
        self._follows = stage != "fit" and holds

    def state_dict(self) -> dict[str, Any]:
        """That of the driver; Lightning asks on every rank."""
        return {} if self._sparsifier is None else gathered_state(self._sparsifier)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizer is there."""
        if self._follows:
            self.sparsifier.load_state_dict(state_dict)
        else:
            self._loaded = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the driver; model and optimizers are there, and loaded if training resumes."""
        saved, self._loaded = self._loaded, None
        if saved is None and trainer.ckpt_path is not None:
            raise ValueError(
                f"training resumes from {trainer.ckpt_path}, which holds no state of this callback "
                f"({self.state_key}): it was written without it, or with weights alone; load its weights into the "
                "model and start a new run"
            )
        optimizers = [plain_optimizer(optimizer) for optimizer in trainer.optimizers]
        chosen, include = self._choose(pl_module, optimizers)
        options = self.recipe.options if include is None else {**self.recipe.options, "include": include}
        recipe = Recipe(self.recipe.algorithm, options)
        self._sparsifier = recipe.make(pl_module, chosen, trainer.estimated_stepping_batches)
        if saved is not None:
            self._sparsifier.load_state_dict(saved)
            check_zeros(self._sparsifier, f"the state in {trainer.ckpt_path}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log; Lightning keeps every ``log_every_n_steps``-th."""
        metrics = sparsity_metrics(self.sparsifier, self.prefix)
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    # -- which optimizer ----------------------------------------------------------------------------
    def _choose(self, pl_module: Any, optimizers: Sequence[Optimizer]) -> tuple[Optimizer, list[str] | None]:
        """The optimizer to follow and, where there are several, the names of its weights."""
        if self.optimizer is not None and not 0 <= self.optimizer < len(optimizers):
            raise ValueError(f"optimizer={self.optimizer} is given, and there are {len(optimizers)}, counted from 0")
        if len(optimizers) == 1:
            return optimizers[0], None
        layers = select(unwrap(pl_module), self.recipe.options.get("include"), self.recipe.options.get("exclude"))
        owned = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
        names = [[n for n, layer in layers.items() if id(layer.weight) in ids] for ids in owned]
        owners = [i for i, found in enumerate(names) if found]
        if self.optimizer is None and len(owners) > 1:
            found = ", ".join(f"{i} ({len(names[i])} weights, {names[i][0]!r} first)" for i in owners)
            raise ValueError(
                f"several optimizers own weights to prune: {found}; give one callback for each that shall, "
                f"SparsityCallback(…, optimizer={owners[0]}, prefix='…'), or leave the others out with exclude"
            )
        index = self.optimizer if self.optimizer is not None else owners[0] if owners else 0
        if not names[index]:
            raise ValueError(f"optimizer {index} owns none of the {len(layers)} selected weights; owners: {owners}")
        return optimizers[index], names[index]

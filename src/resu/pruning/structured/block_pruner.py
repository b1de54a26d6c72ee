"""The pruner of whole blocks: a shallower model, verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.counting import check_sparsity, keep_count, top_k_mask
from resu.core.globs import glob_list
from resu.pruning.structured.block_scores import block_scores
from resu.pruning.structured.blocks import find_blocks, remove_blocks, zero_blocks
from resu.pruning.structured.removal import check_undivided
from resu.pruning.structured.removed import remove_verified
from resu.pruning.structured.result import StructuredResult
from resu.pruning.structured.running import plain_copy
from resu.pruning.structured.target import TARGETS, Reached, meet_target

__all__ = ["BlockPruner"]

_UNIT = "blocks"


class BlockPruner:
    """Takes whole residual blocks out of a model: half of the blocks gone is half of the time, on any runtime.

    A model with fewer channels does fewer multiply-adds, and not as much less time: small layers use vector units
    badly, and norms, activations and sums are as many as before. A model with fewer blocks is faster by what it lacks.

    What can go, and how it is verified, is said in :func:`resu.pruning.structured.blocks.find_blocks`; use it on a
    model before or after :class:`~resu.pruning.structured.pruner.StructuredPruner`, which takes channels.

    Args:
        sparsity: Fraction removed, in [0, 1), of ``target``.
        example_inputs: What the model runs on: a tensor, a tuple of arguments, a dictionary of keyword arguments.
        target: What the sparsity is a fraction of: ``"units"`` (the blocks that can go), ``"parameters"``,
            ``"macs"``, or ``"latency"`` measured on this machine.
        calibration: Batches that blocks are scored on (:func:`resu.pruning.structured.block_scores.block_scores`).
        loss_fn: ``loss_fn(model, batch) -> loss``: blocks are scored by the loss without them; else by their influence.
        include: Globs over modules that may go. Where blocks lie inside of each other this can name the outer ones.
        exclude: Globs over modules that stay.
        seed: Of the inputs that are verified with.
        rtol: Largest difference that verification lets pass, over the largest output.

    Raises:
        TypeError: If a sparsity is no number, or calibration no list of batches.
        ValueError: On an unknown target, a sparsity out of range, or without inputs or calibration.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True) for _ in range(4)]
        >>> model, x = nn.Sequential(*layers), torch.randn(2, 5, 8)
        >>> result = BlockPruner(0.5, x, calibration=[x]).prune(model)
        >>> sorted(left for _, left in result.units.values()), result.macs[0] == 2 * result.macs[1]
        ([0, 0, 1, 1], True)
        >>> result.error < 1e-9
        True
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        example_inputs: Any = None,
        *,
        calibration: Iterable[Any] | None = None,
        target: str = "units",
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        seed: int = 0,
        rtol: float = 1e-9,
    ) -> None:
        if example_inputs is None:
            raise ValueError(
                "blocks are found by running the model; pass example_inputs: a tensor, a tuple of arguments or a "
                "dictionary of keyword arguments"
            )
        if calibration is None:
            raise ValueError("blocks are scored on data; pass calibration: a few batches of real inputs")
        if isinstance(calibration, Tensor):
            raise TypeError("calibration is a list of batches, got one tensor; pass [tensor] if that is the only one")
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        self.sparsity = check_sparsity(sparsity)
        self.example_inputs, self.target = example_inputs, target
        self.calibration, self.loss_fn = list(calibration), loss_fn
        self.include, self.exclude = glob_list(include), glob_list(exclude)
        self.seed, self.rtol = seed, rtol
        self.history: list[dict[str, Any]] = []

    def units(self, model: nn.Module) -> dict[str, int]:
        """The blocks that can go, each with 1."""
        return dict.fromkeys(self._find(model)[0], 1)

    def _find(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        found = find_blocks(
            model, self.example_inputs, include=self.include, exclude=self.exclude, rtol=self.rtol, seed=self.seed
        )
        return list(found.names), found.refused

    def prune(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        sparsity: float | None = None,
        original: Mapping[str, int] | None = None,
        dense: nn.Module | float | None = None,
    ) -> StructuredResult:
        """Remove, in place, the blocks that do least, verified; or nothing.

        Args:
            model: Any module.
            optimizer: Forgets parameters and state of what is removed.
            sparsity: In place of the pruner's own.
            original: The blocks to count the sparsity of, where some went earlier (:meth:`units` of then).
            dense: In the same case, the size of the model (or for latency the model) that the target is a fraction of.

        Returns:
            What was done, with ``undo()``.

        Raises:
            ValueError: If no block can go, or a target is out of reach; nothing has changed then.
            TypeError: If the model cannot be copied; nothing has changed then.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"a pruner prunes a torch.nn.Module, got {type(model).__name__}")
        check_undivided(model)
        names, refused = self._find(model)
        if original:  # where all inner blocks went, the one around them gives its input back too: it was not counted
            names = [name for name in names if name in original]
        if not names and not original:
            reasons = "".join(f"; {name}: {why}" for name, why in list(refused.items())[:5])
            raise ValueError(
                "no block can be removed: none gives its input back once its parameters are zero, as a residual block "
                f"does whose shortcut is the identity{reasons}"
            )
        asked = check_sparsity(self.sparsity if sparsity is None else sparsity)
        scores = block_scores(model, names, self.calibration, loss_fn=self.loss_fn)
        total = len(original or names)

        def kept_at(share: float) -> dict[str, Tensor]:
            return {_UNIT: top_k_mask(scores, min(keep_count(total, share, allow_empty=True), len(names)))}

        def gone_of(kept: Mapping[str, Tensor]) -> list[str]:
            return [name for name, stays in zip(names, kept[_UNIT].tolist(), strict=True) if not stays]

        def shrunk(kept: Mapping[str, Tensor]) -> nn.Module:
            small = plain_copy(model)
            remove_blocks(small, gone_of(kept))
            return small

        if self.target == "units":
            kept: Mapping[str, Tensor] = kept_at(asked)
            reached = Reached("units", asked, 1 - int(kept[_UNIT].sum()) / total)
        else:
            kept, reached = meet_target(
                model,
                self.target,
                asked,
                self.example_inputs,
                kept_at,
                shrunk,
                dense=dense,
                least="one block left of those that can go",
            )
        gone = gone_of(kept)
        done = remove_verified(
            model,
            lambda masked: zero_blocks(masked, gone),
            lambda whole: remove_blocks(whole, gone, optimizer),
            self.example_inputs,
            self.rtol,
        )
        result = StructuredResult(
            units={name: (1, int(name not in gone)) for name in names},
            refused=refused,
            fixed={},
            reached=reached,
            error=done.error,
            parameters=done.parameters,
            macs=done.macs,
            slices={},
            attributes={},
            _removal=done.removal,
        )
        self.history.append(result.report())
        return result

    def __repr__(self) -> str:
        return (
            f"BlockPruner(sparsity={self.sparsity!r}, target={self.target!r}, include={self.include!r}, "
            f"exclude={self.exclude!r}, seed={self.seed})"
        )

"""The structured pruner: removes channels, filters, neurons and heads from any model, and verifies what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.counting import check_sparsity
from resu.core.globs import glob_list
from resu.pruning.importance import importances
from resu.pruning.pruner import pruners
from resu.pruning.structured.choice import group_sparsities, keep_masks
from resu.pruning.structured.groups import Group, Structure, find_structure
from resu.pruning.structured.probe import Usable, check_kept, usable_groups
from resu.pruning.structured.removal import check_undivided, mask_tensors, shrink_tensors
from resu.pruning.structured.removed import remove_verified
from resu.pruning.structured.result import StructuredResult
from resu.pruning.structured.running import plain_copy
from resu.pruning.structured.scores import NORMS, unit_scores
from resu.pruning.structured.slots import slots
from resu.pruning.structured.target import TARGETS, Reached, meet_target

__all__ = ["StructuredPruner"]

_ABOUT = "example_inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments"


@pruners.register("structured")
class StructuredPruner:
    """Takes whole channels, filters, neurons and heads out of a model, so that any runtime is faster without kernels.

    What belongs together is seen by running the model once on ``example_inputs`` and following every index of every
    weight through every operation. Before anything is removed, it is tried on copies in float64, and the smaller model
    must equal the one with the removed channels zeroed (:mod:`resu.pruning.structured.verify`); groups that do not
    are refused, with the reason in the result. An operation that is not known is never guessed at.

    Args:
        sparsity: Fraction removed, in [0, 1), of ``target``; or ``{glob: sparsity}`` over layers, of their units.
        example_inputs: What the model runs on: a tensor, a tuple of arguments, a dictionary of keyword arguments. A
            batch of one will do; multiply-adds and latency are of a pass over them.
        target: What the sparsity is a fraction of: ``"units"`` (channels, neurons, heads), ``"parameters"``,
            ``"macs"``, or ``"latency"`` measured on this machine.
        scope: ``"local"``: each group loses the same fraction. ``"global"``: all units compete, by scores relative to
            the mean of their group.
        importance: ``"l2"``, ``"l1"``, or a registered score (``"taylor"``, ``"wanda"``, …), added up over all weights
            coupled in a unit.
        round_to: Channels left are a multiple of this (8, 16), rounded up: odd counts can be slower than more channels.
        include: Globs over layers to remove outputs of; all layers of a group must be named.
        exclude: Globs over layers whose outputs stay; one layer of a group is enough.
        calibration: Batches, for scores that look at inputs or gradients.
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that look at gradients.
        seed: Of random scores, and of the inputs that are verified with.
        rtol: Largest difference that verification lets pass, over the largest output.

    Raises:
        TypeError: If a sparsity is no number.
        ValueError: On an unknown name, a sparsity out of range, or a target with ``{glob: sparsity}``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
        >>> result = StructuredPruner(0.5, torch.zeros(1, 3, 8, 8)).prune(net)
        >>> result.units, net[0].out_channels, net[1].num_features, net[3].in_channels
        ({'0': (16, 8)}, 8, 8, 8)
        >>> result.error < 1e-9
        True
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.5,
        example_inputs: Any = None,
        *,
        target: str = "units",
        scope: str = "local",
        importance: str = "l2",
        round_to: int = 1,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        calibration: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        seed: int = 0,
        rtol: float = 1e-9,
    ) -> None:
        if example_inputs is None:
            raise ValueError(f"structured pruning runs the model to see what belongs together; pass {_ABOUT}")
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        if scope not in ("local", "global"):
            raise ValueError(f"scope must be 'local' or 'global', got {scope!r}")
        if isinstance(sparsity, Mapping):
            for glob, value in sparsity.items():
                check_sparsity(value, f"sparsity of {glob!r}")
            if target != "units" or scope != "local":
                raise ValueError("{glob: sparsity} is of the units of each layer; it takes no other target or scope")
        else:
            check_sparsity(sparsity)
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to must be a whole number of channels, such as 8, got {round_to!r}")
        if importance not in NORMS:
            try:
                importances[importance]
            except ValueError as error:
                raise ValueError(f"{error}, and here: {', '.join(NORMS)}") from None
        self.sparsity = sparsity
        self.example_inputs = example_inputs
        self.target, self.scope, self.importance, self.round_to = target, scope, importance, round_to
        self.include, self.exclude = glob_list(include), glob_list(exclude)
        self.calibration, self.loss_fn, self.seed, self.rtol = calibration, loss_fn, seed, rtol
        self.history: list[dict[str, Any]] = []

    # -- looking

    def inspect(self, model: nn.Module, *, later: bool = False) -> tuple[Structure, Usable]:
        """What could be removed, tried on copies; the model is not changed.

        Args:
            model: Any module.
            later: Whether units went earlier: that nothing more can go is no error then.
        """
        structure = find_structure(model, self.example_inputs)
        chosen = structure.chosen(self.include, self.exclude, later=later)
        if isinstance(self.sparsity, Mapping):
            chosen = {name: chosen[name] for name in group_sparsities(chosen, self.sparsity)}
        usable = usable_groups(model, structure, chosen, self.example_inputs, rtol=self.rtol, seed=self.seed)
        return structure, usable

    def units(self, model: nn.Module) -> dict[str, int]:
        """``{group name: units}`` of what could be removed from."""
        return {name: len(group) for name, group in self.inspect(model)[1].groups.items()}

    def compute_masks(
        self, model: nn.Module, sparsity: float | None = None, *, within: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Masks of what would go, for whoever prunes with masks; the model is not changed.

        Args:
            model: Any module.
            sparsity: Of units, in place of the pruner's own.
            within: Masks of before: units that they prune go first.

        Returns:
            ``{parameter name: bool mask}``, True = kept, of the weights with two dimensions or more.
        """
        structure, usable = self.inspect(model)
        kept = self._kept(model, usable.groups, sparsity, within=within)
        masks = {}
        for name, dims in structure.slices(model, kept).items():
            tensor = slots(model)[name].tensor
            if tensor.ndim > 1 and isinstance(tensor, nn.Parameter):
                mask = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
                for dim, indices in dims.items():
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device="cpu")
                    gone[indices] = False
                    mask.index_fill_(dim, gone.nonzero().view(-1).to(mask.device), False)
                masks[name] = mask & within[name].to(mask.device) if within and name in within else mask
        return {**(within or {}), **masks}

    def _kept(
        self,
        model: nn.Module,
        groups: Mapping[str, Group],
        sparsity: float | None,
        *,
        original: Mapping[str, int] | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Units kept at a sparsity of units."""
        scores = self._scores(model, groups, within)
        wanted: float | Mapping[str, float] = self.sparsity if sparsity is None else sparsity
        if isinstance(wanted, Mapping):
            wanted = group_sparsities(groups, wanted)
        return keep_masks(groups, scores, wanted, scope=self.scope, round_to=self.round_to, original=original)

    def _scores(
        self, model: nn.Module, groups: Mapping[str, Group], within: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        scores = unit_scores(model, groups, self.importance, self.calibration, loss_fn=self.loss_fn, seed=self.seed)
        for name, group in groups.items() if within else ():
            for (tensor, dim), indices in group.places.items():
                if within and tensor in within:
                    mask = within[tensor].transpose(0, dim).flatten(1).any(1).cpu()
                    scores[name][~mask[indices].any(1)] = -1.0
        return scores

    # -- removing

    def prune(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        sparsity: float | None = None,
        original: Mapping[str, int] | None = None,
        dense: nn.Module | float | None = None,
    ) -> StructuredResult:
        """Remove, in place, what the sparsity says, verified; or nothing.

        Args:
            model: Any module.
            optimizer: Follows: its groups hold the smaller parameters, its state is cut with them.
            sparsity: In place of the pruner's own.
            original: ``{group name: units}`` to count the sparsity of, where some went earlier.
            dense: In the same case, the size of the model (or for latency the model) that the target is a fraction of.

        Returns:
            What was done, with ``undo()``.

        Raises:
            ValueError: If a target is out of reach, a glob matches nothing, nothing can be removed, or scores lack
                their data; nothing has changed then.
            TypeError: If the model cannot be copied, or the optimizer's state not be cut; nothing has changed then.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"a pruner prunes a torch.nn.Module, got {type(model).__name__}")
        check_undivided(model)
        structure, usable = self.inspect(model, later=original is not None)
        if original is not None:  # what is no longer a group has one unit left; what was refused meanwhile has more
            original = {n: k for n, k in original.items() if n in usable.groups or n not in structure.groups}
        elif not usable.groups:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(usable.refused.items())[:5])
            raise ValueError(f"nothing can be removed without changing what the model computes: {reasons}")
        kept, reached = self._plan(model, structure, usable, sparsity, original, dense)
        check = check_kept(
            model, structure, kept, usable.guessed, self.example_inputs, rtol=self.rtol, seed=self.seed + 1
        )
        if not check:
            raise ValueError(f"the smaller model is not the masked one, so nothing was removed: {check.reason}")
        slices = structure.slices(model, kept)
        attributes = structure.attributes(model, kept, usable.guessed)
        done = remove_verified(
            model,
            lambda masked: mask_tensors(masked, slices),
            lambda whole: shrink_tensors(whole, slices, optimizer, attributes=attributes),
            self.example_inputs,
            self.rtol,
        )
        result = StructuredResult(
            units={name: (len(mask), int(mask.sum())) for name, mask in kept.items()},
            refused=usable.refused,
            fixed=structure.fixed,
            reached=reached,
            error=done.error,
            parameters=done.parameters,
            macs=done.macs,
            slices=slices,
            attributes=done.removal.attributes,
            _removal=done.removal,
        )
        self.history.append(result.report())
        return result

    def _plan(
        self,
        model: nn.Module,
        structure: Structure,
        usable: Usable,
        sparsity: float | None,
        original: Mapping[str, int] | None,
        dense: nn.Module | float | None,
    ) -> tuple[Mapping[str, Tensor], Reached]:
        if self.target == "units":
            kept = self._kept(model, usable.groups, sparsity, original=original)
            counts = {name: len(mask) for name, mask in kept.items()} | dict(original or {})
            total = sum(counts.values())
            left = sum(int(kept[name].sum()) if name in kept else 1 for name in counts)
            asked = self.sparsity if sparsity is None else sparsity
            reached = 1 - left / max(total, 1)
            return kept, Reached("units", reached if isinstance(asked, Mapping) else asked, reached)
        asked = check_sparsity(self.sparsity if sparsity is None else sparsity)  # type: ignore[arg-type]
        scores = self._scores(model, usable.groups)

        def kept_at(share: float) -> dict[str, Tensor]:
            return keep_masks(usable.groups, scores, share, scope=self.scope, round_to=self.round_to)

        def shrunk(kept: Mapping[str, Tensor]) -> nn.Module:
            small = plain_copy(model)
            slices = structure.slices(model, kept)
            shrink_tensors(small, slices, attributes=structure.attributes(model, kept, usable.guessed))
            return small

        return meet_target(model, self.target, asked, self.example_inputs, kept_at, shrunk, dense=dense)

    def __repr__(self) -> str:
        return (
            f"StructuredPruner(sparsity={self.sparsity!r}, target={self.target!r}, scope={self.scope!r}, "
            f"importance={self.importance!r}, round_to={self.round_to!r}, include={self.include!r}, "
            f"exclude={self.exclude!r}, seed={self.seed})"
        )

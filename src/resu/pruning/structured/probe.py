"""Tries each group on a copy before any is chosen from: what cannot be removed right is left out, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.structured.effect import without_effect
from resu.pruning.structured.groups import Group, Structure
from resu.pruning.structured.removal import shrink_tensors
from resu.pruning.structured.verify import Check, verify_removal

__all__ = ["Usable", "check_kept", "usable_groups"]


_NO_EFFECT = (
    "no output depends on some of its weights with the example inputs, so that nothing can be verified; give larger "
    "ones (attention needs more than one token)"
)


@dataclass(frozen=True)
class Usable:
    """Groups that can be removed from.

    Attributes:
        groups: By name.
        guessed: Of these, the ones whose sizes the user's modules hold as attributes, to be set.
        refused: ``{group name: reason}`` of the others.
    """

    groups: dict[str, Group]
    guessed: frozenset[str]
    refused: dict[str, str]


def check_kept(
    model: nn.Module,
    structure: Structure,
    kept: Mapping[str, Tensor],
    guessed: Collection[str],
    inputs: Any,
    *,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Check:
    """Whether the removal of these units gives the masked model."""
    slices = structure.slices(model, kept)
    attributes = structure.attributes(model, kept, guessed)
    return verify_removal(
        model,
        slices,
        inputs,
        shrink=lambda small: shrink_tensors(small, slices, attributes=attributes),
        rtol=rtol,
        seed=seed,
    )


def usable_groups(
    model: nn.Module,
    structure: Structure,
    groups: Mapping[str, Group],
    inputs: Any,
    *,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Usable:
    """Remove some units of every group, on copies: of all at once, and one by one only if that fails.

    Args:
        model: Not changed.
        structure: What was found in it.
        groups: The groups to try.
        inputs: Example inputs.
        rtol: As in :func:`resu.pruning.structured.verify.verify_removal`.
        seed: Of which units, and of the inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    trial = {}
    for name, group in groups.items():
        n = len(group)
        trial[name] = torch.ones(n, dtype=torch.bool, device="cpu")
        trial[name][torch.randperm(n, generator=generator, device="cpu")[: max(1, n // 3)]] = False

    def check(names: Collection[str], guessed: Collection[str]) -> Check:
        some = {name: trial[name] for name in names}
        return check_kept(model, structure, some, guessed, inputs, rtol=rtol, seed=seed)

    refused = dict.fromkeys(without_effect(model, groups, inputs, seed=seed), _NO_EFFECT)
    everything = [name for name in groups if name not in refused]
    for guessed in (everything, []):
        if check(everything, guessed):
            return Usable({name: groups[name] for name in everything}, frozenset(guessed), refused)
    usable: list[str] = []
    held: set[str] = set()
    for name in everything:
        first = check([name], [name])
        second = first if first else check([name], [])
        if second:
            usable.append(name)
            held |= {name} if first else set()
        else:
            refused[name] = first.reason
    if len(usable) > 1 and not check(usable, held):
        together: list[str] = []
        for name in usable:
            outcome = check([*together, name], held)
            if outcome:
                together.append(name)
            else:
                refused[name] = f"together with others: {outcome.reason}"
        usable = together
    return Usable({name: groups[name] for name in usable}, frozenset(held & set(usable)), refused)

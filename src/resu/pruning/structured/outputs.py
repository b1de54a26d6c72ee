"""What a model returns, as tensors that can be compared; and how far two models' are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.trees import leaves

__all__ = ["Check", "comparable", "difference", "output_tensors"]

_ROUNDING = 1e-3  # of the tolerance


@dataclass(frozen=True)
class Check:
    """Whether two models agree.

    Attributes:
        error: Largest difference over the largest output, in float64; infinite where they cannot
            be compared.
        reason: What is wrong; empty if nothing is.
    """

    error: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    def __bool__(self) -> bool:
        return self.ok


def output_tensors(out: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in what a model returns: in tuples, lists, mappings, and attributes of whatever else it may be.

    A dataclass or a distribution holds outputs as a tuple does. What is left out are modules, and caches of
    transformers, which are handed back to the model that made them.

    Example:
        >>> normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
        >>> [tuple(x.shape) for x in output_tensors((torch.zeros(3), normal))]
        [(3,), (2,), (2,)]
    """
    seen = set() if _seen is None else _seen
    for _, leaf in leaves(out):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, (nn.Module, ModuleType, type)) and not _is_cache(leaf):
            seen.add(id(leaf))
            held = {f.name: getattr(leaf, f.name, None) for f in _fields(leaf)} | getattr(leaf, "__dict__", {})
            yield from output_tensors(list(leaf) if isinstance(leaf, (set, frozenset)) else held, seen)


def _fields(leaf: Any) -> Sequence[dataclasses.Field[Any]]:
    return dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()


def _is_cache(leaf: Any) -> bool:
    return type(leaf).__module__.startswith("transformers.cache")


def comparable(out: Any) -> list[Tensor]:
    """The tensors in what a model returns, in float64; complex ones as pairs.

    Example:
        >>> [x.dtype for x in comparable({"a": torch.ones(2), "b": (torch.ones(2, dtype=torch.complex64), None)})]
        [torch.float64, torch.float64]
    """
    return [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double() for x in output_tensors(out)]


def difference(wanted: Sequence[Tensor], got: Sequence[Tensor], rtol: float) -> Check:
    """How far two lists of outputs in float64 are apart.

    Args:
        wanted: Outputs of the reference.
        got: Of the other model.
        rtol: Largest difference allowed, over the largest magnitude of what differs at all in that output. What is
            more than rounding beside that magnitude (a thousandth of ``rtol``) is measured by itself too: a mask that
            is added (-1e9) would dwarf a difference.

    Example:
        >>> wanted = torch.tensor([1.0, 2.0, -1e9]).double()
        >>> difference([wanted], [wanted * (1 + 1e-15)], 1e-9).ok
        True
        >>> difference([wanted], [wanted + 0.1], 1e-9).reason
        'its outputs differ by 1.0e-01 of their size'
    """
    if [x.shape for x in wanted] != [x.shape for x in got]:
        return Check(float("inf"), f"its outputs are {_shapes(got)} in place of {_shapes(wanted)}")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        same = a == b  # values that mask (-1e9, -inf) are among these: they say nothing, and would dwarf what does
        a, b, size = a[~same], b[~same], a[same].abs()
        if not a.numel():
            continue
        if not bool(torch.isfinite(a).all()):
            return Check(float("inf"), "outputs are NaN or infinite, and cannot be compared")
        # Rounding beside a zero is measured by the others, but not by those that mask.
        least = min(1.0, float(size[size > 0].min())) if bool(size.any()) else torch.finfo(torch.float64).tiny
        gaps, sizes = (a - b).abs(), a.abs().clamp_min(least)
        clear = gaps > _ROUNDING * rtol * sizes.max()
        for off in (gaps / sizes.max(), gaps[clear] / sizes[clear]):
            most = float(off.max()) if off.numel() else 0.0
            worst = max(worst, most if most == most else float("inf"))
    return Check(worst, "" if worst <= rtol else f"its outputs differ by {worst:.1e} of their size")


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)

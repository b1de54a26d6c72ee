"""What is trained to repair one pruned weight, and the weight that comes of it; the mask holds by construction.

============  ====================================================  ==========================================
``train``     weight                                                trained
============  ====================================================  ==========================================
``kept``      ``M⊙Φ(v)``, pruned positions exactly +0.0             v, the values at active positions
``theta``     ``M⊙W + Φ(θ)``, active positions bit for bit          θ, the values at pruned positions
``lora``      ``M⊙(W + scale·B·A)``                                 A ``[rank, in]``, B ``[out, rank]``
============  ====================================================  ==========================================

What is trained is float32 or wider and has the size of what it is (a vector of the trained positions, not a weight with
holes), so that the optimizer's state has too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from resu.core.layers import Layer
from resu.core.randomness import derived_generator

__all__ = ["KINDS", "LowRank", "Placed", "Repair", "make_repair"]

KINDS = ("kept", "theta", "lora")


class Repair(Protocol):
    """One weight under repair."""

    @property
    def trained(self) -> list[Tensor]:
        """What an optimizer gets."""

    @property
    def step(self) -> float:
        """How far an optimizer step of learning rate 1 is to move an entry of :attr:`trained`."""

    def weight(self) -> Tensor:
        """The weight as it is now, of the layer's shape and dtype, with gradients for :attr:`trained`."""


@dataclass(frozen=True)
class Placed:
    """Values at some positions of a weight; the others stay.

    Attributes:
        base: The weight before; it is not changed.
        positions: Bool of its shape: what is trained.
        values: ``[positions]``, row-major, float32 or wider.
        step: See :class:`Repair`.
    """

    base: Tensor
    positions: Tensor
    values: Tensor
    step: float

    @property
    def trained(self) -> list[Tensor]:
        return [self.values]

    def weight(self) -> Tensor:
        return self.base.masked_scatter(self.positions, self.values.to(self.base.dtype))


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of a weight under its mask: ``sparse_to_sparse`` of sparse LoRA.

    Attributes:
        layer: The layer, which knows how the weight lies.
        base: The weight before, in its own shape.
        mask: Bool of that shape.
        a: ``[parts, rank, in]``, one part for each matrix of a stack, else 1.
        b: ``[parts, out, rank]``; zeros at the start.
        scale: ``alpha / rank``.
        step: See :class:`Repair`.
    """

    layer: Layer
    base: Tensor
    mask: Tensor
    a: Tensor
    b: Tensor
    scale: float
    step: float

    @property
    def trained(self) -> list[Tensor]:
        return [self.a, self.b]

    def weight(self) -> Tensor:
        shape = self.layer.matrix(self.base).shape
        change = self.layer.unmatrix((self.scale * (self.b @ self.a)).reshape(shape))
        changed = (self.base.to(change.dtype) + change).to(self.base.dtype)
        return changed.masked_fill(~self.mask, 0)


@torch.no_grad()
def make_repair(kind: str, layer: Layer, mask: Tensor, *, rank: int = 16, alpha: float = 32.0, seed: int = 0) -> Repair:
    """A repair that has changed nothing yet: its weight is the layer's, bit for bit.

    Args:
        kind: ``"kept"``, ``"theta"`` or ``"lora"``.
        layer: Its weight is +0.0 at pruned positions.
        mask: Bool of the weight's shape, True = kept.
        rank: Of a low-rank change.
        alpha: Its scale is ``alpha / rank``.
        seed: Of the start values of A (uniform in ±1/√in, as ``nn.Linear`` has them).

    Example:
        >>> from resu.core.layers import select
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> _ = model[0].weight.data.masked_fill_(~mask, 0)
        >>> repair = make_repair("kept", select(model)["0.weight"], mask)
        >>> repair.trained[0].shape, torch.equal(repair.weight(), model[0].weight)
        (torch.Size([3]), True)
    """
    base = layer.weight.detach()
    wide = torch.promote_types(base.dtype, torch.float32)
    kept = base[mask].to(wide)
    size = float(kept.double().square().mean().sqrt()) if kept.numel() else 0.0
    size = size or 1.0  # all zeros: there is no size to go by
    if kind in ("kept", "theta"):
        positions = mask if kind == "kept" else ~mask
        values = kept if kind == "kept" else base[positions].to(wide)
        return Placed(base, positions, values.requires_grad_(), size)
    if kind != "lora":
        raise ValueError(f"what is trained is {', '.join(map(repr, KINDS))}, got {kind!r}")
    parts = int(base.shape[0]) if layer.stacked else 1
    rows = layer.matrix(base).flatten(1)
    inputs, outputs = rows.shape[1], rows.shape[0] // parts
    rank = min(rank, inputs, outputs)
    generator = derived_generator(seed, layer.name, "lora")
    a = torch.rand(parts, rank, inputs, generator=generator, dtype=wide).mul_(2).sub_(1).mul_(inputs**-0.5)
    b = torch.zeros(parts, outputs, rank, dtype=wide)
    scale = alpha / rank
    # A step of B moves each weight by about scale·√rank·rms(A) times its own size, and rms(A) is 1/√(3·in).
    step = size * (3 * inputs) ** 0.5 / (scale * rank**0.5)
    a, b = a.to(base.device).requires_grad_(), b.to(base.device).requires_grad_()
    return LowRank(layer, base, mask, a, b, scale, step)

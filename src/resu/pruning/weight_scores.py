"""Scores of weights that are read from a checkpoint or a ``state_dict``, chunk by chunk where that is possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from resu.core.counting import check_finite
from resu.core.randomness import derived_generator
from resu.pruning.allocation.ranking import lamp_levels
from resu.pruning.cuts import Span
from resu.pruning.importance import Importance, importances
from resu.pruning.importance.magnitude import magnitude
from resu.pruning.statistics import Stats

__all__ = ["CHUNK", "LampScores", "Tensors", "WeightScores", "Weights"]

CHUNK = 1 << 20  # elements handled at a time: what they need stays in the caches


class Weights(Protocol):
    """Tensors by name; :class:`resu.core.shards.Shards` is one."""

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor."""

    def chunks(self, name: str, size: int, span: Span | None = None) -> Iterator[Tensor]:
        """Flat elements in order, at most ``size`` at a time."""


@dataclass(frozen=True)
class Tensors:
    """A ``state_dict`` as :class:`Weights`."""

    tensors: Mapping[str, Tensor]

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU."""
        tensor = self.tensors[name].detach()
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values")
        return tensor.cpu()

    def chunks(self, name: str, size: int, span: Span | None = None) -> Iterator[Tensor]:
        """Flat elements in order, at most ``size`` at a time."""
        flat = self.read(name).reshape(-1)
        first, last = span if span is not None else (0, len(flat))
        for start in range(first, last, size):
            yield flat[start : min(start + size, last)]


@dataclass(frozen=True)
class WeightScores:
    """Scores of the weights ``names`` by one importance; a score that needs statistics is none for it.

    Attributes:
        weights: Where weights come from.
        names: Layers, in their order.
        importance: The score.
        seed: Of random scores; each layer draws from (seed, name).
        transposed: Layers stored ``[in, out]``.
        chunk: Elements handled at a time.
    """

    weights: Weights
    names: Sequence[str]
    importance: Importance
    seed: int = 0
    transposed: frozenset[str] = field(default_factory=frozenset)
    chunk: int = CHUNK

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each layer."""
        return {name: self.weights.shape(name).numel() for name in self.names}

    @property
    def local(self) -> bool:
        """Whether a score depends on its own weight alone: so it is with magnitude; of others it is not known."""
        return self.importance.score is magnitude and importances["magnitude"] is self.importance

    def matrix_shape(self, name: str) -> torch.Size:
        """The shape in which scores and patterns see a weight: ``[out, in…]``; a stack as ``[experts*out, in]``."""
        shape = self.weights.shape(name)
        rows = matrix_rows(name, shape, name in self.transposed)
        if rows is None:
            return shape[::-1] if name in self.transposed else shape
        return torch.Size((math.prod(shape[:-2]) * rows, shape[-2] if name in self.transposed else shape[-1]))

    def whole(self, name: str) -> Tensor:
        """Scores of a layer in the shape of :meth:`matrix_shape`.

        Raises:
            ValueError: On NaN or infinite weights or scores (the layer is named).
        """
        weight = self.weights.read(name)
        check_finite(weight, repr(name))
        if name in self.transposed:
            weight = weight.transpose(-1, -2)
        weight = weight.reshape(self.matrix_shape(name))
        try:
            scores = self.importance(weight, Stats(generator=derived_generator(self.seed, name)))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        check_finite(scores, f"scores of {name!r}")
        return scores

    def stored(self, name: str, x: Tensor) -> Tensor:
        """From :meth:`matrix_shape` back to the shape of the weight as it is stored."""
        shape = self.weights.shape(name)
        if name not in self.transposed:
            return x.reshape(shape)
        return x.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()

    def of_chunk(self, weight: Tensor) -> Tensor:
        """Scores of flat weights, where a score is local."""
        return self.importance(weight.view(1, -1)).view(-1)

    def chunks(self, name: str, span: Span | None = None) -> Iterator[Tensor]:
        """Flat scores in the order in which the weight is stored."""
        if not self.local:
            yield self.stored(name, self.whole(name)).reshape(-1)
            return
        for weight in self.weights.chunks(name, self.chunk, span):
            yield self.of_chunk(weight)


@dataclass(frozen=True)
class LampScores:
    """What ``distribution="lamp"`` ranks: the LAMP values of a layer's scores, for counting, so in no order."""

    scores: WeightScores
    local: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each layer."""
        return self.scores.sizes

    def chunks(self, name: str, span: Span | None = None) -> Iterator[Tensor]:
        """All values of a layer, float64."""
        values, reaching = lamp_levels(name, self.scores.whole(name))
        counts = torch.from_numpy(reaching).diff(append=torch.zeros(1, dtype=torch.int64)).neg_()
        yield torch.from_numpy(values).repeat_interleave(counts)


def matrix_rows(name: str, shape: torch.Size, transposed: bool) -> int | None:
    """Rows of each matrix where a weight is a stack, ``[experts, out, in]`` or transposed; None where it is none.

    A 3-D weight is one, unless its name says "conv".
    """
    if transposed:
        return shape[-1] if len(shape) > 2 else None
    return shape[1] if len(shape) == 3 and "conv" not in name.lower() else None

"""Which indices must go together: a union-find over all indices of all tensors of a model.

Every index of every dimension of every parameter starts as a unit of its own. Where an operation lets two meet (the
channels of two branches that are added, the rows of one layer and the columns of the next) they become one; where it
reads one in a way that a removal would change, the unit is fixed, with the reason.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["NONE", "Units", "varying"]

NONE = 0  # the label of an index that belongs to nothing that could be removed


def varying(labels: Tensor) -> tuple[int, ...]:
    """Dimensions along which labels differ; they have size 1 in all others."""
    return tuple(d for d, n in enumerate(labels.shape) if n > 1)


class Units:
    """Labels, what is united, what is fixed.

    Example:
        >>> units = Units()
        >>> a, b = units.new(3), units.new(3)
        >>> units.unite(a, b, "added")
        >>> units.fix(b[:1], "read")
        >>> units.roots(a).tolist() == units.roots(b).tolist(), units.reason(int(a[0])), units.reason(int(a[1]))
        (True, 'read', None)
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)  # of more labels than are given out, so that it grows seldom
        self._size = 1
        self._reasons: dict[int, str] = {}

    def new(self, n: int) -> Tensor:
        """Labels of ``n`` new units, ``[n]``."""
        first, have = self._size, len(self._parent)
        self._size += n
        if self._size > have:
            self._parent = np.concatenate([self._parent, np.arange(have, max(self._size, 2 * have))])
        return torch.from_numpy(np.arange(first, self._size))

    def roots(self, labels: Tensor) -> Tensor:
        """The label that stands for each one's unit."""
        ids = labels.numpy()
        found = self._parent[ids]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        self._parent[ids] = found  # a shorter way the next time
        return torch.from_numpy(found)

    def reason(self, label: int) -> str | None:
        """Why a unit is fixed; None if it is not."""
        return self._reasons.get(self._root(label))

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Make one unit of each pair; of a label and ``NONE``: fix it, for ``reason``."""
        a, b = torch.broadcast_tensors(self.roots(a), self.roots(b))
        differ = a != b
        if not bool(differ.any()):
            return
        pairs = torch.unique(torch.stack([a[differ], b[differ]]), dim=1)
        for x, y in zip(*pairs.tolist(), strict=True):
            self._join(x, y, reason)

    def tie(self, labels: Tensor, dims: tuple[int, ...], reason: str) -> Tensor:
        """Make one unit of all that differ along ``dims`` only; the labels then, of size 1 there."""
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.unite(labels, first, reason)
        return self.roots(first)

    def fix(self, labels: Tensor, reason: str) -> None:
        """These cannot be removed."""
        for label in torch.unique(self.roots(labels)).tolist():
            if label != NONE:
                self._reasons.setdefault(self._root(label), reason)

    def compact(self, labels: Tensor) -> Tensor | None:
        """Roots, of size 1 along each dimension where they do not differ; None where nothing is labelled.

        What is one unit throughout cannot lose an index, so it is fixed, and not labelled any more.
        """
        labels = self.roots(labels)
        for dim, n in enumerate(labels.shape):
            if n > 1:
                first = labels.narrow(dim, 0, 1)
                if bool((labels == first).all()):
                    labels = first
        if labels.numel() > 1:
            return labels
        if labels.numel():
            self.fix(labels, "all of a dimension goes together")
        return None

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = int(parent[label])
        return label

    def _join(self, x: int, y: int, reason: str) -> None:
        x, y = self._root(x), self._root(y)
        if x == y:
            return
        if NONE in (x, y):
            self._reasons.setdefault(max(x, y), reason)
            return
        low, high = min(x, y), max(x, y)
        self._parent[high] = low
        if high in self._reasons:
            self._reasons.setdefault(low, self._reasons.pop(high))

"""Where the arguments of blocks come from: one forward pass is watched, and tensors are known by identity."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.inputs import padding_masks
from resu.pruning.trees import Path, leaves, map_leaves

__all__ = ["Const", "Recorder", "Slot", "signature"]


@dataclass(frozen=True)
class Slot:
    """An argument that is captured before block ``block`` (``kind`` "in") or comes out of it ("out")."""

    kind: str
    block: int
    path: Path


@dataclass(frozen=True)
class Const:
    """An argument that is the same for every batch of its kind."""

    value: Any


def signature(batch: Any) -> str:
    """What may change the way a batch takes through a model: shapes, dtypes, and whether there is padding."""
    kinds = [
        f"{path}:{tuple(x.shape)}:{x.dtype}" if isinstance(x, Tensor) else f"{path}:{x!r}" for path, x in leaves(batch)
    ]
    return " ".join([*kinds, *padding_masks(batch)])


@dataclass
class Recorder:
    """Watches the blocks of one container during one forward pass."""

    blocks: Sequence[str]
    order: list[int] = field(default_factory=list)
    templates: dict[int, Any] = field(default_factory=dict)
    captures: set[int] = field(default_factory=set)
    mutates: bool = False
    _given: list[tuple[Tensor, Slot]] = field(default_factory=list)
    _made: list[tuple[weakref.ref[Tensor], Slot]] = field(default_factory=list)
    _plain: dict[Path, tuple[Any, Slot]] = field(default_factory=dict)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def before(self, block: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        place = len(self.order)  # blocks count in the order in which they run
        self.order.append(block)
        call = (tuple(args), dict(kwargs))
        self.templates[place] = map_leaves(partial(self._origin, place), call)
        self._versions = [(x, x._version) for _, x in leaves(call) if isinstance(x, Tensor) and not x.is_inference()]

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.mutates |= any(x._version != version for x, version in self._versions)
        self._versions = []
        place = len(self.order) - 1
        for path, x in leaves(output):
            if isinstance(x, Tensor):
                self._made.append((weakref.ref(x), Slot("out", place, path)))

    def _origin(self, place: int, path: Path, x: Any) -> Slot | Const:
        if isinstance(x, nn.Parameter):
            return Const(x)
        if isinstance(x, Tensor):
            known = next((slot for made, slot in reversed(self._made) if made() is x), None)
            known = known or next((slot for given, slot in self._given if given is x), None)
            if known is None:
                known = Slot("in", place, path)
                self._given.append((x, known))
                self.captures.add(place)
            return known
        if path in self._plain and _same(self._plain[path][0], x):
            return self._plain[path][1]
        if place == 0:
            self._plain[path] = (x, Slot("in", 0, path))
            self.captures.add(0)
            return self._plain[path][1]
        return Const(x)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and a == b

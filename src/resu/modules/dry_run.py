"""The memory of a program that is never run: its tensors have shapes and lifetimes, and no data.

Within :func:`dry_run` every tensor is a fake one of torch (a CPU tensor in all it says, a meta tensor in what it
holds). Operators, autograd, checkpointing, hooks and optimizers run as they are, and each storage is followed from the
operator that makes it to the moment the last tensor lets go of it. So the peak is that of the real program, not of a
formula about it: building a model of 7 B weights and making a training step takes seconds and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resu.modules.temporaries import temporaries

__all__ = ["DryRun", "dry_run"]

# Reading a value out of a tensor: there is none, and 1 (or True) is what a program gets.
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
# Optimizer steps in one operator, in place; they have no version without data.
_FUSED = ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_")


class DryRun(TorchDispatchMode):
    """Follows storages; made by :func:`dry_run`.

    Attributes:
        held: Bytes of all tensors there are now.
        peak: The most since the start, or since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> int:
        """Let the peak begin anew from what is held now, which is returned."""
        self.peak = self.held
        return self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and take note of what it made."""
        if func in _READS:
            return 1.0 if func is _READS[0] and args[0].dtype.is_floating_point else True
        if func.overloadpacket.__name__ in _FUSED:
            return None
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        if func.namespace == "resu":
            self.peak = max(self.peak, self.held + temporaries(func, args))
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.held -= size

        self._known[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """A block in which tensors have no data, and what they would hold is counted.

    Everything has to be made in the block: models, inputs, optimizers. A program that decides by values reads 1 or True
    from every tensor; masks cannot be found by values (:mod:`resu.modules.dry_layers`). What operators of torch need
    inside is not counted (little, where it was measured); what this library's do is. NumPy's working memory is not.

    Example:
        >>> with dry_run() as run:
        ...     layer = torch.nn.Linear(10_000, 10_000, bias=False)
        ...     layer(torch.ones(8, 10_000)).sum().backward()
        >>> run.held  # weight and gradient
        800000000
    """
    # Imported late: it brings a good part of the compiler with it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    # ``Module.to()`` exchanges fake parameters by this, which refuses those that anything has a weak reference to.
    exchange = torch.utils.swap_tensors
    torch.utils.swap_tensors = _take_data
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), DryRun() as run:
            yield run
    finally:
        torch.utils.swap_tensors = exchange


def _take_data(tensor: Tensor, other: Tensor) -> None:
    tensor.data = other.detach()

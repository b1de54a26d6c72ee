"""Other weights in a model for a while: those of the dense model, or those of a block that lies on disk.

A parameter stays the same object; only its memory is exchanged, and given back afterwards. So a model whose blocks have
no memory of their own (:func:`without_memory`) runs block by block with what is read for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Lending", "Read", "without_memory"]

# A tensor of the model by its name, or None where the model's own stays.
Read = Callable[[str], Tensor | None]


class Lending:
    """Lends a model the weights that ``read`` gives: those outside of its blocks at once, a block's while it runs.

    Args:
        model: Any module.
        blocks: Names of modules that are lent to one at a time; none inside of another.
        read: ``read(name) -> tensor``: of the parameter's shape and dtype. It is not written to, unless what runs does.

    Raises:
        ValueError: If what is read has another shape than the model's.
    """

    def __init__(self, model: nn.Module, blocks: Collection[str], read: Read) -> None:
        self.model, self.read = model, read
        self.blocks = {name: model.get_submodule(name) for name in blocks}
        inside = {id(t) for block in self.blocks.values() for _, t in _tensors(block)}
        self._names: dict[int, list[str]] = {}
        for name, tensor in _tensors(model):
            self._names.setdefault(id(tensor), []).append(name)
        outside = {id(t): t for _, t in _tensors(model) if id(t) not in inside}
        self._outside = [(t, new) for t in outside.values() if (new := self._new(t)) is not None]

    def _new(self, tensor: Tensor) -> Tensor | None:
        for name in self._names[id(tensor)]:  # of tied weights one is stored
            found = self.read(name)
            if found is None:
                continue
            if found.shape != tensor.shape:
                raise ValueError(
                    f"{name!r} is {tuple(found.shape)} in one model and {tuple(tensor.shape)} in the other"
                )
            return found.detach().to(tensor.dtype)
        return None

    @contextmanager
    def lent(self, here: str | None = None) -> Iterator[None]:
        """The model can run; ``here`` has its weights from now on, other blocks while they run."""
        with ExitStack() as stack:
            _exchange(stack, [(tensor, new) for tensor, new in self._outside])
            around = [name for name in self.blocks if here is not None and f"{here}.".startswith(f"{name}.")]
            if here is not None:
                # A part of a block comes with all of it: what runs before the part in it is needed too.
                _exchange(stack, self._of(self.model.get_submodule(around[0] if around else here)))
            for name, block in self.blocks.items():
                if name not in around and (here is None or not name.startswith(f"{here}.")):
                    self._on_call(stack, block)
            yield

    def weights(self, block: str) -> dict[str, Tensor]:
        """What a block would be lent, by names inside of it; of tied weights by the first."""
        named: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in _tensors(self.model.get_submodule(block)):
            named.setdefault(id(tensor), (name, tensor))
        return {name: new for name, tensor in named.values() if (new := self._new(tensor)) is not None}

    def _of(self, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        tensors = {id(t): t for _, t in _tensors(module)}
        return [(t, new) for t in tensors.values() if (new := self._new(t)) is not None]

    def _on_call(self, stack: ExitStack, block: nn.Module) -> None:
        present = stack.enter_context(ExitStack())

        def come(module: nn.Module, args: Any) -> None:
            present.close()
            _exchange(present, self._of(module))

        def go(module: nn.Module, args: Any, output: Any) -> None:
            present.close()

        stack.callback(block.register_forward_pre_hook(come).remove)
        stack.callback(block.register_forward_hook(go, always_call=True).remove)


def _exchange(stack: ExitStack, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, new in pairs:
        stack.callback(setattr, tensor, "data", tensor.data)
        tensor.data = new.to(tensor.device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def without_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype on the CPU that takes the memory of one number; its values mean nothing.

    Example:
        >>> absent = without_memory(torch.empty(4096, 4096, device="meta"))
        >>> tuple(absent.shape), absent.untyped_storage().nbytes()
        ((4096, 4096), 4)
    """
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)

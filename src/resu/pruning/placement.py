"""Moves parts of a model to the device that computes, for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.trees import map_leaves

__all__ = ["Placement", "outer_items"]


class Placement:
    """Where things are computed and where they are kept.

    Args:
        model: The model; its parameters stay the same objects, and at the end lie in the same memory as before.
        device: Where to compute; None: where the model is.
        blocks: Modules that are moved one at a time while the whole model runs.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None, blocks: Collection[str] = ()) -> None:
        self.model = model
        home = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.device = home if device is None else torch.device(device)
        if self.device.type == "meta":
            raise ValueError("nothing can be computed on the meta device; give 'cpu' or 'cuda'")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device {str(self.device)!r} is asked for, and torch sees no CUDA device; leave device out"
            )
        self.blocks = tuple(blocks)

    @contextmanager
    def here(self, *modules: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[None]:
        """``modules`` on the device; back home, with what was written to the parameters, at the end."""
        outside = {id(t) for module in without for t in _tensors(module)}
        moved: list[tuple[Tensor, Tensor]] = []
        try:
            for tensor in dict.fromkeys(t for module in modules for t in _tensors(module)):
                if self._is_away(tensor) and id(tensor) not in outside:
                    # The object stays, and with it ties, optimizers and names; only its memory is lent.
                    moved.append((tensor, tensor.data))
                    tensor.data = self._copied(tensor.data)
            yield
        finally:
            with torch.no_grad():
                for tensor, home in moved:
                    home.copy_(tensor.data)
                    tensor.data = home

    @contextmanager
    def all(self) -> Iterator[None]:
        """The whole model runs on the device, its blocks one at a time."""
        blocks = [self.model.get_submodule(name) for name in self.blocks]
        with ExitStack() as stack:
            stack.enter_context(self.here(self.model, without=blocks))
            present = stack.enter_context(ExitStack())
            if any(self._is_away(t) for block in blocks for t in _tensors(block)):

                def come(module: nn.Module, args: Any) -> None:
                    present.enter_context(self.here(module))

                def go(module: nn.Module, args: Any, output: Any) -> None:
                    present.close()

                for block in blocks:
                    stack.callback(block.register_forward_pre_hook(come).remove)
                    stack.callback(block.register_forward_hook(go, prepend=True).remove)
            yield

    @property
    def moves(self) -> bool:
        """Whether anything has to be moved."""
        return any(self._is_away(t) for t in _tensors(self.model))

    def _is_away(self, tensor: Tensor) -> bool:
        return tensor.device != self.device

    def _copied(self, data: Tensor) -> Tensor:
        return data.to(self.device)

    def lent(self, tree: Any) -> Any:
        """Tensors of a tree on the device."""
        return map_leaves(lambda _, x: x.to(self.device) if isinstance(x, Tensor) else x, tree)

    def kept(self, x: Any) -> Any:
        """A tensor where it waits until it is needed: in main memory."""
        return x.detach().cpu() if isinstance(x, Tensor) else x


def outer_items(model: nn.Module) -> list[str]:
    """Items of the outermost containers: what may be moved one at a time before the blocks are known."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name == item or name.startswith(f"{item}.") for item in found)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not inside:
            found += [f"{name}.{child}" if name else child for child, _ in module.named_children()]
    return found


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]

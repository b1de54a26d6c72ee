"""Optimizer steps that bring their own backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["after_backward"]


def after_backward(args: Any, kwargs: Any, act: Callable[[], None]) -> tuple[Any, Any] | None:
    """Have ``act`` called between the backward pass and the update of an optimizer step.

    Without a closure the gradients are there when the step begins, and it acts now. With one they come only when the
    optimizer calls it, maybe several times (LBFGS): then the closure is replaced by one that acts after each call.

    Args:
        args: Positional arguments of the step as a pre-step hook gets them, the optimizer first.
        kwargs: Its other arguments.
        act: What to do; called without gradients being recorded.

    Returns:
        The arguments for the step if they have to be others, as a pre-step hook returns them.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        act()
        return None

    def watched() -> Any:
        loss = closure()
        with torch.no_grad():
            act()
        return loss

    return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

"""What a score is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.registry import Registry

__all__ = ["Importance", "Stats", "importances", "register_importance"]

_NEEDS = frozenset({"inputs", "grads", "hessian"})


@dataclass(frozen=True)
class Stats:
    """What is known of one layer beside its weight; what was not collected is None.

    Attributes:
        grad: Gradient of the loss, of the weight's shape.
        grad_squared: Mean of the squared gradients, of the weight's shape.
        input_norm: L2 norm of each input column over all tokens, fp32: ``[in]`` (``[in, kh, kw]`` for a
            convolution).
        hessian: ``[in, in]``, ``(2/n) Σ x xᵀ``.
        generator: For scores that draw.
    """

    grad: Tensor | None = None
    grad_squared: Tensor | None = None
    input_norm: Tensor | None = None
    hessian: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Importance:
    """A score by name: ``(weight, stats) -> scores``, higher = keep."""

    name: str
    function: Callable[[Tensor, Stats], Tensor]
    needs: frozenset[str]

    def __call__(self, weight: Tensor, stats: Stats | None = None) -> Tensor:
        """Scores of the weight's shape.

        Raises:
            ValueError: If a statistic the score needs is missing.
        """
        stats = stats or Stats()
        if "grads" in self.needs and stats.grad is None and stats.grad_squared is None:
            raise ValueError(
                f"importance {self.name!r} needs gradients and there are none; run loss.backward() before scoring "
                "(and zero_grad only after it), or pass batches to collect them"
            )
        if "inputs" in self.needs and stats.input_norm is None:
            raise ValueError(
                f"importance {self.name!r} needs input norms and there are none; collect them from calibration "
                "batches first"
            )
        if "hessian" in self.needs and stats.hessian is None:
            raise ValueError(f"importance {self.name!r} needs the Hessian of the inputs; collect it first")
        return self.function(weight, stats)


importances: Registry[Importance] = Registry("importance")


def register_importance(
    name: str, *, needs: set[str] | frozenset[str] | tuple[str, ...] = (), replace: bool = False
) -> Callable[[Callable[[Tensor, Stats], Tensor]], Callable[[Tensor, Stats], Tensor]]:
    """Decorator: make ``(weight, stats) -> scores`` known under ``name`` wherever a method name is taken.

    Args:
        name: The name.
        needs: Which statistics it reads, of ``"inputs"``, ``"grads"``, ``"hessian"``.
        replace: Allow replacing a name that is taken.

    Example:
        >>> @register_importance("squared", replace=True)
        ... def squared(weight, stats):
        ...     return weight**2
        >>> importances["squared"](torch.tensor([-3.0]))
        tensor([9.])
    """
    unknown = set(needs) - _NEEDS
    if unknown:
        raise ValueError(f"unknown needs {sorted(unknown)}; known: {', '.join(sorted(_NEEDS))}")

    def add(function: Callable[[Tensor, Stats], Tensor]) -> Callable[[Tensor, Stats], Tensor]:
        importances.register(name, replace=replace)(Importance(name, function, frozenset(needs)))
        return function

    return add

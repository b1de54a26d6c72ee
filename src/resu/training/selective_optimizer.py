"""The update rule of QRESU-Selective as an optimizer, for θ that is an ordinary parameter (the PEFT methods)."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch.optim import Optimizer

from resu.core.selective import SelectionConfig, selective_update_

__all__ = ["Selective"]


class Selective(Optimizer):
    """Moves only coordinates whose gradient is large and keeps its sign (:mod:`resu.core.selective`).

    Each parameter is selected from on its own, and its coordinates that are not selected keep their bits. State: two
    moving averages in float32 (float64 for float64), 8 bytes per value. A gradient with NaN or infinities changes
    nothing. Under :func:`resu.training.update_in_backward.optimizer_in_backward` no gradient outlives the backward pass
    of its layer; that is what mode QRESU_SELECTIVE of :class:`resu.modules.linear.RESULinear` does, bit for bit.

    Args:
        params: What a ``torch.optim`` optimizer takes; the θ of adapters.
        lr: Step size.
        weight_decay: Decay of selected coordinates.
        config: How coordinates are selected.

    Raises:
        ValueError: If ``lr`` or ``weight_decay`` is negative or not finite.

    Example:
        >>> theta = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = Selective([theta], lr=1.0, config=SelectionConfig(k_select_ratio=0.5))
        >>> theta.grad = torch.tensor([1.0, -3.0, 0.5, 2.0])
        >>> optimizer.step()
        >>> theta.data
        tensor([ 0.0000,  3.0000,  0.0000, -2.0000])
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0, config: SelectionConfig | None = None
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")
        # Plain numbers in the groups: a saved state is read without unpickling.
        chosen = config or SelectionConfig()
        settings = {name: getattr(chosen, name) for name in SelectionConfig.__dataclass_fields__}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            config = SelectionConfig(**{name: group[name] for name in SelectionConfig.__dataclass_fields__})
            for theta in group["params"]:
                grad = theta.grad
                if grad is None or not bool(torch.isfinite(grad).all()):
                    continue
                state = self.state[theta]
                if not state:
                    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
                    state["theta_m"] = torch.zeros_like(theta, dtype=wide)
                    state["theta_v"] = torch.zeros_like(theta, dtype=wide)
                selective_update_(
                    theta.view(-1), grad.reshape(-1), state["theta_m"].view(-1), state["theta_v"].view(-1), config,
                    float(group["lr"]), float(group["weight_decay"]),
                )  # fmt: skip
        return result

"""AdamW with its two moments in eight bits, for parameters of any size and dtype.

The block-wise idea is that of 8-bit optimizers (Dettmers et al., arXiv 2110.02861, section 2): moments are scaled by
the largest of each 256 values and kept as one byte. Four things are as θ of resurrection wants them. Any number of
values is taken, where torchao leaves the state of a tensor in float32 unless 256 divides its size, and θ has as many
values as are pruned. A byte of 0 is the value 0, at the position of its weight, so that state is cleared position by
position. Moments are rounded up or down at random so that their mean is kept: a second moment moves by a thousandth of
itself in a step, less than a byte can tell, and rounded to nearest it would stand still. And bfloat16 weights are
rounded like that too, for they ignore every step below 1/256 of themselves. The draws depend on the seed, the step and
the place in the parameter alone, so a resumed run is the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.randomness import derived_seed
from resu.core.sharding import largest_part, local, shard_beside, shard_like

__all__ = ["BLOCK", "CHUNK", "AdamW8bit", "dequantize_moment", "forget_draws", "quantize_moment"]

#: Values that share a scale.
BLOCK = 256
#: Values handled at a time, so that what a step needs beside the state stays small, and in the processor's cache.
CHUNK = 1 << 16
# What is drawn for one step, by device: every part of every parameter uses the same. Parts are rounded alike then, and
# each value still keeps its mean.
_drawn: dict[torch.device, tuple[tuple[int, int], Tensor]] = {}


def quantize_moment(values: Tensor, noise: Tensor | None = None, *, signed: bool) -> tuple[Tensor, Tensor]:
    """A moment as bytes: ``x ≈ s·sign(c)·(c/127)²`` for the first, ``x ≈ s·(c/255)⁴`` for the second.

    The powers spread the codes over many orders of magnitude. A second moment above 0 has at least the code 1: it is
    divided by.

    Args:
        values: float32 ``[n]``.
        noise: Uniform in [0, 1), ``[n]``: each value becomes one of the two codes around it, with probabilities that
            keep its mean. None: the nearer one of the two codes' roots.
        signed: Whether it is the first moment; the second is not negative.

    Returns:
        ``(codes, scales)``: int8 or uint8 ``[n]``, and ``s``, float32 ``[ceil(n / 256)]``, the largest of each block.

    Example:
        >>> codes, scales = quantize_moment(torch.tensor([1.0, -0.25, 0.0]), signed=True)
        >>> codes, dequantize_moment(codes, scales)[0]
        (tensor([127, -64,   0], dtype=torch.int8), tensor(1.))
    """
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=1) if signed else blocks.amax(dim=1)
    # Shares of the largest; the smallest normal number instead of 0: 0 / it is 0.
    shares = blocks * scales.clamp_min(torch.finfo(torch.float32).tiny).reciprocal_().clamp_max_(3e38)[:, None]
    shares = shares.abs_().view(-1)[: values.numel()]
    top = 127 if signed else 255
    codes = (shares.sqrt() if signed else shares.sqrt().sqrt_()).mul_(top)
    if noise is None:
        codes.round_()
    else:
        # Up where noise · (above - below) < value - below, all in units of the lowest code.
        codes.floor_().clamp_(max=top - 1)
        below, above = codes * codes, (codes + 1).square_()
        if not signed:
            below.square_()
            above.square_()
        gap = above.sub_(below).mul_(noise)
        codes += gap < (shares * top ** (2 if signed else 4)).sub_(below)
    if signed:
        return codes.copysign_(values).to(torch.int8), scales
    return torch.maximum(codes, (shares > 0).to(codes.dtype)).to(torch.uint8), scales


def dequantize_moment(codes: Tensor, scales: Tensor) -> Tensor:
    """Inverse of :func:`quantize_moment`, up to its rounding: float32 ``[n]``."""
    shares = _blocks(codes.to(torch.float32))
    if codes.dtype == torch.int8:
        shares = shares.abs().mul_(shares).mul_(127**-2)
    else:
        shares = shares.square_().square_().mul_(255**-4)
    return shares.mul_(scales[:, None]).view(-1)[: codes.numel()]


def _blocks(values: Tensor) -> Tensor:
    """``[ceil(n / 256), 256]``, filled up with zeros."""
    short = -values.numel() % BLOCK
    return (torch.nn.functional.pad(values, (0, short)) if short else values).view(-1, BLOCK)


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with moments in 8 bits: 2.03 bytes of state per value.

    Args:
        params: As of any optimizer of torch; real floating tensors. Of one that is sharded over its first dimension
            (``fully_shard``) each rank updates its part, whose blocks are its own.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        seed: Of what is rounded at random: moments, and bfloat16 parameters.

    Raises:
        ValueError: On a value out of range.
        TypeError: Later, in ``step()``: on sparse gradients, complex parameters, or others that are sharded.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = AdamW8bit([weight], lr=1e-2, weight_decay=0.0)
        >>> (weight.float().square().sum() / 2).backward()
        >>> optimizer.step()
        >>> round(weight.detach().float().mean().item(), 2)
        0.99
        >>> sum(t.nbytes for t in optimizer.state[weight].values() if torch.is_tensor(t))
        2032
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        self._seed = seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; in parts of 2¹⁶ values (2¹⁸ on accelerators), so that beside the state it needs about three
        megabytes (twelve).
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; codes stay codes (torch would cast them to the parameter's dtype)."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                held = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameter][name] = held

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            _check(parameter, grad)
            state["step"] = 0
            for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                codes = torch.zeros(local(parameter).shape, dtype=dtype, device=parameter.device)
                scales = torch.zeros(-(-largest_part(parameter) // BLOCK), device=parameter.device)
                state[name] = shard_like(codes, parameter)
                state[f"{name}_scale"] = shard_beside(scales, parameter)
        state["step"] += 1
        here = local(parameter).detach()
        flat = here.reshape(-1)  # a copy if it is not contiguous
        flat_grad = local(grad).reshape(-1)
        first, second = local(state["exp_avg"]).view(-1), local(state["exp_avg_sq"]).view(-1)
        scales_here = local(state["exp_avg_scale"]), local(state["exp_avg_sq_scale"])
        noise = _noise(self._seed, state["step"], parameter.device)
        size = noise.shape[1]
        for start in range(0, flat.numel(), size):
            stop = min(start + size, flat.numel())  # another rank's part may have more blocks
            part, blocks = slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))
            pair = scales_here[0][blocks], scales_here[1][blocks]
            values = flat[part].to(torch.float32, copy=True)
            _adamw(values, flat_grad[part].float(), first[part], second[part], pair, state["step"], group, noise[:2])
            flat[part].copy_(_rounded(values, noise[2]) if parameter.dtype is torch.bfloat16 else values)
        if flat.data_ptr() != here.data_ptr():
            here.copy_(flat.view(here.shape))


def _adamw(
    values: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scales: tuple[Tensor, Tensor],
    step: int,
    group: dict[str, Any],
    noise: Tensor,
) -> None:
    """Update float32 values and their quantized moments in place."""
    beta1, beta2 = group["betas"]
    rate = float(group["lr"])
    mean = dequantize_moment(first, scales[0]).lerp_(grad, 1 - beta1)
    square = dequantize_moment(second, scales[1]).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    for codes, kept, moment, draw in ((first, scales[0], mean, noise[0]), (second, scales[1], square, noise[1])):
        new, scale = quantize_moment(moment, draw[: moment.numel()], signed=moment is mean)
        codes.copy_(new)
        kept.copy_(scale)
    values.mul_(1 - rate * group["weight_decay"])
    root = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    values.addcdiv_(mean, root, value=-rate / (1 - beta1**step))


def _noise(seed: int, step: int, device: torch.device) -> Tensor:
    """Uniform in [0, 1), float32 ``[3, n]``: for the first moment, the second, and bfloat16 parameters.

    ``n`` is :data:`CHUNK`, and four times that where each part costs launches.
    """
    known = _drawn.get(device)
    if known is None or known[0] != (seed, step):
        known = None
        _drawn.pop(device, None)  # before the next is made
        generator = torch.Generator(device)
        generator.manual_seed(derived_seed(seed, step))
        size = CHUNK if device.type == "cpu" else 4 * CHUNK
        known = _drawn[device] = (seed, step), torch.rand(3, size, generator=generator, device=device)
    return known[1]


def forget_draws() -> None:
    """Let go of what was drawn for the present step (:data:`CHUNK` times 12 bytes); it is drawn again when needed."""
    _drawn.clear()


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is kept; what bfloat16 holds exactly stays."""
    bits = values.view(torch.int32)
    added = bits + (noise[: values.numel()] * (1 << 16)).to(torch.int32)
    rounded = torch.where(values.isfinite(), added.bitwise_and_(-(1 << 16)), bits)
    return rounded.view(torch.float32).to(torch.bfloat16)


def _check(parameter: Tensor, grad: Tensor) -> None:
    layout = getattr(parameter, "placements", ())
    if any(p.is_partial() or (p.is_shard() and not p.is_shard(0)) for p in layout):
        raise TypeError(
            f"AdamW8bit takes parameters that are sharded over their first dimension, this one is as {layout}; use "
            "torch.optim.AdamW"
        )
    if not parameter.is_floating_point() or grad.layout is not torch.strided:
        raise TypeError(
            f"AdamW8bit takes real floating parameters with dense gradients, got {parameter.dtype} with a gradient of "
            f"layout {grad.layout}"
        )

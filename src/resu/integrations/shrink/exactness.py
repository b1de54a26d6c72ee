"""Outputs of a transformer in float64 throughout, to tell a right removal from one that is nearly right."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["compare_outputs", "outputs_in_float64", "random_batch"]


class _Float64(TorchFunctionMode):
    """float32 that code asks for by name becomes float64.

    Norms, softmax and rotary positions of many models compute in float32 whatever they are given; its rounding is 10⁻⁷,
    which would hide errors that are smaller and raise alarms that are none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return func_double(*args)
        swapped = {k: _double(v) for k, v in (kwargs or {}).items()}
        return func(*[_double(arg) for arg in args], **swapped)


def func_double(tensor: Tensor, **_: Any) -> Tensor:
    return tensor.double()


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def random_batch(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of random tokens, the second one padded at its end: int64 ``[2, tokens]``."""
    config = model.config
    tokens = min(12, int(getattr(config, "max_position_embeddings", None) or 12) - 2)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, max(4, int(config.vocab_size)), (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens - tokens // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs_in_float64(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """What a copy of the model in float64 and evaluation mode gives for random tokens, by the outputs' names.

    The model itself stays as it is.
    """
    copy = deepcopy(model).double().eval()
    if getattr(copy.config, "use_cache", None):
        copy.config.use_cache = False
    device = next(copy.parameters()).device
    batch = {key: value.to(device) for key, value in random_batch(copy, seed).items()}
    real = batch["attention_mask"].bool()
    found: dict[str, Tensor] = {}
    with torch.no_grad(), _Float64():
        for name, value in dict(copy(**batch)).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                # What is computed at padding is read by nobody, and may be anything.
                found[name] = value[real] if value.shape[:2] == real.shape else value
    return found


def compare_outputs(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """The largest difference of two outputs, relative to the largest value wanted; infinity where any is NaN.

    Raises:
        ValueError: If they are not outputs of the same kind.

    Example:
        >>> compare_outputs({"a": torch.tensor([1.0, 4.0])}, {"a": torch.tensor([1.0, 3.0])})
        0.25
    """
    if {n: t.shape for n, t in wanted.items()} != {n: t.shape for n, t in got.items()} or not wanted:
        raise ValueError("the two models give outputs of different kinds, which cannot be compared")
    worst = 0.0
    for name, tensor in wanted.items():
        difference = float((tensor - got[name]).abs().max() / tensor.abs().max().clamp(min=1e-30))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst

"""Rules, optimizers and a comparison for the tests of training in other libraries' loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from resu.training import RESU, SNFS, Algorithm, Magnitude, RigL, Static, TopKAST

# For runs of 12 steps that stop at 5; the last two carry most from step to step.
RULES: dict[str, Algorithm] = {
    "static": Static(sparsity=0.8),
    "magnitude": Magnitude(sparsity=0.9, end_step=9, interval=2),
    "resu": RESU(sparsity=0.8, ramp_end_step=5, end_step=10, interval=1),
    "rigl": RigL(sparsity=0.8, interval=2, end_step=10),
    "snfs": SNFS(sparsity=0.8, interval=2),
    "top-kast": TopKAST(sparsity=0.8, interval=2),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
}


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

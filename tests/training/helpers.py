"""Small models and deterministic data for training tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(32, 5)
    )


def batches(n: int, *, image: bool = False, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (size, 1, 6, 6) if image else (size, 20)
    return [(torch.randn(shape, generator=generator), torch.randint(5, (size,), generator=generator)) for _ in range(n)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    begin: int = 0,
    end: int | None = None,
) -> None:
    for batch in data[begin:end]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

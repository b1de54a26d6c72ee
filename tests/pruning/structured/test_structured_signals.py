"""Windows, samples of a grid, bags of a table, spectra and complex weights: channels go through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resu.pruning.structured import StructuredPruner, find_structure
from resu.pruning.structured.removal import mask_tensors
from resu.pruning.structured.scores import unit_scores
from resu.pruning.structured.verify import compare, double_copy, random_like


class Between(nn.Module):
    """``between(self, a(x))``, read by the last layer."""

    def __init__(
        self, a: nn.Module, between: Callable[[Any, Tensor], Tensor], b: nn.Module, weight: Any = None
    ) -> None:
        super().__init__()
        self.a, self.b, self.between = a, b, between
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, *x: Tensor) -> Tensor:
        out: Tensor = self.b(self.between(self, self.a(*x)))
        return out


IMAGES, TOKENS, SERIES = torch.zeros(2, 3, 8, 8), torch.randint(10, (2, 4)), torch.zeros(2, 5, 4)
PICKED = torch.tensor([[0, 1], [4, 2]])[..., None]
GRID = torch.linspace(-1, 1, 2 * 4 * 4 * 2).view(2, 4, 4, 2)


def sampled(m: Any, x: Tensor) -> Tensor:
    return F.grid_sample(x, GRID.to(x.dtype), align_corners=False)


def filtered(m: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x, dim=(2, 3)) * m.weight, s=(8, 8), dim=(2, 3))
    return out


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "windows": (
        lambda: Between(nn.Conv2d(3, 8, 1), lambda m, x: F.unfold(x, 2).transpose(1, 2), nn.Linear(32, 2)),
        IMAGES,
    ),
    "grid": (lambda: Between(nn.Conv2d(3, 8, 1), sampled, nn.Conv2d(8, 2, 1)), IMAGES),
    **{
        mode: (
            lambda mode=mode: Between(nn.EmbeddingBag(10, 8, mode=mode), lambda m, x: x.relu(), nn.Linear(8, 2)),
            TOKENS,
        )
        for mode in ("mean", "sum", "max")
    },
    "spectrum of a series": (
        lambda: Between(
            nn.Linear(4, 8),
            lambda m, x: torch.fft.ifft(torch.fft.fft(x, dim=1) * m.weight, dim=1).real,
            nn.Linear(8, 2),
            torch.randn(8, dtype=torch.complex64),
        ),
        SERIES,
    ),
    "filter of images": (
        lambda: Between(nn.Conv2d(3, 8, 1), filtered, nn.Conv2d(8, 2, 1), torch.randn(8, 8, 5, dtype=torch.complex64)),
        IMAGES,
    ),
    "tokens picked": (
        lambda: Between(
            nn.Linear(4, 8), lambda m, x: x.gather(1, PICKED.expand(-1, -1, x.shape[-1])).relu(), nn.Linear(8, 2)
        ),
        SERIES,
    ),
    "complex layers": (
        lambda: Between(nn.Linear(4, 8, dtype=torch.complex64), lambda m, x: x.abs(), nn.Linear(8, 2)),
        torch.zeros(3, 4, dtype=torch.complex64),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_go_through(case: str) -> None:
    torch.manual_seed(0)
    make, x = CASES[case]
    model = make()
    masked = double_copy(model)
    result = StructuredPruner(0.5, x).prune(model)
    assert list(result.units.values()) == [(8, 4)]
    assert result.fixed["b"] == "an output of the model"
    mask_tensors(masked, result.slices)
    drawn = random_like(x, torch.Generator().manual_seed(7))
    assert compare(masked, double_copy(model), drawn, 1e-9)
    model(x).sum().backward()


def test_a_spectrum_over_channels_fixes_them() -> None:
    model = Between(nn.Linear(4, 8), lambda m, x: torch.fft.rfft(x).abs(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="_fft_r2c goes along it"):
        StructuredPruner(0.5, SERIES).prune(model)


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda m, x: x.gather(1, PICKED.repeat(1, 1, 8)), "with a tensor of a size of its own"),
        (lambda m, x: F.pad(x.gather(1, PICKED.expand(-1, -1, 4)), (0, 4)), "it is indexed"),
        (lambda m, x: x.gather(2, PICKED.expand(-1, -1, 8)), "it is indexed"),
    ],
)
def test_what_is_picked_otherwise_stays(between: Callable[[Any, Tensor], Tensor], why: str) -> None:
    model = Between(nn.Linear(4, 8), between, nn.Linear(8, 2))
    with pytest.raises(ValueError, match=why):
        StructuredPruner(0.5, SERIES).prune(model)


def test_operations_that_a_rule_cannot_follow_fix_what_enters_them() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: self.b(self.a(row).relu()))(x)

    with pytest.raises(ValueError, match="cannot be followed, at a"):
        StructuredPruner(0.5, torch.zeros(3, 4)).prune(Mapped())


def test_magnitudes_of_complex_weights_are_scores() -> None:
    kind: Any = {"bias": False, "dtype": torch.complex64}
    layers = nn.Sequential(nn.Linear(1, 2, **kind), nn.Linear(2, 1, **kind))
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([[3 + 4j], [1 + 0j]]))
        layers[1].weight.copy_(torch.tensor([[0 + 2j, 1 + 0j]]))
    structure = find_structure(layers, torch.zeros(3, 1, dtype=torch.complex64))
    assert unit_scores(layers, structure.groups, "l1")["0"].tolist() == [7.0, 2.0]

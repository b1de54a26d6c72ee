"""Where a comparison of outputs is blind, or could be made so, nothing is removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resu.pruning.structured import StructuredPruner, find_structure
from resu.pruning.structured.effect import without_effect
from resu.pruning.structured.verify import compare, random_like


class Attention(nn.Module):
    """Sizes are literals; the scale follows from what a head has left."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Ends(nn.Module):
    """Two layers with something between, and something after."""

    def __init__(self, between=None, after=None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.between, self.after = between or (lambda h: h), after or (lambda y: y)

    def forward(self, x):
        return self.after(self.b(self.between(self.a(x))))


def test_one_token_hides_queries_and_keys():
    model = Attention()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="more than one token"):
        StructuredPruner(0.5, torch.randn(1, 1, 16)).prune(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_single_unit_behind_a_relu_has_an_effect():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    x = torch.zeros(1, 4)
    assert not without_effect(model, find_structure(model, x).groups, x)


def test_a_model_that_cannot_be_differentiated_is_tried():
    model = Ends(between=torch.sign, after=lambda y: y.detach())
    x = torch.zeros(2, 4)
    assert not without_effect(model, find_structure(model, x).groups, x)
    assert StructuredPruner(0.5, x).prune(model).units == {"a": (8, 4)}


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9, -float("inf")])
def test_masked_outputs_do_not_dwarf_a_difference(value):
    def after(y):
        return y.masked_fill(torch.tensor([True, False]), value)

    wrong = Ends(between=lambda h: h / h.shape[-1], after=after)  # the scale changes with a removal
    with pytest.raises(ValueError, match="differ by"):
        StructuredPruner(0.5, torch.randn(3, 4)).prune(wrong)
    assert StructuredPruner(0.5, torch.randn(3, 4)).prune(Ends(after=after)).error < 1e-9


def test_rounding_beside_zeros_is_no_difference():
    wanted, near = torch.tensor([[0.0, 1.0, -1e9], [1e-17, 1.0, -1e9]]).double()

    def gives(y):
        return Ends(after=lambda _: y).double()

    x = torch.zeros(1, 4).double()
    assert compare(gives(wanted), gives(near), x)
    assert not compare(gives(wanted), gives(wanted + torch.tensor([1e-3, 0, 0]).double()), x)


def test_chunks_of_unequal_size_are_fixed():
    model = Ends(between=lambda h: torch.cat(h.chunk(3, -1)[::-1], -1))
    with pytest.raises(ValueError, match="parts of unequal size"):
        StructuredPruner(0.5, torch.randn(3, 4)).prune(model)


@pytest.mark.parametrize("include", [None, "2"])
def test_a_flat_state_of_all_parameters_is_refused(include):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(TypeError, match="LBFGS"):
        StructuredPruner(0.5, torch.ones(3, 4), include=include).prune(model, optimizer)
    optimizer.step(closure)


def test_removals_are_undone_last_first():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    wanted = model(x)
    first = StructuredPruner(0.5, x).prune(model)
    second = StructuredPruner(0.5, x, include="2").prune(model)
    small = model(x)
    with pytest.raises(RuntimeError, match="undo the later one first"):
        first.undo()
    assert torch.equal(model(x), small)
    second.undo()
    first.undo()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    ("make", "x", "error", "said"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)), torch.zeros(3, 4), TypeError, "run the model once"),
        (lambda: Ends().to("meta"), torch.zeros(3, 4), TypeError, "meta device"),
        (Ends, torch.zeros(3, 5), ValueError, r"does not run on the example inputs \(\(3, 5\)\)"),
        (Ends, "text", ValueError, "does not run on the example inputs"),
    ],
)
def test_what_cannot_be_watched_is_said(make, x, error, said):
    with pytest.raises(error, match=said):
        StructuredPruner(0.5, x).prune(make())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripts_are_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(TypeError, match="then script it"):
        StructuredPruner(0.5, torch.zeros(1, 4)).prune(scripted)


class Masked(Attention):
    def forward(self, x, mask):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / 2 + (1 - mask)[:, None, None] * -1e9
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_mask_of_zeros_and_ones_hides_no_queries_and_keys():
    x, mask = torch.randn(2, 5, 16), torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for given in (mask, mask[:1].expand(2, 5)):  # the latter could be any number
        assert StructuredPruner(0.5, (x, given)).prune(Masked()).units == {"q": (4, 2)}


@pytest.mark.parametrize("read", [torch.log, torch.sqrt, lambda x: x / (x >= 0).all()])
def test_inputs_that_are_not_negative_are_drawn_so(read):
    class Reads(Ends):
        def forward(self, x):
            return super().forward(read(x))

    assert StructuredPruner(0.5, torch.rand(3, 4) + 0.1).prune(Reads()).units == {"a": (8, 4)}


def test_what_random_inputs_are_like():
    generator = torch.Generator().manual_seed(0)
    mask, added = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, -float("inf")])
    assert torch.equal(random_like(mask, generator), mask.double())
    assert torch.equal(random_like(added, generator), added.double())
    pixels = random_like(torch.tensor([[0.2, 0.5], [0.3, 0.9]]).repeat(50, 50), generator)
    assert 0.2 <= float(pixels.min()) < 0.25 < 0.85 < float(pixels.max()) <= 0.9
    for any_ in (torch.zeros(9), torch.ones(9), torch.tensor([-1.0, 2, 3])):
        assert float(random_like(any_.repeat(99), generator).std()) > 0.8
    assert random_like(torch.zeros(0), generator).dtype is torch.float64
    assert random_like(torch.zeros(3, dtype=torch.complex64), generator).dtype is torch.complex128

"""Taking indices out of tensors: ties, optimizers, attributes, undo."""

import pytest
import torch
from torch import nn

from resu.pruning.structured.keeps import Keep, shrink_modules
from resu.pruning.structured.removal import shrink_tensors
from resu.pruning.structured.slots import slots
from resu.pruning.structured.verify import verify_removal

KEPT = torch.tensor([0, 2, 3])


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )


KEEPS = {"0": Keep(out=KEPT), "1": Keep(out=KEPT), "3": Keep(in_=KEPT)}


def trained(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    ],
)
def test_optimizer_state_is_cut_with_the_parameter(make):
    model = net()
    optimizer = make(model.parameters())
    trained(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    old = dict(model.named_parameters())
    states = {n: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for n, p in old.items()}
    listed = optimizer.param_groups[0]["params"]
    shrink_modules(model, KEEPS, optimizer)
    assert optimizer.param_groups[0]["params"] is listed
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    torch.testing.assert_close(model[0].weight, before["0.weight"][KEPT], rtol=0, atol=0)
    torch.testing.assert_close(model[3].weight, before["3.weight"][:, KEPT], rtol=0, atol=0)
    for name, value in optimizer.state[model[3].weight].items():
        if torch.is_tensor(value) and value.ndim:
            whole = states["3.weight"][name]
            want = whole[:, KEPT] if whole.shape[1] > 1 else whole
            torch.testing.assert_close(value, want, rtol=0, atol=0)
    assert model[0].weight.grad.shape == model[0].weight.shape
    trained(model, optimizer)
    assert repr(model[0]).startswith("Conv2d(3, 3,")
    assert repr(model[1]).startswith("BatchNorm2d(3,")
    assert repr(model[3]).startswith("Conv2d(3, 4,")


def test_undo_puts_the_same_objects_back():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    tensors = {n: (s.tensor, s.tensor.detach().clone()) for n, s in slots(model).items()}
    states = {id(p): s for p, s in optimizer.state.items()}
    text = repr(model)
    removal = shrink_modules(model, KEEPS, optimizer)
    assert repr(model) != text
    removal.undo()
    removal.undo()
    assert repr(model) == text
    for name, (tensor, value) in tensors.items():
        assert slots(model)[name].tensor is tensor
        assert torch.equal(tensor, value)
    assert {id(p): s for p, s in optimizer.state.items()} == states
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_ties_stay_ties():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    model.head.weight = model.embed.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrink_tensors(model, {"embed.weight": {1: KEPT}}, optimizer)
    assert model.head.weight is model.embed.weight
    assert model.head.weight.shape == (9, 3)
    assert (model.head.in_features, model.embed.embedding_dim) == (3, 3)
    assert optimizer.param_groups[0]["params"][0] is model.head.weight


def test_contradicting_ties_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model.b.weight = model.a.weight
    with pytest.raises(ValueError, match="tied"):
        shrink_tensors(model, {"a.weight": {0: KEPT}, "b.weight": {0: torch.tensor([1, 2])}})
    assert model.a.weight.shape == (4, 4)


def test_nothing_changes_where_state_cannot_be_cut():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"codes": torch.zeros(7)}
    with pytest.raises(TypeError, match="fresh optimizer"):
        shrink_tensors(model, {"weight": {0: KEPT}, "bias": {0: KEPT}}, optimizer)
    assert model.weight.shape == (4, 4)
    assert model.out_features == 4


@pytest.mark.parametrize(
    ("indices", "match"),
    [([], "keep nothing"), ([0, 9], "ascend"), ([2, 1], "ascend"), ([1, 1], "ascend"), ([-1, 2], "ascend")],
)
def test_bad_indices(indices, match):
    with pytest.raises(ValueError, match=match):
        shrink_tensors(nn.Linear(4, 4), {"weight": {0: torch.tensor(indices, dtype=torch.int64)}})


def test_held_masks_are_refused():
    from resu.pruning.pruners import MagnitudePruner, hold_masks

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    hold_masks(model, MagnitudePruner(0.5).prune(model))
    with pytest.raises(ValueError, match="release"):
        shrink_tensors(model, {"0.weight": {0: KEPT}})


def test_verification_sees_what_is_wrong():
    model = net()
    x = torch.zeros(1, 3, 8, 8)
    from resu.pruning.structured.keeps import slices_of

    good = slices_of(model, KEEPS)
    check = verify_removal(model, good, x)
    assert check
    assert check.error < 1e-12
    shifted = slices_of(model, {**KEEPS, "3": Keep(in_=torch.tensor([1, 2, 3]))})
    assert "differ" in verify_removal(model, shifted, x).reason
    short = slices_of(model, {**KEEPS, "3": Keep(in_=torch.tensor([1, 2]))})
    assert "does not run" in verify_removal(model, short, x).reason


def test_a_branch_at_zero_hides_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    nn.init.zeros_(model[2].weight)
    wrong = {"0.weight": {0: KEPT}, "0.bias": {0: KEPT}, "2.weight": {1: torch.tensor([1, 2, 3])}}
    assert not verify_removal(model, wrong, torch.ones(1, 4))


def test_grouped_convolutions():
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 3, 1))
    whole = torch.tensor([0, 1, 4, 5])
    slices = {name: {0: whole} for name in ("0.weight", "0.bias", "1.weight", "1.bias")} | {"2.weight": {1: whole}}
    assert verify_removal(model, slices, torch.zeros(1, 2, 5, 5))
    half = torch.tensor([0, 2, 4, 6])
    slices = {"0.weight": {0: half}, "0.bias": {0: half}, "1.weight": {1: torch.tensor([0])}}
    assert verify_removal(model, slices, torch.zeros(1, 2, 5, 5))
    shrink_tensors(model, slices)
    assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (4, 8, 4)

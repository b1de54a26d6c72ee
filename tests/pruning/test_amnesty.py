"""The tournament against its statement, and commits on real layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resu.core.counting import keep_count
from resu.core.mask import SparseMask
from resu.core.optimizer_state import state_tensors
from resu.modules.conv import RESUConv2d
from resu.modules.linear import RESULinear
from resu.pruning.amnesty import Amnesty, AmnestyConfig


def test_the_budget_falls_from_start_to_end():
    amnesty = Amnesty(AmnestyConfig(0.1, 0.02, total_cycles=5))
    assert [amnesty.resurrection_budget(c) for c in range(6)] == pytest.approx([0.1, 0.084, 0.068, 0.052, 0.036, 0.02])
    assert amnesty.resurrection_budget(50) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="cycle"):
        amnesty.resurrection_budget(-1)


def expected_mask(scores, old, keep, r):
    """Positions one by one, as the method is written down."""
    pruned = [i for i, was in enumerate(old) if not was]
    active = [i for i, was in enumerate(old) if was]
    places = min(round(r * keep), len(pruned))
    rest = keep - places
    if rest > len(active):
        places, rest = places + rest - len(active), len(active)
    best = lambda group, k: set(sorted(group, key=lambda i: (-scores[i], i))[:k])  # noqa: E731
    kept = best(active, rest) | best(pruned, places)
    return [i in kept for i in range(len(old))]


@given(
    cells=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, 9.0]), st.booleans()), min_size=1, max_size=30),
    r=st.floats(0, 1),
    digits=st.integers(0, 99),
)
def test_the_tournament_is_what_the_method_says(cells, r, digits):
    scores, old = map(list, zip(*cells, strict=True))
    amnesty = Amnesty(AmnestyConfig(r, r, total_cycles=1))
    keep = keep_count(len(old), digits / 100)
    new = amnesty.relative_tournament(torch.tensor(scores), torch.tensor(old), digits / 100, cycle=0)
    assert int(new.sum()) == keep
    assert new.tolist() == expected_mask(scores, old, keep, amnesty.resurrection_budget(0))


def test_a_small_theta_need_not_beat_active_weights():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.2]])
    old = SparseMask(torch.tensor([[True, True, True, True, False, False]]))
    new = Amnesty(AmnestyConfig(0.25, 0.25, 1)).relative_tournament(scores, old, 1 / 3, 0)
    assert new.tolist() == [[True, True, True, True, False, True]]  # 5 places, round(1.25) of them open
    none = Amnesty(AmnestyConfig(0.0, 0.0, 1)).tournament(scores, old, 4, 0)
    assert torch.equal(none, old.mask)


def test_input_scores_and_masks_are_checked():
    amnesty = Amnesty()
    scores, old = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="NaN"):
        amnesty.relative_tournament(scores * float("nan"), old, 0.5, 0)
    with pytest.raises(ValueError, match="old_mask must be bool"):
        amnesty.relative_tournament(scores, old.view(3, 2), 0.5, 0)
    with pytest.raises(ValueError, match="old_mask must be bool"):
        amnesty.relative_tournament(scores, old.float(), 0.5, 0)
    with pytest.raises(ValueError, match="cannot keep 7 of 6"):
        amnesty.tournament(scores, old, 7, 0)


@pytest.mark.parametrize(
    "wrong", [{"r_start": -0.1}, {"r_end": 1.1}, {"total_cycles": 0}, {"score_type": "size"}, {"r_start": float("nan")}]
)
def test_input_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AmnestyConfig(**wrong)


def test_scores_by_type():
    w, g, x = torch.randn(3, 4), torch.randn(3, 4), torch.rand(4)
    by = {t: Amnesty(AmnestyConfig(score_type=t)) for t in ("magnitude", "gradient", "wanda")}
    assert torch.equal(by["magnitude"].compute_scores(w), w.abs())
    assert torch.equal(by["gradient"].compute_scores(w, grad=g), (w * g).abs())
    assert torch.equal(by["wanda"].compute_scores(w, activation_norms=x), w.abs() * x)
    for t in ("gradient", "wanda"):
        with pytest.raises(ValueError, match="there are none"):
            by[t].compute_scores(w)


def layer_in(mode, make=lambda: RESULinear(12, 8)):
    torch.manual_seed(0)
    layer = make()
    layer.prune_by_magnitude(0.5)
    if mode == "RESU":
        layer.enter_resu_mode(epsilon=1.0)
    elif mode == "QRESU":
        layer.enter_qresu_mode(bits=8, epsilon=1.0)
    elif mode == "QRESU_SELECTIVE":
        layer.enter_qresu_selective_mode(bits=8, epsilon=1.0)
    return layer


@pytest.mark.parametrize("mode", ["RESU", "QRESU", "QRESU_SELECTIVE"])
@pytest.mark.parametrize("make", [lambda: RESULinear(12, 8), lambda: RESUConv2d(4, 6, 3)], ids=["linear", "conv"])
def test_trap_29_a_commit_leaves_the_exact_sparsity_and_true_zeros(mode, make):
    layer = layer_in(mode, make)
    old, merged = layer.mask, layer.effective_weight().detach().clone()
    amnesty = Amnesty(AmnestyConfig(0.3, 0.3, 1))
    stats = amnesty.commit_with_amnesty(layer, 0.6, cycle=0)
    new = layer.mask.mask
    assert layer.mode.name == "SPARSE"
    assert layer.mask.n_active == keep_count(old.numel, 0.6)
    assert torch.equal(new, amnesty.relative_tournament(merged.abs(), old, 0.6, 0))
    assert torch.equal(layer.weight.detach(), torch.where(new, merged, 0))
    assert not torch.signbit(layer.weight.detach()[~new]).any()
    came_back = int((new & ~old.mask).sum())
    assert came_back == round(0.3 * layer.mask.n_active)
    assert stats == {
        "n_resurrected": came_back,
        "n_active_kept": layer.mask.n_active - came_back,
        "resurrection_budget": 0.3,
        "resurrection_rate": came_back / old.n_pruned,
    }


def test_trap_15_state_of_every_position_that_changed_sides_is_cleared():
    layer = layer_in("RESU")
    optimizer = torch.optim.Adam([layer.weight], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    for value in state_tensors(optimizer, layer.weight).values():
        value.fill_(1.0)
    old = layer.mask.mask
    Amnesty(AmnestyConfig(0.3, 0.3, 1)).commit_with_amnesty(layer, 0.5, 0, optimizer=optimizer)
    changed = old ^ layer.mask.mask
    assert changed.any()
    for value in state_tensors(optimizer, layer.weight).values():
        assert torch.equal(value, torch.where(changed, 0.0, 1.0))


def test_a_commit_to_zero_sparsity_leaves_a_dense_layer():
    layer = layer_in("RESU")
    merged = layer.effective_weight().detach().clone()
    stats = Amnesty().commit_with_amnesty(layer, 0.0, 0)
    assert layer.mask is None
    assert torch.equal(layer.weight.detach(), merged)
    assert stats["resurrection_rate"] == 1.0


def test_the_wanda_score_takes_the_layers_own_norms():
    layer = layer_in("QRESU")
    layer.capture_activations = True
    layer(torch.randn(16, 12) * torch.arange(12))
    merged, norms = layer.effective_weight().detach().clone(), layer.activation_norms
    amnesty, old = Amnesty(AmnestyConfig(0.5, 0.5, 1, "wanda")), layer.mask
    amnesty.commit_with_amnesty(layer, 0.5, 0)
    assert torch.equal(layer.mask.mask, amnesty.relative_tournament(merged.abs() * norms, old, 0.5, 0))


@pytest.mark.parametrize("score_type", ["gradient", "wanda"])
def test_a_commit_that_cannot_score_changes_nothing(score_type):
    layer = layer_in("QRESU")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"there (is|are) none"):
        Amnesty(AmnestyConfig(score_type=score_type)).commit_with_amnesty(layer, 0.5, 0)
    assert layer.mode.name == "QRESU"
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_input_layers_without_theta_are_refused():
    for layer in (layer_in("SPARSE"), RESULinear(3, 2), nn.Linear(3, 2)):
        with pytest.raises(ValueError, match="needs a layer in a resurrection mode"):
            Amnesty().commit_with_amnesty(layer, 0.5, 0)


@pytest.mark.parametrize("mode", ["RESU", "QRESU", "QRESU_SELECTIVE"])
def test_the_gradient_score_takes_no_gradient_of_theta_for_that_of_the_weight(mode):
    layer = layer_in(mode)
    layer(torch.randn(4, 12)).square().sum().backward()  # in RESU mode .grad is zero at active positions
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    amnesty = Amnesty(AmnestyConfig(0.3, 0.3, 1, "gradient"))
    with pytest.raises(ValueError, match=rf"in mode {mode} needs grad="):
        amnesty.commit_with_amnesty(layer, 0.5, 0)
    assert layer.mode.name == mode
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    merged, old, grad = layer.effective_weight().detach().clone(), layer.mask, torch.randn(8, 12)
    amnesty.commit_with_amnesty(layer, 0.5, 0, grad=grad)
    assert torch.equal(layer.mask.mask, amnesty.relative_tournament((merged * grad).abs(), old, 0.5, 0))

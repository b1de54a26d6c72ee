"""The driver: masks hold under any optimizer, the topology moves when it should, resume is exact."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.training import RESU, SET, SNFS, Algorithm, Magnitude, RigL, Sparsifier, Static
from tests.training.helpers import batches, convnet, fit, loss_of, mlp

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
RULES = {
    "static": Static(sparsity=0.9),
    "static-late": Static(sparsity=0.8, init="magnitude", begin_step=7),
    "magnitude": Magnitude(sparsity=0.9, begin_step=3, end_step=25, interval=4),
    "resu-ramp": RESU(sparsity=0.9, end_step=30, ramp_end_step=15, interval=4),
    "resu-one-shot": RESU(sparsity=0.9, end_step=30, initial_sparsity=None, interval=1, gamma=1.5, fresh_state=False),
}


def zeros_are_exact(model: nn.Module, sparsifier: Sparsifier) -> None:
    for name, mask in sparsifier.masks.items():
        pruned = model.get_parameter(name).detach()[~mask.mask]
        assert torch.equal(pruned, torch.zeros_like(pruned))
        assert not torch.signbit(pruned).any()  # trap 8: +0.0, not -0.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_zeros_stay_exact_under_every_optimizer(rule: str, optimizer: str) -> None:
    model = mlp()
    sgd = OPTIMIZERS[optimizer](model.parameters())
    data = batches(60)
    fit(model, sgd, data, 0, 10)  # trap 14: momentum from before the driver
    sparsifier = Sparsifier(model, sgd, RULES[rule], distribution="global")
    fit(model, sgd, data, 10)
    zeros_are_exact(model, sparsifier)
    total = sum(m.numel for m in sparsifier.masks.values())
    pruned = sum(m.n_pruned for m in sparsifier.masks.values())
    assert pruned == int(total * RULES[rule].sparsity)


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform", "global", {"0": 0.9, "2": 0.5}])
def test_counts_follow_the_distribution(distribution: object) -> None:
    model = mlp()
    sparsifier = Sparsifier(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        Static(sparsity=0.8),
        distribution=distribution,  # type: ignore[arg-type]
    )
    masks = sparsifier.masks
    if isinstance(distribution, dict):
        assert masks["0.weight"].n_pruned == 720
        assert masks["2.weight"].n_pruned == 100
    else:
        assert sum(m.n_pruned for m in masks.values()) == 800
    zeros_are_exact(model, sparsifier)


@pytest.mark.parametrize("cut", [1, 7, 13, 26, 33])
@pytest.mark.parametrize("rule", RULES)
def test_resume_equals_uninterrupted(rule: str, cut: int) -> None:
    data = batches(45)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    model, optimizer = build()
    Sparsifier(model, optimizer, RULES[rule])
    fit(model, optimizer, data)

    first, first_optimizer = build()
    sparsifier = Sparsifier(first, first_optimizer, RULES[rule])
    fit(first, first_optimizer, data, 0, cut)
    file = io.BytesIO()
    torch.save([first.state_dict(), first_optimizer.state_dict(), sparsifier.state_dict()], file)

    for order in ("all before driver", "model before driver", "model after driver", "model last"):
        file.seek(0)
        weights, state, masks = torch.load(file, weights_only=True)
        second, second_optimizer = build()
        if order in ("all before driver", "model before driver"):
            second.load_state_dict(weights)
        if order == "all before driver":
            second_optimizer.load_state_dict(state)
        resumed = Sparsifier(second, second_optimizer, RULES[rule])
        if order == "model after driver":
            second.load_state_dict(weights)
        resumed.load_state_dict(masks)
        if order != "all before driver":
            second_optimizer.load_state_dict(state)
        if order == "model last":
            second.load_state_dict(weights)
        fit(second, second_optimizer, data, cut)
        for a, b in zip(model.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b), order


def test_trap_19_gradual_pruning_ends_exactly_and_only_removes() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rule = Magnitude(sparsity=0.9, begin_step=0, end_step=23, interval=5)
    sparsifier = Sparsifier(model, optimizer, rule, distribution="global")
    data, before, seen = batches(40), sparsifier.masks, []
    for i in range(40):
        fit(model, optimizer, data, i, i + 1)
        for name, mask in sparsifier.masks.items():
            assert not (mask.mask & ~before[name].mask).any()  # nothing comes back
        before = sparsifier.masks
        seen.append(sum(m.n_pruned for m in before.values()))
    expected = [int(1000 * rule.target(5 * (t // 5)) + 1e-9) if t < 23 else 900 for t in range(1, 41)]
    assert seen == expected


def test_magnitude_is_the_exact_global_top_k() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1.5)  # type: ignore[operator,union-attr]
    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach().abs()  # type: ignore[union-attr]
    kept = torch.zeros(1000, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:100]] = True
    sparsifier = Sparsifier(
        model, torch.optim.SGD(model.parameters(), lr=0.1), Magnitude(sparsity=0.9), distribution="global"
    )
    got = torch.cat([m.mask.flatten() for m in sparsifier.masks.values()])
    assert torch.equal(got, kept)


def reference_dormant(
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    keep: int,
    gamma: float,
    interval: int,
    end: int,
    lr: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Dormant resurrection with plain gradient steps, restated with flat float64 vectors."""
    sizes = [w.numel() for w in weights]
    w = torch.cat([x.flatten() for x in weights]).double()
    theta, mask = torch.zeros_like(w), torch.ones_like(w, dtype=torch.bool)

    def tournament() -> None:
        nonlocal w, theta, mask
        value = torch.where(mask, w, theta)
        order = value.abs().sort(descending=True, stable=True).indices
        mask = torch.zeros_like(mask)
        mask[order[:keep]] = True
        w, theta = torch.where(mask, value, 0.0), torch.where(mask, 0.0, value)

    tournament()
    for step, gradient in enumerate(gradients, start=1):
        g = torch.cat([x.flatten() for x in gradient]).double()
        w = torch.where(mask, w - lr * g, 0.0)
        if step <= end:
            theta = torch.where(mask, 0.0, theta - gamma * lr * g)
        if step <= end and (step % interval == 0 or step == end):
            tournament()
    parts = list(zip(w.split(sizes), mask.split(sizes), weights, strict=True))
    return [x.view(y.shape) for x, _, y in parts], [m.view(y.shape) for _, m, y in parts]


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_dormant_resurrection_elementwise(gamma: float) -> None:
    model = mlp().double()
    with torch.no_grad():
        model[2].weight.mul_(1.5)  # type: ignore[operator,union-attr]  # so that no layer runs empty
    weights = [model[0].weight, model[2].weight]
    start = [w.detach().clone() for w in weights]  # type: ignore[union-attr,operator]
    optimizer = torch.optim.SGD(weights, lr=0.5)  # type: ignore[arg-type]
    rule = RESU(sparsity=0.8, initial_sparsity=None, interval=3, end_step=20, gamma=gamma)
    sparsifier = Sparsifier(model, optimizer, rule, distribution="global")
    gradients: list[list[Tensor]] = []
    for x, y in batches(30):
        effective = [w.detach() * m.mask for w, m in zip(weights, sparsifier.masks.values(), strict=True)]  # type: ignore[union-attr,operator]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for w, e in zip([twin[0].weight, twin[2].weight], effective, strict=True):
                w.copy_(e)  # type: ignore[union-attr,operator]
        loss = nn.functional.cross_entropy(twin(x.double()), y)
        gradients.append(list(torch.autograd.grad(loss, [twin[0].weight, twin[2].weight])))  # type: ignore[list-item]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    expected, masks = reference_dormant(start, gradients, 200, gamma, 3, 20, 0.5)
    for w, e, m, mask in zip(weights, expected, masks, sparsifier.masks.values(), strict=True):
        assert torch.equal(m, mask.mask)
        torch.testing.assert_close(w.detach(), e, rtol=0, atol=1e-12)  # type: ignore[union-attr,operator]
    zeros_are_exact(model, sparsifier)


def test_trap_15_state_of_changed_positions_is_zero() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
    sparsifier = Sparsifier(model, optimizer, Magnitude(sparsity=0.9, begin_step=10), distribution="uniform")
    fit(model, optimizer, batches(10))
    for name, mask in sparsifier.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert (state[key][~mask.mask] == 0).all()
            assert (state[key][mask.mask] != 0).any()


def test_trap_21_a_skipped_amp_step_moves_nothing() -> None:
    for fused in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        rule = RESU(sparsity=0.8, interval=1, initial_sparsity=None)
        sparsifier = Sparsifier(model, optimizer, rule, distribution="global")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for i, batch in enumerate(batches(6)):
            masks, weights = sparsifier.masks, [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if i == 3:
                model[0].weight.grad[0, 0] = torch.inf  # type: ignore[union-attr,index]
            scaler.step(optimizer)
            scaler.update()
            if i == 3:
                assert sparsifier.step == 3
                assert sparsifier.masks == masks
                assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert sparsifier.step == 5
        zeros_are_exact(model, sparsifier)


def test_trap_20_closures_and_schedulers_work() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    sparsifier = Sparsifier(model, optimizer, RESU(sparsity=0.8, interval=2, initial_sparsity=None))
    for batch in batches(9):

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert sparsifier.step == 9
    zeros_are_exact(model, sparsifier)


def test_trap_23_micro_batches_are_not_steps() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = Sparsifier(model, optimizer, Magnitude(sparsity=0.5, begin_step=2))
    for i, batch in enumerate(batches(8)):
        loss_of(model, batch).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert sparsifier.step == 2


def test_trap_28_masks_hold_for_the_next_optimizer_until_commit() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = Sparsifier(model, optimizer, Magnitude(sparsity=0.7, begin_step=5))
    fit(model, optimizer, batches(10))
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches(5))
    zeros_are_exact(model, sparsifier)
    masks = sparsifier.commit()
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(5))
    assert any((model.get_parameter(n)[~m.mask] != 0).any() for n, m in masks.items())


@pytest.mark.parametrize("pattern", ["row", "2:4", "block:4x1", "channel:1"])
@pytest.mark.parametrize("rule", [Static, RESU])
def test_every_pattern_is_kept(pattern: str, rule: type) -> None:
    model = convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(
        model, optimizer, rule(sparsity=0.5, interval=3), pattern=pattern, distribution="uniform", exclude="0"
    )
    fit(model, optimizer, batches(12, image=True))
    for mask in sparsifier.masks.values():
        assert sparsifier.pattern.violations(mask.mask) == 0
        assert 0.3 <= mask.sparsity <= 0.7  # edges: 2:4 of six channels keeps four, a fifth row is half a block
    zeros_are_exact(model, sparsifier)


def test_wrappers_are_looked_through() -> None:
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(compiled, optimizer, RESU(sparsity=0.9, interval=2, end_step=6))  # type: ignore[arg-type]
    assert list(sparsifier.masks) == ["0.weight", "2.weight"]
    fit(compiled, optimizer, batches(8))  # type: ignore[arg-type]
    plain = mlp()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    Sparsifier(plain, plain_optimizer, RESU(sparsity=0.9, interval=2, end_step=6))
    fit(plain, plain_optimizer, batches(8))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_report_measures_what_was_explored() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, RESU(sparsity=0.9, initial_sparsity=None, interval=1, gamma=2.0))
    ever = {n: m.mask for n, m in sparsifier.masks.items()}
    data = batches(20)
    for i in range(20):
        fit(model, optimizer, data, i, i + 1)
        ever = {n: ever[n] | m.mask for n, m in sparsifier.masks.items()}
    report = sparsifier.report()
    for layer in report.layers:
        assert layer.explored == ever[layer.name].double().mean().item()
    assert report.explored > 0.1
    assert "total" in str(report)
    assert report.as_dict()["sparsity"] == pytest.approx(0.9)


def test_tied_weights_get_one_mask() -> None:  # trap 10
    model = mlp()
    model.append(nn.Linear(5, 40, bias=False))
    model.append(nn.Linear(40, 5, bias=False))
    model[4].weight = model[2].weight  # type: ignore[union-attr,assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5))
    assert list(sparsifier.masks) == ["0.weight", "2.weight", "3.weight"]


def test_clear_errors() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the 2 selected weights belongs to the optimizer"):
        Sparsifier(mlp(), optimizer, Static(sparsity=0.5))
    with pytest.raises(ValueError, match="matches no weight"):
        Sparsifier(model, optimizer, Static(sparsity=0.5), exclude="head")
    with pytest.raises(ValueError, match=r"2:4 has sparsity 0\.5"):
        Sparsifier(model, optimizer, Static(sparsity=0.9), pattern="2:4")
    with pytest.raises(ValueError, match="unknown distribution 'erkk'; known: er, erk, global, lamp, owl, uniform"):
        Sparsifier(model, optimizer, Static(sparsity=0.5), distribution="erkk")
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        RESU(sparsity=1.0)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5))
    with pytest.raises(ValueError, match=r"held by a mask already; call commit\(\)"):
        Sparsifier(model, optimizer, Static(sparsity=0.8))
    with pytest.raises(ValueError, match="other settings"):
        sparsifier.load_state_dict({**sparsifier.state_dict(), "settings": {}})
    assert all(isinstance(m, SparseMask) for m in sparsifier.masks.values())
    with pytest.raises(TypeError, match=r"a rule such as RigL\(sparsity=0\.9\), got 'rigl'"):
        Sparsifier(model, optimizer, "rigl")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy(sparsifier)
    sparsifier.commit()
    with pytest.raises(RuntimeError, match=r"holds nothing since commit\(\)"):
        sparsifier.prune_to(0.9)
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight: on the meta device"):
        Sparsifier(model, torch.optim.SGD(model.parameters()), Static(sparsity=0.5))


def test_weights_that_do_not_train_are_named() -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    for parameters in (model.parameters(), model[0].parameters()):
        with pytest.warns(
            UserWarning, match=r"1 of 2 selected weights are frozen or not in this optimizer \(2\.weight"
        ):
            Sparsifier(model, torch.optim.SGD(parameters, lr=0.1), Static(sparsity=0.5)).commit()


@pytest.mark.parametrize("rule", [Magnitude(sparsity=0.5, interval=1, end_step=9), RESU(sparsity=0.5, end_step=9)])
def test_a_run_that_diverged_is_told_from_a_wrong_input(rule: Algorithm) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, rule)
    data = batches(2)
    fit(model, optimizer, data[:1])
    with pytest.raises(FloatingPointError, match=r"'0\.weight' holds NaN after step 2: training has diverged"):
        fit(model, optimizer, [(data[1][0] * torch.nan, data[1][1])])
    assert sparsifier.step == 2


def test_trap_12_no_block_spans_two_experts() -> None:
    model = nn.Module()
    model.up = nn.Parameter(torch.randn(3, 4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'up' is a stack .* of 4 rows each, and blocks of 3 rows would span two"):
        Sparsifier(model, optimizer, Static(sparsity=0.5), pattern="block:3x1", include="up")
    Sparsifier(model, optimizer, Static(sparsity=0.5), pattern="block:2x1", include="up")


@pytest.mark.parametrize("rule", [Static(sparsity=0.5), Magnitude(sparsity=0.9, end_step=100), RESU(sparsity=0.5)])
def test_a_report_is_there_before_the_first_step_and_for_dense_layers(rule: Algorithm) -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 3))
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = Sparsifier(model, optimizer, rule)  # ERK leaves the small layer dense
    assert sparsifier.report().layers[1].explored == 1.0
    assert sparsifier.report().sparsity == pytest.approx(sparsifier.sparsity)


def test_a_driver_that_cannot_be_made_leaves_nothing_behind() -> None:
    for distribution, broken in (({"0": 0.9, "2.wieght": 0.5}, False), ("global", True)):
        model = mlp()
        if broken:
            with torch.no_grad():
                model[2].weight[0, 0] = torch.nan  # type: ignore[operator,union-attr]
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters())
        with pytest.raises(ValueError, match=r"wieght|NaN"):
            Sparsifier(model, optimizer, Magnitude(sparsity=0.9), distribution=distribution)  # type: ignore[arg-type]
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) or broken
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            model[2].weight[0, 0] = 0.1  # type: ignore[operator,union-attr]
        Sparsifier(model, optimizer, Magnitude(sparsity=0.9), distribution="uniform")


@pytest.mark.parametrize("rule", [Static(sparsity=0.8), RESU(sparsity=0.8, initial_sparsity=None, end_step=6)])
def test_channels_last_and_a_change_of_dtype(rule: Algorithm) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    runs = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        runs.append(Sparsifier(net, optimizer, rule, distribution="global"))
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(4, 4, 6, 6, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(4)]
        fit(net, optimizer, data)
    assert runs[0].masks == runs[1].masks
    model.to(torch.bfloat16)
    for x, y in data:
        model.zero_grad()
        nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
        runs[0].optimizer.step()
    zeros_are_exact(model, runs[0])
    assert runs[0].step == 8


def test_n_of_m_holds_in_every_layer_whatever_the_budget() -> None:
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.5), pattern="2:4")
    assert [mask.sparsity for mask in sparsifier.masks.values()] == [0.5, 0.5]


def all_dense(shapes: dict[str, torch.Size], sparsity: float, scores: object) -> dict[str, int]:
    return {name: shape.numel() - 1 for name, shape in shapes.items()}


def test_a_function_as_distribution_resumes() -> None:
    states = []
    for _ in range(2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5), distribution=all_dense)  # type: ignore[arg-type]
        if states:
            sparsifier.load_state_dict(states[0])
        states.append(sparsifier.state_dict())
    assert "all_dense" in states[0]["settings"]["distribution"]
    assert "0x" not in states[0]["settings"]["distribution"]


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, RESU(sparsity=0.5, initial_sparsity=None))
    fit(model, optimizer, batches(3))
    state = sparsifier.state_dict()
    masks = sparsifier.masks
    with pytest.raises(ValueError, match="no such weight here"):
        sparsifier.load_state_dict({**state, "step": 99, "theta": {"9.weight": torch.zeros(3)}})
    assert (sparsifier.step, sparsifier.masks) == (3, masks)


def test_a_second_driver_takes_over_after_commit() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, Static(sparsity=0.5)).commit()
    second = Sparsifier(model, optimizer, Magnitude(sparsity=0.8), distribution="uniform")
    fit(model, optimizer, batches(3))
    assert second.step == 3
    assert sum(int((model.get_parameter(n) == 0).sum()) for n in second.masks) == 800


def test_a_state_is_not_loaded_into_a_committed_driver() -> None:
    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.5))
    state = sparsifier.state_dict()
    sparsifier.commit()
    assert sparsifier.committed
    with pytest.raises(RuntimeError, match=r"holds nothing since commit\(\)"):
        sparsifier.load_state_dict(state)


def test_a_second_commit_changes_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5))
    masks = sparsifier.commit()
    fit(model, optimizer, batches(3))
    before = copy.deepcopy(model.state_dict())
    assert sparsifier.commit() == masks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_optimizer_may_come_wrapped() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: an optimizer around another, without the hooks of its own."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, Wrapper(plain), Static(sparsity=0.5))
    assert sparsifier.optimizer is plain
    fit(model, plain, batches(3))
    assert sparsifier.step == 3
    zeros_are_exact(model, sparsifier)
    with pytest.raises(TypeError, match=r"steps of a torch\.optim\.Optimizer, and object holds none"):
        Sparsifier(mlp(), object(), Static(sparsity=0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_only_shows_the_optimizers_state_is_none(make: type[torch.optim.Optimizer]) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = mlp()
    optimizer = make(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    sparsifier = Sparsifier(model, optimizer, RESU(sparsity=0.8, interval=1, initial_sparsity=None))
    before = sparsifier.masks
    get_state_dict(model, optimizer)  # takes a step at learning rate 0 with gradients of 0
    assert sparsifier.step == 0
    assert sparsifier.masks == before
    optimizer.param_groups[0]["lr"] = 0.0  # the first step of a warm-up is one
    fit(model, optimizer, batches(1))
    assert sparsifier.step == 1


@pytest.mark.parametrize("kind", [SET, RigL, SNFS])
def test_a_fraction_that_is_no_number_is_said(kind: type[Algorithm]) -> None:
    with pytest.raises(TypeError, match=r"alpha must be a number in \[0, 1\], got '0\.3' of type str"):
        kind(sparsity=0.9, alpha="0.3")  # type: ignore[call-arg]

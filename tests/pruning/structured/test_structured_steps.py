"""In steps: the end that one shot reaches, whatever earlier steps left; and what an optimizer or a machine may hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resu.pruning.structured import BlockPruner, GradualShrinker, StructuredPruner, shrink_iteratively
from resu.pruning.structured import target as targets
from resu.pruning.structured.sizes import Latency
from resu.pruning.structured.target import meet_target


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


X = torch.zeros(3, 4)


@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.7])
@pytest.mark.parametrize("stages", [3, 6, 7])
def test_equal_stages_end_at_the_sparsity_itself(sparsity: float, stages: int) -> None:
    model = net(20)
    shrink_iteratively(model, StructuredPruner(sparsity, X, include="0"), stages)
    assert model[0].out_features == round(20 * (1 - sparsity))


@pytest.mark.parametrize("stages", [0, -1, []])
def test_no_stages_are_said(stages: int | list[float]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        shrink_iteratively(net(), StructuredPruner(0.5, X), stages)


def test_a_function_of_three_arguments_is_refused_before_anything_is_done() -> None:
    model = net()
    with pytest.raises(TypeError, match="it needs 3 arguments"):
        shrink_iteratively(model, StructuredPruner(0.5, X), 2, lambda a, b, c: None)
    assert model[0].out_features == 8


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("include", [None, "0", ["0", "2"]])
def test_a_ramp_ends_quietly_where_one_unit_is_left(scope: str, include: str | list[str] | None) -> None:
    model = net(4)
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = StructuredPruner(0.9, X, scope=scope, include=include)
    gradual = GradualShrinker(pruner, optimizer, end_step=20, frequency=2)
    for _ in range(24):
        gradual.step(model)
    assert model[0].out_features == 1
    assert model[2].out_features == (4 if include == "0" else 1)
    with pytest.raises(ValueError, match=r"there is nothing to remove|matches no layer"):
        pruner.prune(model)


def test_all_units_count_when_they_compete_also_those_that_went_earlier() -> None:
    def uneven() -> nn.Sequential:
        model = net()
        with torch.no_grad():
            model[0].weight[1:].mul_(1e-3)
            model[2].weight[:, 1:].mul_(1e-3)  # seven of the first layer's units go first
        return model

    one, many = uneven(), uneven()
    StructuredPruner(0.6, X, scope="global").prune(one)
    results = shrink_iteratively(many, StructuredPruner(0.6, X, scope="global"), [0.45, 0.6])
    assert many[0].out_features == one[0].out_features == 1
    assert many[2].out_features == one[2].out_features == 6
    assert results[-1].reached.reached == pytest.approx(9 / 16)


def test_a_time_that_an_earlier_step_went_below_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(models: list[nn.Module], inputs: object) -> Latency:
        return Latency((1.0, 0.5), (1.0, 0.5))

    monkeypatch.setattr(targets, "latencies", measured)
    model = net()
    masks = {"0": torch.ones(8, dtype=torch.bool)}
    kept, reached = meet_target(model, "latency", 0.1, X, lambda share: masks, lambda kept: model, dense=net())
    assert kept is masks
    assert reached.reached == 0.5
    assert not reached.met


def test_one_measurement_that_misleads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(times: list[float]) -> float:
        measured = iter(times)

        def latencies(models: list[nn.Module], inputs: object) -> Latency:
            ratio = next(measured)
            return Latency((1.0, ratio), (1.0, ratio))

        monkeypatch.setattr(targets, "latencies", latencies)
        model = net()

        def kept_at(share: float) -> dict[str, Tensor]:
            return {"0": torch.arange(8) >= round(7 * share)}

        return meet_target(model, "latency", 0.5, X, kept_at, lambda kept: model)[1].reached

    assert searched([0.9, 0.2, 1.0, 0.5]) == 0.5
    with pytest.raises(ValueError, match=r"cannot be reduced by 50%: with .*, 20% are gone"):
        searched([0.9, 0.8])


def test_lists_of_tensors_in_a_state_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight] = {"preconditioners": [torch.eye(8), torch.eye(4)], "steps": [1, 2]}
    with pytest.raises(TypeError, match=r"'preconditioners' of '0.weight' as a list of tensors"):
        StructuredPruner(0.5, X).prune(model, optimizer)
    assert model[0].out_features == 8
    optimizer.state[model[0].weight] = {"steps": [1, 2], "step": torch.tensor(3.0)}
    StructuredPruner(0.5, X).prune(model, optimizer)
    assert optimizer.state[model[0].weight] == {"steps": [1, 2], "step": torch.tensor(3.0)}


@pytest.mark.parametrize(
    ("conv", "x", "form"),
    [
        (nn.Conv2d, torch.zeros(1, 3, 6, 6), torch.channels_last),
        (nn.Conv3d, torch.zeros(1, 3, 5, 5, 5), torch.channels_last_3d),
    ],
)
def test_channels_stay_last(conv: type[nn.Conv2d], x: Tensor, form: torch.memory_format) -> None:
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 2), nn.ReLU(), conv(8, 2, 1)).to(memory_format=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    StructuredPruner(0.5, x).prune(model, optimizer)
    for layer in (model[0], model[2]):
        assert not layer.weight.is_contiguous()
        assert layer.weight.is_contiguous(memory_format=form)
        assert optimizer.state[layer.weight]["momentum_buffer"].stride() == layer.weight.stride()


def test_what_is_no_optimizer_of_the_model_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.inner(x)
            return out

    model = nn.Sequential(Residual(), Residual(), *net())
    stale = torch.optim.SGD(net().parameters(), lr=0.1)
    several = [torch.optim.SGD(model[0].parameters()), torch.optim.SGD(model[2].parameters())]
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters()), lambda epoch: 1.0)
    x = torch.ones(3, 4)
    for pruner in (StructuredPruner(0.5, x), BlockPruner(0.5, x, calibration=[x])):
        with pytest.raises(ValueError, match=r"holds none of the model's parameters.*make a fresh one"):
            pruner.prune(model, stale)
        for other in (several, scheduler):
            with pytest.raises(TypeError, match=r"optimizer is one torch\.optim\.Optimizer, got"):
                pruner.prune(model, other)  # type: ignore[arg-type]
        assert (len(list(model.parameters())), model[2].out_features) == (10, 8)
    some = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)  # what is trained of a frozen model
    StructuredPruner(0.5, x).prune(model, some)
    assert some.param_groups[0]["params"][0] is model[4].weight

"""Whole residual blocks: what is found, that the smaller model is the zeroed one, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.io import FileFormatError
from resu.pruning.structured import (
    BlockPruner,
    GradualShrinker,
    Skip,
    StructuredPruner,
    find_blocks,
    load_shrunk,
    remove_blocks,
    save_shrunk,
    shrink_iteratively,
)
from resu.pruning.structured import target as targets
from resu.pruning.structured.block_scores import block_scores
from resu.pruning.structured.blocks import skipped, zero_blocks
from resu.pruning.structured.sizes import Latency, count_macs


class Residual(nn.Module):
    """``x + inner(x)``, with something after the sum."""

    def __init__(self, inner: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.after = after or nn.Identity()

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        out: Tensor = self.after(x + scale * self.inner(x))
        return out


def perceptron(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width))


def stack(depth: int = 4, width: int = 6) -> nn.Sequential:
    torch.manual_seed(depth)
    return nn.Sequential(nn.Linear(3, width), *(Residual(perceptron(width)) for _ in range(depth)), nn.Linear(width, 2))


def resnet() -> nn.Sequential:
    torch.manual_seed(0)

    def block(width: int) -> Residual:
        conv = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        norm = [nn.BatchNorm2d(width) for _ in range(2)]
        for n in norm:
            assert n.running_mean is not None
            assert n.running_var is not None
            nn.init.normal_(n.running_mean)
            nn.init.uniform_(n.running_var, 0.5, 2)
            nn.init.uniform_(n.bias)
        return Residual(nn.Sequential(conv[0], norm[0], nn.ReLU(), conv[1], norm[1]), nn.ReLU())

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    down = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    return nn.Sequential(stem, block(8), block(8), down, block(12), head)


IMAGES = torch.zeros(2, 3, 8, 8)


def double_outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model).double().eval()(x.double())
    return out


# -- what is found


def test_blocks_with_an_identity_shortcut_are_found() -> None:
    assert find_blocks(resnet(), IMAGES).names == ("1", "2", "4")
    assert find_blocks(stack(), torch.zeros(1, 3)).names == ("1", "2", "3", "4")


def test_pre_norm_encoders_are_found_and_post_norm_are_not() -> None:
    def encoder(first: bool) -> nn.Sequential:
        layers = [nn.TransformerEncoderLayer(8, 2, 16, norm_first=first, batch_first=True) for _ in range(2)]
        return nn.Sequential(*layers)

    x = torch.randn(2, 5, 8)
    assert find_blocks(encoder(True), x).names == ("0", "1")
    assert find_blocks(encoder(False), x).names == ()
    with pytest.raises(ValueError, match="no block can be removed: none gives its input back"):
        BlockPruner(0.5, x, calibration=[x]).prune(encoder(False))


def test_a_relu_after_the_sum_needs_positive_input() -> None:
    negative = nn.Sequential(nn.Linear(3, 6), Residual(perceptron(), nn.ReLU()), Residual(perceptron(), nn.ReLU()))
    assert find_blocks(negative, torch.zeros(4, 3)).names == ("2",)


def test_the_inner_of_nested_blocks_is_meant_unless_the_outer_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 6), Residual(nn.Sequential(Residual(perceptron()), nn.Linear(6, 6))))
    assert find_blocks(model, torch.zeros(1, 3)).names == ("1.inner.0",)
    assert find_blocks(model, torch.zeros(1, 3), include="1").names == ("1",)
    assert find_blocks(model, torch.zeros(1, 3), exclude="1.inner.*").names == ("1",)
    assert find_blocks(model, torch.zeros(1, 3), exclude=["1", "1.inner.0"]).names == ()


def test_parameters_used_elsewhere_are_refused() -> None:
    model = stack(3)
    model[1].inner[1].weight = model[3].inner[1].weight
    found = find_blocks(model, torch.zeros(1, 3))
    assert found.names == ("2",)
    assert "also used outside of it, as '3.inner.1.weight'" in found.refused["1"]


def test_a_parent_that_reads_the_block_is_refused_with_the_reason() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Residual(perceptron(3)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, scale=0.5)
            return x * self.layers[0].inner[1].out_features

    found = find_blocks(Reads(), torch.zeros(1, 3))
    assert found.names == ("layers.1", "layers.2")
    assert "does not run" in found.refused["layers.0"]
    assert "inner" in found.refused["layers.0"]


def test_what_is_read_by_a_hook_is_refused_where_outputs_say_so() -> None:
    class Twice(nn.Module):  # gives what the block saw as another output: the zeroed block would change nothing
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Residual(perceptron(3)), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.block(x)) + self.block.inner[1].bias.sum()
            return out

    found = find_blocks(Twice(), torch.zeros(1, 3))
    assert found.names == ()
    assert "does not run" in found.refused["block"]


def test_layers_that_a_cache_counts_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    found = find_blocks(model, {"input_ids": torch.arange(6)[None]})
    assert found.names == ()
    assert all("shrink_transformer" in found.refused[f"model.layers.{k}"] for k in range(3))
    with pytest.raises(ValueError, match=r"no block can be removed.*layer_idx"):
        BlockPruner(0.5, {"input_ids": torch.arange(6)[None]}, calibration=[torch.arange(6)[None]]).prune(model)


def test_an_encoder_of_torch_keeps_the_layer_that_it_looks_at() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    found = find_blocks(model, torch.randn(2, 5, 8))
    assert found.names == ("layers.1", "layers.2")
    assert "does not run" in found.refused["layers.0"]


def test_aliases_that_are_written_to_are_noticed() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(perceptron(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            y += 1  # without the block this is x
            out: Tensor = x * y
            return out

    found = find_blocks(InPlace(), torch.zeros(1, 3))
    assert found.names == ()
    assert "it writes into its input in place" in found.refused["block"]


def test_blocks_that_work_in_place_are_found() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron(6)

        def forward(self, x: Tensor) -> Tensor:
            x += self.inner(x)
            return x

    model = nn.Sequential(nn.Linear(3, 6), Adds(), nn.Linear(6, 2))
    assert find_blocks(model, torch.zeros(1, 3)).names == ("1",)
    data = [torch.randn(4, 3)]
    hidden = model[0](data[0]).detach()
    wanted = 1 - F.cosine_similarity(hidden.double(), (hidden + model[1].inner(hidden)).double()).mean()
    assert block_scores(model, ["1"], data).item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_norm_inside(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 6), Residual(nn.Sequential(norm(nn.Linear(6, 6)))), nn.Linear(6, 2))
    x = torch.randn(3, 3)
    result = BlockPruner(0.9, x, calibration=[x], target="units").prune(model)  # of one block, 0.9 keeps it
    assert result.units == {"1": (1, 1)}
    assert find_blocks(model, x).names == ("1",)


def test_looking_changes_nothing() -> None:
    model = resnet().train()
    model(IMAGES + torch.randn_like(IMAGES)).sum().backward()
    before = {name: (value.clone(), id(value)) for name, value in model.state_dict(keep_vars=True).items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    names = find_blocks(model, IMAGES).names
    block_scores(model, names, [IMAGES], loss_fn=lambda m, x: m(x).square().mean())
    block_scores(model, names, [IMAGES])
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[name][0])
        assert id(value) == before[name][1]
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Pre(Residual):
    """Something on the way in, shortcut and all."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return super().forward(self.after(x), scale=scale)


class Token(nn.Module):
    """What comes after the block writes in place: without the block, into a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.block = nn.Parameter(torch.randn(1, 3)), Residual(perceptron(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + torch.relu_(self.block(self.token))
        return out


class Casts(Residual):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return super().forward(x.to(self.inner[1].weight.dtype), scale=scale)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(Residual(perceptron(3)), nn.ReLU(inplace=True), nn.Linear(3, 2)), "into its input in"),
        (Token, "it writes into 'token' in place"),
        (lambda: nn.Sequential(nn.Linear(3, 6), Pre(perceptron(), nn.Dropout(0.1))), "in training it does not give"),
        (
            lambda: nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), Residual(perceptron()), nn.ReLU(inplace=True)),
            "could not be trained without it",
        ),
        (lambda: nn.Sequential(Casts(perceptron(3)), nn.Linear(3, 2)).bfloat16(), "turns torch.float32 on cpu into"),
    ],
)
def test_what_would_be_wrong_only_later_is_refused(make: Callable[[], nn.Module], why: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    found = find_blocks(make(), x)
    assert found.names == ()
    assert why in next(iter(found.refused.values()))


def test_a_clamp_after_the_sum_is_noticed_on_large_inputs() -> None:
    def model(after: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 6), Residual(perceptron(), after))

    assert find_blocks(model(nn.Hardtanh(-100, 100)), torch.zeros(4, 3)).names == ()
    assert find_blocks(nn.Sequential(nn.Linear(3, 6), nn.ReLU6(), *model(nn.ReLU6())[1:]), torch.ones(4, 3)).names


def test_hooks_that_would_not_be_called_are_said() -> None:
    model, seen = stack(3), []
    handle = model[2].inner[1].register_forward_hook(lambda module, args, out: seen.append(out))
    found = find_blocks(model, torch.zeros(1, 3))
    assert found.names == ("1", "3")
    assert "hooks hang on it" in found.refused["2"]
    handle.remove()
    assert find_blocks(model, torch.zeros(1, 3)).names == ("1", "2", "3")


def test_layers_that_count_themselves_under_another_name_are_refused() -> None:
    model = stack(4)
    for place in range(4):
        model[place + 1].inner[1].number = 7 + place
        model[place + 1].inner[3].rate = 2**place
    found = find_blocks(model, torch.zeros(1, 3))
    assert found.names == ()
    assert all("it knows its place among the layers (number)" in why for why in found.refused.values())
    for place in range(4):
        model[place + 1].inner[1].number = 7
    assert len(find_blocks(model, torch.zeros(1, 3)).names) == 4


def test_a_cache_that_grew_does_not_end_the_search() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    found = find_blocks(transformers.LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": mask})
    assert "layer_idx" in found.refused["model.layers.1"]


def test_a_block_that_checks_its_weights_ends_no_search() -> None:
    class Checks(Residual):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            if not self.inner[1].weight.any():
                raise RuntimeError("no weights")
            return super().forward(x, scale=scale)

    assert find_blocks(nn.Sequential(Checks(perceptron(3)), Residual(perceptron(3))), torch.zeros(1, 3)).names == ("1",)


def test_a_block_may_name_its_arguments_as_it_likes() -> None:
    class Named(Residual):
        def forward(self, hidden: Tensor, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(hidden)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Named(perceptron(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * self.block(x, x=None)
            return out

    assert find_blocks(Calls(), torch.zeros(1, 3)).names == ("block",)


def test_an_optimizer_forgets_names_too() -> None:
    model = stack(3)
    optimizer = torch.optim.Adam(model.named_parameters())
    before = list(optimizer.param_groups[0]["param_names"])
    removal = remove_blocks(model, ["2"], optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    removal.undo()
    assert optimizer.param_groups[0]["param_names"] == before


def test_what_surrounds_blocks_that_went_is_no_further_one() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.inner, self.outer = Residual(perceptron()), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.outer(torch.tanh(self.inner(self.block(x))))
            return out

    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(3, 6), *(Outer() for _ in range(4)), nn.Linear(6, 2)), torch.randn(4, 3)
    results = shrink_iteratively(model, BlockPruner(0.5, x, calibration=[x]), [0.25, 0.5])
    assert len(skipped(model)) == 2
    assert all(name.endswith(".block") for result in results for name in result.units)


def test_wrong_input_is_said() -> None:
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"Sequential does not run on the example inputs \(\(2, 9\)\)"):
        find_blocks(stack(), torch.zeros(2, 9))
    with pytest.raises(TypeError, match=r"in a torch.nn.Module, got str"):
        find_blocks("model", x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass \['1'\]"):
        remove_blocks(stack(), "1")
    for loss in (None, float("nan")):
        with pytest.raises(ValueError, match="loss_fn must return one finite number; without block '1'"):
            BlockPruner(0.5, x, calibration=[x], loss_fn=lambda m, b, loss=loss: loss).prune(stack())


# -- what is removed


@pytest.mark.parametrize(("make", "x"), [(resnet, torch.randn(2, 3, 8, 8)), (stack, torch.randn(5, 3))])
def test_the_smaller_model_is_the_zeroed_one(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make()
    masked = copy.deepcopy(model)
    result = BlockPruner(0.67, x, calibration=[x]).prune(model)
    gone = [name for name, (_, left) in result.units.items() if not left]
    assert len(gone) == int(0.67 * len(result.units))
    assert skipped(model) == gone
    zero_blocks(masked, gone)
    wanted, got = double_outputs(masked, x), double_outputs(model, x)
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)
    assert result.error <= 1e-9
    assert result.parameters[1] == sum(p.numel() for p in model.parameters()) < result.parameters[0]
    assert result.macs[1] == count_macs(model, x) < result.macs[0]


def test_multiply_adds_are_at_most_what_was_asked() -> None:
    model = resnet()
    result = BlockPruner(0.4, IMAGES, calibration=[IMAGES], target="macs").prune(model)
    assert count_macs(model, IMAGES) == result.macs[1] <= 0.6 * result.macs[0]
    with pytest.raises(ValueError, match="cannot be reduced by 99%: with one block left of those that can go"):
        BlockPruner(0.99, IMAGES, calibration=[IMAGES], target="parameters").prune(resnet())


def test_latency_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(models: list[nn.Module], inputs: Any) -> Latency:
        left = [sum(isinstance(m, Residual) for m in model.modules()) for model in models]
        return Latency(tuple(map(float, left)), tuple((n + 1) / (left[0] + 1) for n in left))

    monkeypatch.setattr(targets, "latencies", measured)
    model, x = stack(9), torch.randn(4, 3)
    result = BlockPruner(0.3, x, calibration=[x], target="latency").prune(model)
    assert sum(left for _, left in result.units.values()) == 6
    assert result.reached.reached == pytest.approx(0.3)


def test_the_block_that_does_least_goes_first() -> None:
    model, x = stack(4), torch.randn(32, 3)
    with torch.no_grad():
        model[3].inner[3].weight.mul_(1e-3)
        model[3].inner[3].bias.mul_(1e-3)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(m(batch), wanted)

    for loss_fn in (None, loss):
        small = copy.deepcopy(model)
        BlockPruner(0.25, x[:1], calibration=[x], loss_fn=loss_fn).prune(small)
        assert skipped(small) == ["3"]
    scores = block_scores(model, ["1", "3"], [x], loss_fn=loss)
    for name, score in zip(("1", "3"), scores.tolist(), strict=True):
        one = copy.deepcopy(model)
        zero_blocks(one, [name])
        with torch.no_grad():
            assert score == pytest.approx(float(loss(one, x)), rel=1e-5)


def test_losses_are_with_the_statistics_of_the_batch() -> None:
    model, x = resnet(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    scores = block_scores(model, ["1", "2"], [x], loss_fn=lambda m, b: m(b).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, score in zip(("1", "2"), scores.tolist(), strict=True):
        one = copy.deepcopy(model).train()
        remove_blocks(one, [name])
        with torch.no_grad():
            assert score == pytest.approx(float(one(x).square().mean()), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor, torch.optim.RMSprop])
def test_the_optimizer_forgets_what_is_gone_and_undo_brings_it_back(kind: type[torch.optim.Optimizer]) -> None:
    model, x = stack(4), torch.randn(8, 3)
    options: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1:].parameters()), "lr": 1e-3}]
    optimizer = kind(groups, lr=1e-2, **options)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    alike = copy.deepcopy(optimizer.state_dict())
    parameters = list(model.parameters())
    result = BlockPruner(0.5, x, calibration=[x]).prune(model, optimizer)
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.parameters()}
    assert len(listed) < len(parameters)
    assert {id(p) for p in optimizer.state} <= listed
    result.undo()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    again = optimizer.state_dict()
    assert again["param_groups"] == alike["param_groups"]
    for key, state in alike["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(again["state"][key][name]), torch.as_tensor(value))
    BlockPruner(0.5, x, calibration=[x]).prune(model, optimizer)
    step()


def test_lbfgs_with_a_state_is_refused_and_nothing_changed() -> None:
    model, x = stack(4), torch.randn(8, 3)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(TypeError, match="LBFGS"):
        BlockPruner(0.5, x, calibration=[x]).prune(model, optimizer)
    assert not skipped(model)


def test_undo_out_of_order_is_refused() -> None:
    model, x = resnet(), torch.randn(2, 3, 8, 8)
    blocks = BlockPruner(0.4, x, calibration=[x]).prune(model)
    channels = StructuredPruner(0.5, x).prune(model)
    with pytest.raises(RuntimeError, match="undo the later one first"):
        blocks.undo()
    channels.undo()
    blocks.undo()
    assert not skipped(model)
    assert torch.equal(model.eval()(x), resnet().eval()(x))


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_the_last_removal_is_undone_first() -> None:
    model = stack(4)
    optimizer = torch.optim.Adam(model.parameters())
    one, two = remove_blocks(model, ["1"], optimizer), remove_blocks(model, ["3"], optimizer)
    with pytest.raises(RuntimeError, match="undo the later one first"):  # the optimizer would come to lack block 1
        one.undo()
    two.undo()
    one.undo()
    assert held(optimizer) == {id(p) for p in model.parameters()}
    channels = StructuredPruner(0.5, torch.zeros(1, 3), include="1.inner.1").prune(model, optimizer)
    blocks = remove_blocks(model, ["3"], optimizer)
    with pytest.raises(RuntimeError, match="undo the later one first"):
        channels.undo()
    blocks.undo()
    channels.undo()
    assert held(optimizer) == {id(p) for p in model.parameters()}


def test_undo_is_refused_where_parameters_have_other_names_now() -> None:
    model = stack(4)
    removal = remove_blocks(model, ["1"])
    nn.utils.parametrizations.weight_norm(model[5])
    with pytest.raises(RuntimeError, match=r"'5.weight' was replaced or taken out"):
        removal.undo()
    assert skipped(model) == ["1"]


@pytest.mark.parametrize("training", [True, False])
def test_a_block_comes_back_in_the_mode_that_the_model_is_in(training: bool) -> None:
    model = stack(4).train(not training)
    removal = remove_blocks(model, ["1"])
    assert model[1].training is not training
    model.train(training)
    removal.undo()
    assert all(module.training is training for module in model.modules())
    model[1].inner.train(not training)  # a frozen part stays as it is
    remove_blocks(model, ["1"]).undo()
    assert model[1].inner[0].training is not training


# -- in steps, on disk


def test_in_stages_the_last_is_what_one_shot_would_leave() -> None:
    model, x = stack(8), torch.randn(8, 3)
    results = shrink_iteratively(model, BlockPruner(0.5, x, calibration=[x]), [0.25, 0.5], lambda m: None)
    assert [sum(a - b for a, b in r.units.values()) for r in results] == [2, 2]
    assert len(skipped(model)) == 4
    macs = count_macs(stack(8), x)
    model = stack(8)
    shrink_iteratively(model, BlockPruner(0.5, x, calibration=[x], target="macs"), 3)
    assert 0.35 * macs < count_macs(model, x) <= 0.5 * macs


def test_along_a_ramp() -> None:
    model, x = stack(8), torch.randn(8, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    gradual = GradualShrinker(BlockPruner(0.5, x, calibration=[x]), optimizer, end_step=6, frequency=2)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        gradual.step(model)
    assert len(skipped(model)) == 4
    assert len(gradual.results) > 1


def test_on_disk_with_channels_too(tmp_path: Path) -> None:
    model, x = resnet().eval(), torch.randn(2, 3, 8, 8)
    BlockPruner(0.4, x, calibration=[x]).prune(model)
    StructuredPruner(0.5, x).prune(model)
    save_shrunk(model, tmp_path)
    again = load_shrunk(resnet, tmp_path).eval()
    assert skipped(again) == skipped(model)
    assert torch.equal(again(x), model(x))
    assert isinstance(again.get_submodule(skipped(model)[0]), Skip)


def test_another_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, x = stack(4), torch.randn(2, 3)
    BlockPruner(0.5, x, calibration=[x]).prune(model)
    save_shrunk(model, tmp_path)
    for other in (stack(2), stack(4, width=4), nn.Sequential(nn.Linear(3, 3))):
        before, modules = copy.deepcopy(other.state_dict()), list(other.modules())
        with pytest.raises(FileFormatError, match=r"of another model|no part of"):
            load_shrunk(other, tmp_path)
        assert all(a is b for a, b in zip(other.modules(), modules, strict=True))
        assert before.keys() == other.state_dict().keys()
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"example_inputs": None, "calibration": []}, "pass example_inputs"),
        ({"calibration": None}, "pass calibration"),
        ({"target": "wat"}, "target must be one of units"),
        ({"sparsity": 1.0}, "sparsity"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    given_: dict[str, Any] = {"example_inputs": torch.zeros(1, 3), "calibration": [torch.zeros(1, 3)], **options}
    with pytest.raises(ValueError, match=match):
        BlockPruner(**given_)


def test_what_names_nothing_is_said() -> None:
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="include 'nothing' matches no module; there are 0, 1"):
        BlockPruner(0.5, x, calibration=[x], include=["1", "nothing"]).prune(stack())
    with pytest.raises(TypeError, match="a list of batches, got one tensor"):
        BlockPruner(0.5, x, calibration=x)


def test_without_batches_nothing_is_guessed() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        BlockPruner(0.5, torch.zeros(1, 3), calibration=[]).prune(stack())
    with pytest.raises(AttributeError):
        remove_blocks(stack(), ["99"])


KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Residual(perceptron()),
    "no norm": lambda: Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))),
    "post norm": lambda: Residual(nn.Linear(6, 6), nn.LayerNorm(6)),
    "clamp": lambda: Residual(nn.Linear(6, 6), nn.Hardtanh(-0.1, 0.1)),
    "plain": lambda: nn.Linear(6, 6),
    "relu": lambda: Residual(perceptron(), nn.ReLU()),
    "gated": lambda: Residual(nn.Sequential(nn.Linear(6, 12), nn.GLU())),
    "sigmoid": lambda: Residual(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())),
}
CAN_GO = {"residual", "no norm", "gated"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), st.integers(0, 1000), st.data())
def test_random_stacks_are_never_wrong(kinds: list[str], seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), *(KINDS[kind]() for kind in kinds), nn.Linear(6, 2))
    x = torch.randn(7, 3)
    names = find_blocks(model, x, seed=seed).names
    may = {str(i + 1) for i, kind in enumerate(kinds) if kind in CAN_GO | {"relu", "clamp"}}
    must = {str(i + 1) for i, kind in enumerate(kinds) if kind in CAN_GO}
    assert must <= set(names) <= may
    for name in set(names) - must:  # what comes after the sum is no hindrance only where another one went before
        assert {"relu", "clamp", "sigmoid"} & set(kinds[: int(name) - 1])
    gone = data.draw(st.sets(st.sampled_from(names))) if names else set()
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    zero_blocks(masked, gone)
    remove_blocks(small, gone)
    assert torch.allclose(double_outputs(small, x), double_outputs(masked, x), rtol=1e-12, atol=1e-12)

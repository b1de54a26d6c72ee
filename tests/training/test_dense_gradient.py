"""What rules see of a gradient: ∂L/∂(M⊙W) at every position, in fp32, of the step just done and of no other."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from resu.training import Sparsifier
from resu.training.algorithms import RigL
from tests.training.helpers import batches, convnet, loss_of, mlp


@dataclass(frozen=True, kw_only=True)
class Watched(RigL):
    """RigL that shows what it saw."""

    interval: int = 1
    seen: list = field(default_factory=list, compare=False)

    def update_mask(self, view, sparsity, step):
        if view.gradient is not None:
            self.seen.append((view.name, view.gradient.clone()))
        return super().update_mask(view, sparsity, step)


def effective(model, loss):
    """``{name: ∂L/∂(M⊙W)}`` of a copy of the model, whose pruned weights are 0, so that M⊙W is W."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Twice):
        twin.reentrant = None  # autograd.grad cannot look into one
    weights = {name: p for name, p in twin.named_parameters() if p.ndim > 1}
    found = torch.autograd.grad(loss(twin), list(weights.values()))
    return dict(zip(weights, found, strict=True))


class Twice(nn.Module):
    """A layer that is used twice in one pass, in checkpoints or not."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(20, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.reentrant = reentrant

    def forward(self, x):
        def half(h):
            return self.middle(torch.tanh(h))

        x = self.first(x)
        for _ in range(2):
            x = half(x) if self.reentrant is None else checkpoint(half, x, use_reentrant=self.reentrant)
        return self.last(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(20, 2), nn.Linear(20, 5)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])


def tied():
    model = nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 20, bias=False), nn.Tanh(), nn.Linear(5, 20, bias=False))
    model[3].weight = model[1].weight
    return nn.Sequential(*model[:2], nn.Linear(20, 5), model[3], nn.Linear(20, 5))


MODELS = {
    "mlp": mlp,
    "conv": convnet,
    "transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 5)), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(42, 5)
    ),
    "used twice": Twice,
    "checkpoint": lambda: Twice(reentrant=False),
    "reentrant checkpoint": lambda: Twice(reentrant=True),
    "attention": Attention,
    "tied": tied,
}


def setting(kind, optimizer=None, **options):
    torch.manual_seed(3)
    model = MODELS[kind]()
    steps = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))(model.parameters())
    rule = Watched(sparsity=0.7, **options)
    return model, steps, Sparsifier(model, steps, rule), rule


@pytest.mark.parametrize("kind", MODELS)
def test_trap_16_the_gradient_is_dense_and_that_of_the_effective_weight(kind):
    model, steps, sparsifier, rule = setting(kind)
    for batch in batches(4, image=kind == "conv"):
        rule.seen.clear()
        expected = effective(model, lambda net, b=batch: loss_of(net, b))
        steps.zero_grad()
        loss_of(model, batch).backward()
        for name, mask in sparsifier.masks.items():  # what the optimizer gets is masked all the same
            assert not mask.get_pruned(model.get_parameter(name).grad).any()
        steps.step()
        assert rule.seen
        for name, gradient in rule.seen:
            layer = sparsifier.layers[name]
            torch.testing.assert_close(gradient, layer.matrix(expected[name]), rtol=1e-5, atol=1e-7)
            pruned = gradient[~layer.matrix(sparsifier.masks[name].mask)]
            assert pruned.any()


def test_compiled_models_show_the_same_gradient():
    model, steps, _, rule = setting("mlp")
    compiled = torch.compile(model, backend="aot_eager")
    for batch in batches(3):
        rule.seen.clear()
        expected = effective(model, lambda net, b=batch: loss_of(net, b))
        steps.zero_grad()
        loss_of(compiled, batch).backward()
        steps.step()
        for name, gradient in rule.seen:
            torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "used twice", "reentrant checkpoint"])
def test_trap_23_micro_batches_are_summed(kind, to_none):
    model, steps, sparsifier, rule = setting(kind)
    data = batches(12)
    for i in range(0, 12, 4):
        rule.seen.clear()
        steps.zero_grad(set_to_none=to_none)
        total = {}
        for batch in data[i : i + 4]:
            for name, g in effective(model, lambda net, b=batch: loss_of(net, b)).items():
                total[name] = total.get(name, 0) + g
            loss_of(model, batch).backward()
        steps.step()
        assert len(rule.seen) == len(sparsifier.layers)
        for name, gradient in rule.seen:
            torch.testing.assert_close(gradient, total[name], rtol=1e-5, atol=1e-6)


def test_trap_22_micro_batches_of_bf16_add_up_in_fp32():
    torch.manual_seed(0)
    model = mlp().bfloat16()
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Watched(sparsity=0.7)
    sparsifier = Sparsifier(model, steps, rule)
    exact, narrow = {}, {}
    masks = sparsifier.masks
    for x, y in batches(8):
        found = effective(model, lambda net, x=x, y=y: nn.functional.cross_entropy(net(x.bfloat16()), y))
        for name, g in found.items():
            exact[name] = exact.get(name, 0) + g.float()
            narrow[name] = narrow.get(name, 0) + g
        nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
    steps.step()
    for name, gradient in rule.seen:
        assert gradient.dtype == torch.float32
        pruned = ~masks[name].mask
        assert torch.equal(gradient[pruned], exact[name][pruned])
        assert not torch.equal(gradient[pruned], narrow[name].float()[pruned])  # what a sum in bf16 would have been


def skipped(fused, to_none):
    """A step that meets an infinity between two good ones; what the rule saw, and what it should have seen."""
    model, steps, sparsifier, rule = setting("mlp", lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    expected = []
    for i, batch in enumerate(batches(4)):
        wished = effective(model, lambda net, b=batch: loss_of(net, b))
        steps.zero_grad(set_to_none=to_none)
        scaler.scale(loss_of(model, batch)).backward()
        if i in (1, 2):
            name, mask = next(iter(sparsifier.masks.items()))
            model.get_parameter(name).grad.view(-1)[mask.active_indices[0]] = torch.inf
        else:
            expected += [(name, wished[name]) for name in sparsifier.layers]
        masks = sparsifier.masks
        scaler.step(steps)
        scaler.update()
        assert (sparsifier.masks == masks) == (i in (1, 2))
    assert sparsifier.step == 2
    return rule.seen, expected


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_trap_21_a_skipped_step_leaves_nothing_in_the_next_gradient(fused, to_none):
    seen, expected = skipped(fused, to_none)
    assert [name for name, _ in seen] == [name for name, _ in expected]
    for (_, gradient), (_, wished) in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, wished, rtol=1e-5, atol=1e-7)  # unscaled as well


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_scales_the_gradient_and_leaves_its_order(scaled):
    model, steps, _, rule = setting("mlp", lambda p: torch.optim.SGD(p, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for batch in batches(3):
        rule.seen.clear()
        expected = effective(model, lambda net, b=batch: loss_of(net, b))
        steps.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.unscale_(steps)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(steps)
        scaler.update()
        assert norm > 0.05
        for name, gradient in rule.seen:
            torch.testing.assert_close(gradient, expected[name] * (0.05 / norm), rtol=1e-4, atol=1e-8)


def test_a_backward_pass_without_a_step_is_forgotten():
    model, steps, _, rule = setting("mlp")
    first, second = batches(2)
    for to_none in (True, False):
        rule.seen.clear()
        loss_of(model, first).backward()
        steps.zero_grad(set_to_none=to_none)
        expected = effective(model, lambda net: loss_of(net, second))
        loss_of(model, second).backward()
        steps.step()
        for name, gradient in rule.seen:
            torch.testing.assert_close(gradient, expected[name])
        steps.zero_grad()


def test_layers_in_different_groups():
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    steps, rule = torch.optim.AdamW(groups, weight_decay=0.1), Watched(sparsity=0.7)
    sparsifier = Sparsifier(model, steps, rule)
    for batch in batches(3):
        rule.seen.clear()
        expected = effective(model, lambda net, b=batch: loss_of(net, b))
        steps.zero_grad()
        loss_of(model, batch).backward()
        steps.step()
        assert [name for name, _ in rule.seen] == ["0.weight", "2.weight"]
        for name, gradient in rule.seen:
            torch.testing.assert_close(gradient, expected[name])
    assert sparsifier.sparsity == 0.7


@dataclass(frozen=True, kw_only=True)
class Reaching(Watched):
    """Learns at some pruned positions too, and still looks at the dense gradient."""

    learns_pruned: ClassVar[bool] = True

    def learning(self, step):
        return True

    def reach(self, view):
        reach = view.mask.clone()
        reach[:, ::2] = True
        return reach


def test_micro_batches_are_summed_once_where_the_optimizer_learns_at_pruned_positions():
    model = mlp()
    steps, rule = torch.optim.SGD(model.parameters(), lr=0.1), Reaching(sparsity=0.7)
    Sparsifier(model, steps, rule)
    total = {}
    for batch in batches(3):
        for name, g in effective(model, lambda net, b=batch: loss_of(net, b)).items():
            total[name] = total.get(name, 0) + g
        loss_of(model, batch).backward()
    steps.step()
    for name, gradient in rule.seen:
        torch.testing.assert_close(gradient, total[name])


def test_gradients_that_were_assigned_are_seen():
    model, data = mlp(), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Watched(sparsity=0.8)
    Sparsifier(model, optimizer, rule)
    for batch in data:
        found = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        (_, first), _ = rule.seen[-2:]
        torch.testing.assert_close(first, found[0])
    rule.seen.clear()
    optimizer.step()  # the same ones again, masked by nobody
    assert len(rule.seen) == 2

"""Every rule under the driver against its paper in plain Python: masks and weights, position by position, each step.

The restatements run by themselves: they keep their own weights and masks, and only ask for the gradient of the loss
at the weights they have.
"""

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from resu.training import Magnitude, Sparsifier
from resu.training.algorithms import ACDC, MEST, SET, SNFS, STE, GraNet, RigL, SRigL, TopKAST
from tests.reference import acdc, draws, gmp, granet, mest, rigl, snfs, sr_ste, srigl, topkast
from tests.reference import set as set_reference
from tests.reference.masked_training import Layer, best

STEPS = 16
LR, MOMENTUM, DECAY = 0.3, 0.9, 0.02
MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 5, bias=False)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 6, 2, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(54, 5, bias=False),
    ),
}


class Setting:
    """A small model in float64, its data, and the gradient of its loss at any weights."""

    def __init__(self, kind, optimizer="sgd"):
        torch.manual_seed(7)
        self.model = MODELS[kind]().double()
        self.names = [name for name, _ in self.model.named_parameters()]
        with torch.no_grad():
            self.model.get_parameter(self.names[0]).mul_(1.5)
        self.shapes = [tuple(p.shape) for p in self.model.parameters()]
        self.twin = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(2)
        self.data = [
            (torch.randn(16, 8, generator=generator).double(), torch.randint(5, (16,), generator=generator))
            for _ in range(STEPS)
        ]
        self.kind = optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR / 10, weight_decay=DECAY)

    def weights(self):
        return [p.detach().flatten().tolist() for p in self.model.parameters()]

    def gradients(self, t, weights):
        """∂L/∂W of batch t at the given weights, flat lists of floats."""
        x, y = self.data[t]
        given = {
            name: torch.tensor(values, dtype=torch.float64).view(shape).requires_grad_()
            for name, values, shape in zip(self.names, weights, self.shapes, strict=True)
        }
        loss = nn.functional.cross_entropy(torch.func.functional_call(self.twin, given, (x,)), y)
        return [g.flatten().tolist() for g in torch.autograd.grad(loss, list(given.values()))]

    def train(self, layer, g):
        if self.kind == "sgd":
            layer.sgd(g, LR, MOMENTUM, DECAY)
        else:
            layer.adamw(g, LR / 10, 0.9, 0.999, DECAY)

    def real_step(self, t):
        x, y = self.data[t]
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def agrees(self, sparsifier, masks, weights, t):
        for name, mask, values in zip(self.names, masks, weights, strict=True):
            real = sparsifier.masks[name].mask.flatten().tolist()
            different = [i for i in range(len(mask)) if real[i] != mask[i]]
            assert not different, f"after step {t}: {name} differs at {different}"
            got = self.model.get_parameter(name).detach().flatten()
            torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-9)


SPARSITIES = (0.7, 0.52)


def by_layer(setting):
    return dict(zip(setting.names, SPARSITIES, strict=True))


def kept(n, sparsity):
    return n - math.floor(Fraction(str(sparsity)) * n)


def first_masks(setting, layers):
    """A random mask of the exact count, from the numbers of step 0."""
    for layer, name, sparsity in zip(layers, setting.names, SPARSITIES, strict=True):
        numbers = next(draws.uniform(len(layer.w), 0, name, 0))
        layer.become(best(numbers, kept(len(layer.w), sparsity)))


def compare(kind, optimizer, rule, update, start=first_masks, pattern=None):
    """Train both, and compare after each step. ``update(t, layers, gradients, setting)`` moves the masks."""
    setting = Setting(kind, optimizer)
    layers = [Layer(w) for w in setting.weights()]
    sparsifier = Sparsifier(setting.model, setting.optimizer, rule, distribution=by_layer(setting), pattern=pattern)
    start(setting, layers)
    setting.agrees(sparsifier, [one.mask for one in layers], [one.w for one in layers], 0)
    moved = set()
    for t in range(1, STEPS + 1):
        before = [list(one.mask) for one in layers]
        gradients = setting.gradients(t - 1, [one.w for one in layers])
        for layer, g in zip(layers, gradients, strict=True):
            setting.train(layer, g)
        update(t, layers, gradients, setting)
        setting.real_step(t - 1)
        setting.agrees(sparsifier, [one.mask for one in layers], [one.w for one in layers], t)
        if before != [one.mask for one in layers]:
            moved.add(t)
    return sparsifier, moved


EVERY, END = 3, 12
DUE = (3, 6, 9)
BOTH = pytest.mark.parametrize("kind", MODELS)
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])


@BOTH
@OPTIMIZERS
def test_rigl(kind, optimizer):
    def update(t, layers, gradients, setting):
        if t in DUE:
            for layer, g in zip(layers, gradients, strict=True):
                layer.become(rigl.update(layer.w, layer.mask, g, rigl.fraction(t, 0.4, END)))

    rule = RigL(sparsity=0.7, interval=EVERY, end_step=END, alpha=0.4)
    _, moved = compare(kind, optimizer, rule, update)
    assert moved == set(DUE)


@BOTH
@OPTIMIZERS
def test_set(kind, optimizer):
    def update(t, layers, gradients, setting):
        if t in DUE:
            for layer, name in zip(layers, setting.names, strict=True):
                numbers = next(draws.uniform(len(layer.w), 0, name, t))
                layer.become(set_reference.update(layer.w, layer.mask, numbers, rigl.fraction(t, 0.4, END)))

    _, moved = compare(kind, optimizer, SET(sparsity=0.7, interval=EVERY, end_step=END, alpha=0.4), update)
    assert moved == set(DUE)


def optimizer_gradient(g, layer):
    """What an optimizer is given: nothing at pruned positions."""
    return [x if inside else 0.0 for x, inside in zip(g, layer.mask, strict=True)]


@BOTH
@OPTIMIZERS
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_mest_elastic_mutation(kind, optimizer, lam):
    def update(t, layers, gradients, setting):
        if t in (*DUE, END):
            for layer, g, name in zip(layers, gradients, setting.names, strict=True):
                score = mest.importance(layer.w, optimizer_gradient(g, layer), lam)
                numbers = next(draws.uniform(len(layer.w), 0, name, t))
                layer.become(mest.em(score, layer.mask, numbers, mest.stage(t, 0, END, [0.4, 0.2, 0.1, 0.0])))

    rule = MEST(sparsity=0.7, interval=EVERY, end_step=END, mutation=(0.4, 0.2, 0.1, 0.0), grad_weight=lam)
    _, moved = compare(kind, optimizer, rule, update)
    assert moved == {3, 6}  # the last stage, from step 9 on, moves nothing


@BOTH
@OPTIMIZERS
def test_mest_with_a_soft_memory_bound(kind, optimizer):
    def start(setting, layers):
        for layer, name, sparsity in zip(layers, setting.names, SPARSITIES, strict=True):
            n = kept(len(layer.w), sparsity)
            numbers = draws.uniform(len(layer.w), 0, name, 0)
            first = best(next(numbers), n)
            layer.become(mest.em_s([1.0] * len(first), first, next(numbers), 0.4, n))
            assert sum(layer.mask) == n + math.floor(0.4 * n)

    def update(t, layers, gradients, setting):
        if t not in (*DUE, END):
            return
        for layer, g, name, sparsity in zip(layers, gradients, setting.names, SPARSITIES, strict=True):
            n = kept(len(layer.w), sparsity)
            score = mest.importance(layer.w, optimizer_gradient(g, layer), 3.0)
            numbers = next(draws.uniform(len(layer.w), 0, name, t))
            layer.become(mest.em_s(score, layer.mask, numbers, mest.stage(t, 0, END, [0.4, 0.2, 0.1, 0.0]), n))

    rule = MEST(sparsity=0.7, interval=EVERY, end_step=END, mutation=(0.4, 0.2, 0.1, 0.0), grad_weight=3.0, soft=True)
    sparsifier, moved = compare(kind, optimizer, rule, update, start)
    assert moved == {3, 6, 9}
    assert [m.n_active for m in sparsifier.masks.values()] == [
        kept(m.numel, s) for m, s in zip(sparsifier.masks.values(), SPARSITIES, strict=True)
    ]


@BOTH
@OPTIMIZERS
def test_gradual_magnitude_pruning(kind, optimizer):
    def update(t, layers, gradients, setting):
        if t in (1, 4, 7, 10):
            for layer, s in zip(layers, SPARSITIES, strict=True):
                layer.become(gmp.update(layer.w, layer.mask, gmp.kept_at(t, len(layer.w), 0, s, 1, 3, 3)))

    rule = Magnitude(sparsity=0.7, begin_step=1, interval=3, end_step=10)
    sparsifier, moved = compare(kind, optimizer, rule, update, start=lambda setting, layers: None)
    assert moved == {4, 7, 10}
    assert [m.n_active for m in sparsifier.masks.values()] == [
        kept(m.numel, s) for m, s in zip(sparsifier.masks.values(), SPARSITIES, strict=True)
    ]


@BOTH
@OPTIMIZERS
def test_ac_dc(kind, optimizer):
    plan = acdc.phases(2, 3, 11, STEPS)
    assert plan == [False] * 2 + [True] * 3 + [False] * 3 + [True] * 3 + [True] * 5

    def update(t, layers, gradients, setting):
        # Before the step after t: a phase begins there, or the last one does.
        if t < STEPS and (plan[t] != plan[t - 1] or t == 11):
            for layer, s in zip(layers, SPARSITIES, strict=True):
                n = len(layer.w)
                layer.become(acdc.compress(layer.w, kept(n, s)) if plan[t] else [True] * n)

    rule = ACDC(sparsity=0.7, begin_step=2, interval=3, end_step=11)
    _, moved = compare(kind, optimizer, rule, update, start=lambda setting, layers: None)
    assert moved == {2, 5, 8}


@BOTH
@OPTIMIZERS
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8])
def test_srigl(kind, optimizer, gamma):
    def start(setting, layers):
        for layer, name, s, shape in zip(layers, setting.names, SPARSITIES, setting.shapes, strict=True):
            numbers = next(draws.uniform(len(layer.w), 0, name, 0))
            layer.become(srigl.constant_fan_in(numbers, shape[0], kept(len(layer.w), s)))

    def update(t, layers, gradients, setting):
        if t not in DUE:
            return
        f = rigl.fraction(t, 0.5, END)
        for layer, g, s, shape in zip(layers, gradients, SPARSITIES, setting.shapes, strict=True):
            layer.become(srigl.update(layer.w, layer.mask, g, f, gamma, shape[0], kept(len(layer.w), s)))

    rule = SRigL(sparsity=0.7, interval=EVERY, end_step=END, alpha=0.5, ablation=gamma)
    sparsifier, _ = compare(kind, optimizer, rule, update, start, pattern="row")
    rows = [m.mask.flatten(1).sum(1) for m in sparsifier.masks.values()]
    given_up = sum(int((counts == 0).sum()) for counts in rows)
    assert given_up == 0 if gamma == 0 else (given_up > 0 or gamma == 0.3)
    for counts in rows:
        held = counts[counts > 0]
        assert held.max() - held.min() <= 1


@BOTH
@OPTIMIZERS
@pytest.mark.parametrize("initial", [0.0, 0.35])
def test_granet(kind, optimizer, initial):
    def start(setting, layers):
        if initial:
            for layer, name, s in zip(layers, setting.names, SPARSITIES, strict=True):
                numbers = next(draws.uniform(len(layer.w), 0, name, 0))
                layer.become(best(numbers, gmp.kept_at(0, len(layer.w), initial * s / 0.7, s, 0, 4, EVERY)))

    def update(t, layers, gradients, setting):
        if t not in (*DUE, END):
            return
        for layer, g, s in zip(layers, gradients, SPARSITIES, strict=True):
            keep = gmp.kept_at(t, len(layer.w), initial * s / 0.7, s, 0, 4, EVERY)
            layer.become(granet.update(layer.w, layer.mask, g, keep, rigl.fraction(t, 0.5, END)))

    rule = GraNet(sparsity=0.7, interval=EVERY, end_step=END, initial_sparsity=initial)
    sparsifier, moved = compare(kind, optimizer, rule, update, start)
    assert moved == {3, 6, 9, 12}
    assert [m.n_active for m in sparsifier.masks.values()] == [
        kept(m.numel, s) for m, s in zip(sparsifier.masks.values(), SPARSITIES, strict=True)
    ]


@BOTH
@OPTIMIZERS
def test_snfs(kind, optimizer):
    momenta = []

    def update(t, layers, gradients, setting):
        if not momenta:
            momenta.extend([0.0] * len(layer.w) for layer in layers)
        if t <= END:
            momenta[:] = [snfs.smooth(m, g, 0.8) for m, g in zip(momenta, gradients, strict=True)]
        if t in DUE:
            f = rigl.fraction(t, 0.4, END)
            counts = snfs.budgets([layer.mask for layer in layers], momenta, f)
            for layer, m, keep in zip(layers, momenta, counts, strict=True):
                layer.become(snfs.update(layer.w, layer.mask, m, f, keep))

    rule = SNFS(sparsity=0.7, interval=EVERY, end_step=END, alpha=0.4, beta=0.8)
    sparsifier, moved = compare(kind, optimizer, rule, update)
    assert moved == set(DUE)
    counts = [m.n_active for m in sparsifier.masks.values()]
    first = [kept(m.numel, s) for m, s in zip(sparsifier.masks.values(), SPARSITIES, strict=True)]
    assert sum(counts) == sum(first)
    assert counts != first  # budget has moved between the layers


@BOTH
@pytest.mark.parametrize("end", [None, 8])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_top_kast(kind, end, lam):
    setting = Setting(kind)
    layers = [topkast.Layer(w, 0.3) for w in setting.weights()]
    rule = TopKAST(sparsity=0.7, backward_sparsity=0.4, interval=2, end_step=end, regularization=lam)
    sparsifier = Sparsifier(setting.model, setting.optimizer, rule, distribution=by_layer(setting))

    def choose():
        for layer, s in zip(layers, SPARSITIES, strict=True):
            forward = kept(len(layer.theta), s)
            layer.choose(forward, min(len(layer.theta), round(forward * 2)))  # 0.6 is twice 0.3

    choose()
    for t in range(STEPS + 1):
        if t:
            frozen = end is not None and t > end
            gradients = setting.gradients(t - 1, [layer.effective() for layer in layers])
            for layer, g in zip(layers, gradients, strict=True):
                layer.step(g, LR, MOMENTUM, DECAY, 0.0 if frozen else lam)
            if not frozen and (t % 2 == 0 or t == end):
                choose()
            if t == end:
                for layer in layers:
                    layer.theta, layer.b = layer.effective(), layer.a
            setting.real_step(t - 1)
        setting.agrees(sparsifier, [layer.a for layer in layers], [layer.effective() for layer in layers], t)
        for name, layer in zip(setting.names, layers, strict=True):  # what is kept aside
            held = sparsifier._held[name]
            if held.theta is not None:
                aside = [0.0 if inside else x for x, inside in zip(layer.theta, layer.a, strict=True)]
                torch.testing.assert_close(held.theta.flatten().tolist(), aside, rtol=0, atol=1e-9)
                assert held.reach.mask.flatten().tolist() == layer.b


@pytest.mark.parametrize("pattern", ["tensor", "2:4"])
@pytest.mark.parametrize("end", [None, 8])
@pytest.mark.parametrize("lam", [0.0, 0.2])
def test_ste_and_sr_ste(pattern, end, lam):
    setting = Setting("mlp")
    weights = setting.weights()
    momenta = [[0.0] * len(w) for w in weights]

    def choose(w, shape, k):
        size = [abs(x) for x in w]
        return sr_ste.n_of_m(size, 2, 4, shape[1]) if pattern == "2:4" else best(size, kept(len(w), SPARSITIES[k]))

    sparsity = 0.5 if pattern == "2:4" else 0.7
    rule = STE(sparsity=sparsity, end_step=end, decay=lam)
    distribution = "uniform" if pattern == "2:4" else by_layer(setting)
    sparsifier = Sparsifier(setting.model, setting.optimizer, rule, distribution=distribution, pattern=pattern)
    masks = [choose(w, shape, k) for k, (w, shape) in enumerate(zip(weights, setting.shapes, strict=True))]
    changes = 0
    for t in range(STEPS + 1):
        if t:
            forward = [
                [x if inside else 0.0 for x, inside in zip(w, mask, strict=True)]
                for w, mask in zip(weights, masks, strict=True)
            ]
            frozen = end is not None and t > end
            for k, g in enumerate(setting.gradients(t - 1, forward)):
                if frozen:
                    g = [x if inside else 0.0 for x, inside in zip(g, masks[k], strict=True)]
                sr_ste.step(weights[k], momenta[k], masks[k], g, LR, MOMENTUM, DECAY, 0.0 if frozen else lam)
                if not frozen:
                    new = choose(weights[k], setting.shapes[k], k)
                    changes += new != masks[k]
                    masks[k] = new
                if t == end:  # what is pruned now is gone
                    for i in range(len(masks[k])):
                        if not masks[k][i]:
                            weights[k][i] = momenta[k][i] = 0.0
            setting.real_step(t - 1)
        effective = [
            [x if inside else 0.0 for x, inside in zip(w, mask, strict=True)]
            for w, mask in zip(weights, masks, strict=True)
        ]
        setting.agrees(sparsifier, masks, effective, t)
    assert changes > 4

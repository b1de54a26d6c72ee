"""Every rule under every kind of optimizer: pruned positions are exactly +0.0, and hold no state."""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

from resu.training import RESU, Magnitude, Sparsifier, Static
from resu.training.algorithms import ACDC, MEST, SET, SNFS, STE, GraNet, RigL, SRigL, TopKAST, algorithms

S, SCHEDULE = 0.75, {"interval": 2, "end_step": 9}
RULES = {
    "static": Static(sparsity=S),
    "magnitude": Magnitude(sparsity=S, **SCHEDULE),
    "resu": RESU(sparsity=S, **SCHEDULE),
    "set": SET(sparsity=S, **SCHEDULE),
    "rigl": RigL(sparsity=S, **SCHEDULE),
    "mest": MEST(sparsity=S, **SCHEDULE),
    "mest-soft": MEST(sparsity=S, soft=True, **SCHEDULE),
    "granet": GraNet(sparsity=S, **SCHEDULE),
    "srigl": SRigL(sparsity=S, **SCHEDULE),
    "snfs": SNFS(sparsity=S, **SCHEDULE),
    "ste": STE(sparsity=S, **SCHEDULE),
    "sr-ste": STE(sparsity=S, decay=0.1),
    "top-kast": TopKAST(sparsity=S, **SCHEDULE),
    "ac-dc": ACDC(sparsity=S, **SCHEDULE),
}


class SignMomentum(torch.optim.Optimizer):
    """Lion (Chen et al., arXiv 2302.06675), as a user would write it: not one of torch.optim's own."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # An update where there is neither gradient nor momentum, so that nothing is zero by itself.
                p.add_((mean * b1 + p.grad * (1 - b1)).add_(1e-12).sign_(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - b2)
        return loss


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5, centered=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "lion": lambda p: SignMomentum(p, lr=0.003, weight_decay=0.1),
}


def network(width=10):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


def train(model, optimizer, steps, begin=0):
    width = model[0].in_features
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, width, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield step


def test_every_rule_is_there():
    assert {type(rule) for rule in RULES.values()} == {algorithms[name] for name in algorithms}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RULES)
def test_trap_14_pruned_positions_are_exact_zeros_under_every_optimizer(name, optimizer):
    model = network()
    steps = OPTIMIZERS[optimizer](model.parameters())
    for _ in train(model, steps, 3):  # momentum from before
        pass
    pattern = "row" if name == "srigl" else None
    sparsifier = Sparsifier(model, steps, RULES[name], pattern=pattern, distribution="uniform")
    for _ in train(model, steps, 15, 3):
        for key, mask in sparsifier.masks.items():
            pruned = mask.get_pruned(model.get_parameter(key).detach())
            assert not pruned.any()
            assert not torch.signbit(pruned).any()
            assert torch.isfinite(model.get_parameter(key)).all()
            if not RULES[name].learns_pruned:
                for state in steps.state[model.get_parameter(key)].values():
                    if isinstance(state, torch.Tensor) and state.shape == mask.shape:
                        assert not mask.get_pruned(state).any()
    assert sparsifier.step == 12
    assert sparsifier.sparsity == S


# -- state in 8 bits -------------------------------------------------------------------------------------------------
@pytest.fixture
def low_bits():
    """torchao's optimizers, run without a compiler."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says when it is loaded is not ours
        from torchao import optim
    torch.compiler.set_stance("force_eager")
    yield optim
    torch.compiler.set_stance("default")


def wide():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))  # smaller ones it keeps in fp32


def exact(model, sparsifier):
    for key, mask in sparsifier.masks.items():
        pruned = mask.get_pruned(model.get_parameter(key).detach())
        assert not pruned.any()
        assert not torch.signbit(pruned).any()


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamWFp8"])
def test_trap_15_state_in_eight_bits_starts_anew_where_weights_are_grown(low_bits, kind):
    model = wide()
    steps = getattr(low_bits, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)
    sparsifier = Sparsifier(model, steps, RigL(sparsity=0.8, interval=3, end_step=12), distribution="uniform")
    before = sparsifier.masks
    for step in train(model, steps, 8):
        exact(model, sparsifier)
        for key, mask in sparsifier.masks.items():
            state = steps.state[model.get_parameter(key)]
            changed = mask.mask ^ before[key].mask
            assert bool(changed.any()) == (step + 1 in (3, 6))
            for what in ("exp_avg", "exp_avg_sq"):
                assert state[what].codes.element_size() == 1
                values = state[what].dequantize()
                assert not values[changed].any()
                assert not values[~mask.mask].any()
                assert values[mask.mask & ~changed].any()
        before = sparsifier.masks


def test_a_run_with_state_in_eight_bits_resumes_bit_for_bit(low_bits, tmp_path):
    def build():
        model = wide()
        steps = low_bits.AdamW8bit(model.parameters(), lr=1e-2)
        return model, steps, Sparsifier(model, steps, RigL(sparsity=0.8, interval=3, end_step=12))

    whole, steps, _ = build()
    list(train(whole, steps, 8))
    first = build()
    list(train(first[0], first[1], 4))
    torch.save([one.state_dict() for one in first], tmp_path / "run.pt")
    second = build()
    for one, state in zip(second, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        one.load_state_dict(copy.copy(state))
    list(train(second[0], second[1], 8, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second[0].parameters(), strict=True))


def test_state_in_four_bits_is_refused(low_bits):
    model = wide()
    steps = low_bits.AdamW4bit(model.parameters(), lr=1e-2)
    Sparsifier(model, steps, RigL(sparsity=0.8, interval=2))
    with pytest.raises(TypeError, match=r"AdamW4bit keeps 'exp_avg'.*floating-point or 8-bit state"):
        list(train(model, steps, 2))


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit", "SGD8bit"])
def test_trap_15_state_of_bitsandbytes_starts_anew_where_weights_are_grown(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = wide()
    more = {"momentum": 0.9} if kind == "SGD8bit" else {}
    steps = getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3, **more)
    sparsifier = Sparsifier(model, steps, RigL(sparsity=0.8, interval=3, end_step=12), distribution="uniform")
    before = sparsifier.masks
    for step in train(model, steps, 8):
        exact(model, sparsifier)
        for key, mask in sparsifier.masks.items():
            state = steps.state[model.get_parameter(key)]
            changed = mask.mask ^ before[key].mask
            assert bool(changed.any()) == (step + 1 in (3, 6))
            for what in ("1", "2")[: 2 if kind == "AdamW8bit" else 1]:
                assert state["state" + what].dtype == torch.uint8
                values = state["qmap" + what][state["state" + what].long()]
                assert not values[changed].any()
                assert values[mask.mask & ~changed].any()
        before = sparsifier.masks

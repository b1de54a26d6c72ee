"""A run that is stopped anywhere and goes on from a file is the run that was never stopped: weights, state, counts."""

import io
import random

import numpy as np
import pytest
import torch
from torch import nn

from resu.training import RESU, Magnitude, Sparsifier, Static
from resu.training.algorithms import ACDC, MEST, SET, SNFS, STE, GraNet, RigL, SRigL, TopKAST, algorithms

BEFORE, STEPS = 3, 15  # trained dense before there is a driver; under it
S, SCHEDULE = 0.7, {"interval": 2, "end_step": 11}
RULES = {
    "static": Static(sparsity=S, init="magnitude"),
    "static-late": Static(sparsity=S, begin_step=6),
    "magnitude": Magnitude(sparsity=S, begin_step=1, **SCHEDULE),
    "resu-ramp": RESU(sparsity=S, ramp_end_step=7, **SCHEDULE),
    "resu-one-shot": RESU(sparsity=S, initial_sparsity=None, gamma=1.5, **SCHEDULE),
    "set": SET(sparsity=S, init="magnitude", **SCHEDULE),
    "rigl": RigL(sparsity=S, **SCHEDULE),
    "rigl-for-ever": RigL(sparsity=S, interval=3),
    "mest": MEST(sparsity=S, grad_weight=5.0, **SCHEDULE),
    "mest-soft": MEST(sparsity=S, grad_weight=5.0, soft=True, **SCHEDULE),
    "granet": GraNet(sparsity=S, **SCHEDULE),
    "granet-sparse": GraNet(sparsity=S, initial_sparsity=0.4, init="magnitude", **SCHEDULE),
    "srigl": SRigL(sparsity=S, ablation=0.6, **SCHEDULE),
    "snfs": SNFS(sparsity=S, **SCHEDULE),
    "snfs-fixed": SNFS(sparsity=S, redistribution=False, interval=3),
    "ste": STE(sparsity=S, **SCHEDULE),
    "sr-ste": STE(sparsity=S, decay=0.2),
    "top-kast": TopKAST(sparsity=S, backward_sparsity=0.4, regularization=0.01, **SCHEDULE),
    "top-kast-for-ever": TopKAST(sparsity=S, backward_sparsity=0.4, interval=3),
    "ac-dc": ACDC(sparsity=S, begin_step=1, interval=3, end_step=11),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}
PATTERNS = {"srigl": "row", "static": "block:2x1", "set": "row", "rigl-for-ever": "channel:1"}
DISTRIBUTIONS = ("erk", "global", "uniform", {"0": 0.3, "*": S})


def cuts(name):
    """One in each fifth of the run, in any case the same ones."""
    draw = random.Random(name)
    return [draw.randrange(k * STEPS // 5, (k + 1) * STEPS // 5) for k in range(5)]


CASES = [(name, ("adamw", "sgd")[k % 2], cut) for name in RULES for k, cut in enumerate(cuts(name))]


class Run:
    def __init__(self, name, optimizer, pretrained):
        torch.manual_seed(4)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)
        )
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        if pretrained:
            self.train(-BEFORE, 0)
        distribution = DISTRIBUTIONS[sum(map(ord, name)) % len(DISTRIBUTIONS)]
        self.sparsifier = Sparsifier(
            self.model, self.optimizer, RULES[name], pattern=PATTERNS.get(name), distribution=distribution, seed=5
        )

    def train(self, begin, end):
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(100 + step)
            x, y = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
        }

    def load(self, state, order):
        for what in order:
            getattr(self, what).load_state_dict(state[what])


def differences(a, b, where=""):
    """Where two nested states are not the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict):
        if not isinstance(b, dict) or list(a) != list(b):
            return [f"{where}: other keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if type(a) is not type(b) or len(a) != len(b):
            return [f"{where}: other length"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}/{i}")]
    return [] if a == b and type(a) is type(b) else [f"{where}: {a!r} and {b!r}"]


def test_every_rule_is_there():
    assert {type(rule) for rule in RULES.values()} == {algorithms[name] for name in algorithms}


def test_cuts_fall_into_both_phases_of_ac_dc():
    assert {RULES["ac-dc"].target(cut) for cut in cuts("ac-dc")} == {0.0, S}


@pytest.fixture(scope="module")
def whole():
    """Uninterrupted runs, each made once."""
    made = {}

    def get(name, optimizer):
        if (name, optimizer) not in made:
            run = Run(name, optimizer, pretrained=True).train(0, STEPS)
            made[name, optimizer] = run.state(), run.sparsifier.report(torch.zeros(1, 1, 6, 6)).as_dict()
            run.sparsifier.commit()
        return made[name, optimizer]

    return get


@pytest.mark.parametrize(("name", "optimizer", "cut"), CASES)
def test_trap_27_stopped_at_a_random_step_and_resumed_from_a_file(name, optimizer, cut, whole, tmp_path):
    expected, report = whole(name, optimizer)
    first = Run(name, optimizer, pretrained=True).train(0, cut)
    torch.save(first.state(), tmp_path / "run.pt")
    first.train(cut, cut + 1)  # what was saved does not change any more
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    order = ["model", "optimizer", "sparsifier"]
    random.Random(f"{name} {cut}").shuffle(order)
    second = Run(name, optimizer, pretrained=False)
    second.load(state, order)
    assert differences(state, second.state()) == []  # nothing is lost by loading
    second.train(cut, STEPS)
    assert differences(expected, second.state()) == []
    assert second.sparsifier.report(torch.zeros(1, 1, 6, 6)).as_dict() == report


@pytest.mark.parametrize("name", RULES)
def test_a_driver_that_has_run_goes_back_to_a_saved_state(name, whole):
    expected, _ = whole(name, "adamw")
    run = Run(name, "adamw", pretrained=True).train(0, 4)
    copied = {what: _copied(state) for what, state in run.state().items()}
    run.train(4, 9)
    run.load(copied, ["sparsifier", "model", "optimizer"])
    run.train(4, STEPS)
    assert differences(expected, run.state()) == []


def _copied(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(x) for x in state] if isinstance(state, list) else state


def test_numbers_of_numpy_are_plain_in_a_state():
    model = nn.Linear(20, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = MEST(sparsity=np.float64(0.9), interval=np.int64(2), mutation=(np.float32(0.5),))
    sparsifier = Sparsifier(model, optimizer, rule, distribution={"*": np.float64(0.9)})
    file = io.BytesIO()
    torch.save(sparsifier.state_dict(), file)
    file.seek(0)
    sparsifier.load_state_dict(torch.load(file, weights_only=True))

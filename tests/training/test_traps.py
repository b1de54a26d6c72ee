"""What goes wrong elsewhere in sparse training, under the driver: one test each (the numbers are those of the list)."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resu.pruning.mask_ops import apply_masks_to_model
from resu.training import Sparsifier, Static
from resu.training.algorithms import MEST, SET, GraNet, RigL, algorithms
from tests.training.helpers import batches, fit, loss_of, mlp

ROOT = Path(__file__).resolve().parents[2]
STATEFUL = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
}
EXCHANGING = {
    "rigl": RigL(sparsity=0.8, interval=3, end_step=15),
    "set": SET(sparsity=0.8, interval=3, end_step=15),
    "mest": MEST(sparsity=0.8, interval=3, end_step=15),
}


@pytest.mark.parametrize("optimizer", STATEFUL)
@pytest.mark.parametrize("rule", EXCHANGING)
def test_trap_18_grown_weights_start_at_zero_with_no_memory_and_counts_stay(rule, optimizer):
    model = mlp()
    steps = STATEFUL[optimizer](model.parameters())
    data = batches(22)
    fit(model, steps, data, 0, 4)  # momentum from before, and weights that were not zero
    sparsifier = Sparsifier(model, steps, EXCHANGING[rule], distribution="uniform")
    counts = {name: mask.n_active for name, mask in sparsifier.masks.items()}
    assert counts == {"0.weight": 160, "2.weight": 40}
    grown_at = []
    for i in range(4, 22):
        before = sparsifier.masks
        fit(model, steps, data, i, i + 1)
        for name, mask in sparsifier.masks.items():
            assert mask.n_active == counts[name]
            grown = mask.mask & ~before[name].mask
            changed = mask.mask ^ before[name].mask
            weight = model.get_parameter(name)
            assert not weight.detach()[grown].any()
            assert not torch.signbit(weight.detach()[grown]).any()
            for key, value in steps.state[weight].items():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert not value[changed].any(), key
                    assert value[mask.mask & before[name].mask].any(), key
            if grown.any():
                grown_at.append(i - 3)
    assert sorted(set(grown_at)) == ([3, 6, 9] if rule == "mest" else [3, 6, 9, 12])  # MEST's last stage moves nothing


def masks_of(weight, optimizer=None, scaler=None, clears=None, steps=8):
    model = mlp()
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.05)))(model.parameters())
    if clears == "hook":
        optimizer.register_step_post_hook(lambda one, args, kwargs: one.zero_grad())
    rule = MEST(sparsity=0.8, interval=2, mutation=(0.3,), grad_weight=weight)
    sparsifier = Sparsifier(model, optimizer, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler is not None)
    for batch in batches(steps):
        if clears is None:
            optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        if clears == "call":
            optimizer.zero_grad()
    return sparsifier.masks


@pytest.mark.parametrize("clears", [None, "call", "hook"])
def test_trap_17_the_gradient_part_of_mest_acts(clears):
    without, little, much = (masks_of(weight, clears=clears) for weight in (0.0, 1e-9, 30.0))
    assert without == little
    assert without != much
    assert much == masks_of(30.0)  # whenever gradients are cleared


@pytest.mark.parametrize("fused", [False, True])
def test_trap_17_the_gradient_part_of_mest_is_unscaled(fused):
    def optimizer(p):
        return torch.optim.AdamW(p, lr=1e-2, fused=fused)

    plain, scaled = masks_of(30.0, optimizer), masks_of(30.0, optimizer, scaler=True)
    assert plain == scaled
    assert plain != masks_of(30.0 * 1024, optimizer)  # what scaled gradients would have chosen
    assert plain != masks_of(0.0, optimizer)


def test_trap_17_mest_drops_what_is_small_and_has_little_gradient():
    """Two weights, alike but for their gradients; by hand."""
    for weight, gone in ((0.0, 1), (1.0, 0)):
        layer = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.31, 0.3, 2.0, 0.1]]))
        steps = torch.optim.SGD(layer.parameters(), lr=1e-6)
        rule = MEST(sparsity=0.25, interval=1, mutation=(0.34,), grad_weight=weight, init="magnitude")
        sparsifier = Sparsifier(layer, steps, rule)
        assert sparsifier.masks["weight"].active_indices.tolist() == [0, 1, 2]
        seen = []

        def spy(view, rank, growth, survive, seen=seen):
            seen.append((rank, survive))
            return view.mask

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("resu.training.algorithms.mest.drop_and_grow", spy)
            (layer(torch.tensor([[0.0, 5.0, 0.0, 1.0]])).sum()).backward()  # the gradient is the input
            steps.step()
        [(rank, survive)] = seen
        assert survive == 2
        assert rank[0, :3].argmin() == gone
        torch.testing.assert_close(rank[0, :3], torch.tensor([0.31, 0.3 + weight * 5, 2.0]), rtol=1e-4, atol=0)


def test_trap_24_the_page_on_training_says_how_to_mend_batch_normalization():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("## Batch normalization")[1].split("\n## ")[0]
    assert re.search(r"```python\n(.|\n)*update_bn\(", section)  # and the block runs as a test


def test_trap_25_a_weight_that_was_replaced_is_an_error_at_the_next_step():
    def assigned(model):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)

    def parametrized(model):
        nn.utils.parametrizations.weight_norm(model[0])

    def set_anew(model):
        model[0].weight = nn.Parameter(torch.randn(40, 20))

    for replace in (assigned, parametrized, set_anew):
        model = mlp()
        steps = torch.optim.SGD(model.parameters(), lr=0.1)
        Sparsifier(model, steps, RigL(sparsity=0.8))
        replace(model)
        loss_of(model, batches(1)[0]).backward()
        with pytest.raises(RuntimeError, match=r"'0\.weight' is another parameter than when the Sparsifier was made"):
            steps.step()


def test_trap_25_a_model_that_is_moved_keeps_its_masks():
    model = mlp()
    steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, steps, RigL(sparsity=0.8, interval=2))
    fit(model, steps, batches(3))
    model.double()
    data = [(x.double(), y) for x, y in batches(4)]
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), data)  # momenta of before are of another type
    for name, mask in sparsifier.masks.items():
        assert not mask.get_pruned(model.get_parameter(name).detach()).any()
        assert mask.get_active(model.get_parameter(name).detach()).any()


def checksums():
    """Of every rule's masks after some steps."""
    found = []
    for name in sorted(algorithms):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rule = algorithms[name](sparsity=0.8, **({} if name == "static" else {"interval": 2, "end_step": 7}))
        sparsifier = Sparsifier(model, optimizer, rule, pattern="row" if name == "srigl" else None, seed=11)
        fit(model, optimizer, batches(8))
        found.append(" ".join([name, *(mask.checksum() for mask in sparsifier.masks.values())]))
    return found


def test_trap_26_masks_depend_on_no_hash_of_the_process():
    script = "from tests.training.test_traps import checksums\nprint(hash('0.weight'), *checksums(), sep='\\n')"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    other_hash, *other = run.stdout.splitlines()
    assert int(other_hash) != hash("0.weight")
    assert other == checksums()


@pytest.mark.parametrize("rule", [RigL(sparsity=0.8, interval=2), GraNet(sparsity=0.8, interval=2, end_step=10)])
def test_a_running_average_of_the_model_is_masked_at_the_end(rule):
    model = mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    steps = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, steps, rule)
    plain = mlp()
    plain_steps = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    Sparsifier(plain, plain_steps, rule)
    for batch in batches(12):
        fit(model, steps, [batch])
        average.update_parameters(model)
        fit(plain, plain_steps, [batch])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    masks = sparsifier.masks
    dense = {name: average.module.get_parameter(name).detach().clone() for name in masks}
    assert any(mask.get_pruned(dense[name]).any() for name, mask in masks.items())  # of the masks of before
    apply_masks_to_model(average.module, masks)
    for name, mask in masks.items():
        now = average.module.get_parameter(name).detach()
        assert not mask.get_pruned(now).any()
        assert torch.equal(mask.get_active(now), mask.get_active(dense[name]))


def test_an_average_that_was_begun_under_the_driver_is_a_plain_model():
    model = mlp()
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, steps, Static(sparsity=0.8))
    average = AveragedModel(model)
    fit(model, steps, batches(2))
    other = torch.optim.SGD(average.module.parameters(), lr=0.1)
    fit(average.module, other, batches(2))
    assert sparsifier.step == 2
    for name, mask in sparsifier.masks.items():
        assert not mask.get_pruned(model.get_parameter(name).detach()).any()
        assert mask.get_pruned(average.module.get_parameter(name).detach()).any()

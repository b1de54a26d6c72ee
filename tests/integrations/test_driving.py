"""What the training integrations share, and what they say where a library is absent."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from resu.integrations.driving import Recipe, check_zeros, plain_optimizer, release
from resu.training import Magnitude, Sparsifier, Static
from tests.training.helpers import batches, fit, mlp

ABSENT = """
import sys
sys.modules["lightning"] = None
import pytorch_lightning, resu.integrations.lightning as found
assert issubclass(found.SparsityCallback, pytorch_lightning.Callback)

import importlib
for name in ("transformers", "accelerate", "pytorch_lightning"):
    for loaded in [name, *(m for m in sys.modules if m.startswith(f"{name}."))]:
        sys.modules[loaded] = None
for module, extra in (("hf_trainer", "hf"), ("accelerate", "accelerate"), ("lightning", "lightning")):
    sys.modules.pop(f"resu.integrations.{module}", None)
    try:
        importlib.import_module(f"resu.integrations.{module}")
    except ImportError as error:
        assert f"pip install 'resu-torch[{extra}]'" in str(error), error
    else:
        raise AssertionError(module)
"""


def test_either_lightning_will_do_and_an_absent_library_is_named() -> None:
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_optimizers_are_looked_into() -> None:
    class Wrapped:
        def __init__(self, optimizer: object) -> None:
            self.optimizer = optimizer

    plain = torch.optim.SGD(mlp().parameters(), lr=0.1)
    assert plain_optimizer(Wrapped(Wrapped(plain)).optimizer) is plain
    assert plain_optimizer(Wrapped(plain)) is plain
    with pytest.raises(TypeError, match=r"Wrapped holds none; train in one process, with DDP or with FSDP2"):
        plain_optimizer(Wrapped(object()))


def test_steps_must_be_known_to_a_function_of_them() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(lambda steps: Magnitude(sparsity=0.5, end_step=steps // 2))
    for steps in (None, 0, -1, float("inf")):
        with pytest.raises(ValueError, match="which is not known here"):
            recipe.make(model, optimizer, steps)
    assert recipe.make(model, optimizer, 7).algorithm.end_step == 3


def test_letting_go_leaves_a_model_that_was_committed_alone() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5))
    sparsifier.commit()
    fit(model, optimizer, batches(2))
    before = [p.detach().clone() for p in model.parameters()]
    release(sparsifier)
    release(None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_masks_of_other_weights_are_found_out() -> None:
    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.5))
    check_zeros(sparsifier, "here")
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"here belongs to other weights .*: 'weight' is not zero at 32 pruned positions"
    ):
        check_zeros(sparsifier, "here")

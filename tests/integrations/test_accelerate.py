"""A driver in loops of the real accelerate: masks hold, skipped steps are none, save_state and load_state carry it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resu.core.io import FileFormatError
from resu.training import Sparsifier, Static
from tests.integrations.runs import OPTIMIZERS, RULES, same_bits
from tests.training.helpers import batches, loss_of, mlp
from tests.training.test_sparsifier import zeros_are_exact

accelerate = pytest.importorskip("accelerate")

from accelerate.tracking import GeneralTracker, on_main_process  # noqa: E402

from resu.integrations.accelerate import prepare_sparsifier, sparsity_metrics  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The first Accelerator of a process settles precision for all."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def prepared(optimizer: str = "adamw", seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = mlp(seed)
    return accelerator, *accelerator.prepare(model, OPTIMIZERS[optimizer](model.parameters()))


def train(accelerator: Any, model: Any, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_zeros_stay_exact_and_micro_batches_are_not_steps(optimizer: str, precision: str) -> None:
    accelerator, model, wrapped = prepared(optimizer, gradient_accumulation_steps=4, mixed_precision=precision)
    sparsifier = prepare_sparsifier(accelerator, model, wrapped, RULES["resu"])
    for batch in batches(48):
        train(accelerator, model, wrapped, [batch])
        zeros_are_exact(sparsifier.model, sparsifier)
    assert sparsifier.step == 12
    assert round(sparsifier.sparsity, 3) == 0.8
    assert sparsifier.optimizer is wrapped.optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused: bool) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # made for fp16 alone, which the CPU has not
    net = mlp()
    model, wrapped = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused))
    sparsifier = prepare_sparsifier(accelerator, model, wrapped, RULES["resu"])
    for i, batch in enumerate(batches(6)):
        masks, weights = sparsifier.masks, [p.detach().clone() for p in net.parameters()]
        accelerator.backward(loss_of(model, batch))
        if i == 3:
            net[0].weight.grad[0, 0] = torch.inf
        wrapped.step()
        if i == 3:
            assert wrapped.step_was_skipped is not fused  # a fused one skips inside its step, unseen by accelerate
            assert sparsifier.masks == masks
            assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
        wrapped.zero_grad()
        zeros_are_exact(net, sparsifier)
    assert sparsifier.step == 5


@pytest.mark.parametrize("rule", RULES)
def test_resume_equals_uninterrupted(tmp_path: Path, rule: str) -> None:
    data = batches(24)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    accelerator, model, optimizer = prepared(**options)
    whole = prepare_sparsifier(accelerator, model, optimizer, RULES[rule], seed=3)
    train(accelerator, model, optimizer, data[:10])
    accelerator.save_state(str(tmp_path / "at5"))
    train(accelerator, model, optimizer, data[10:])

    accelerator, resumed, optimizer = prepared(seed=1, **options)
    again = prepare_sparsifier(accelerator, resumed, optimizer, RULES[rule], seed=3)
    accelerator.load_state(str(tmp_path / "at5"))
    train(accelerator, resumed, optimizer, data[10:])
    assert again.step == 12
    assert same_bits(model, resumed)
    assert again.masks == whole.masks
    assert again.report() == whole.report()

    # And back again in the run that is there.
    accelerator.load_state(str(tmp_path / "at5"))
    assert again.step == 5
    zeros_are_exact(again.model, again)
    train(accelerator, resumed, optimizer, data[10:])
    assert same_bits(model, resumed)


def test_the_state_is_plain_and_each_driver_has_its_own(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    drivers = []
    for seed, rule in enumerate(("static", "magnitude")):
        net = mlp(seed)
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        drivers.append(prepare_sparsifier(accelerator, model, optimizer, RULES[rule]))
    accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.glob("custom_checkpoint*"))
    for driver, name in zip(drivers, ("sparsifier.pt", "sparsifier_1.pt"), strict=True):
        state = torch.load(tmp_path / name, weights_only=True)
        assert state["settings"] == driver.state_dict()["settings"]
    accelerator.load_state(str(tmp_path))

    (tmp_path / "sparsifier_1.pt").write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match=r"sparsifier_1\.pt is damaged"):
        accelerator.load_state(str(tmp_path))
    torch.save({"masks": Path("a")}, tmp_path / "sparsifier.pt")
    with pytest.raises(FileFormatError, match="more than tensors and plain values"):
        accelerator.load_state(str(tmp_path))
    torch.save([1], tmp_path / "sparsifier.pt")
    with pytest.raises(FileFormatError, match="is not the state of a sparsifier"):
        accelerator.load_state(str(tmp_path))
    (tmp_path / "sparsifier.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sparsifier\.pt: the checkpoint was written without a sparsifier"):
        accelerator.load_state(str(tmp_path))


def test_what_was_freed_is_carried_no_more(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    prepare_sparsifier(accelerator, model, optimizer, RULES["static"])
    model, optimizer = accelerator.free_memory(model, optimizer)  # as after running out of memory
    net = mlp()
    model, optimizer = accelerator.prepare(net, OPTIMIZERS["sgd"](net.parameters()))
    prepare_sparsifier(accelerator, model, optimizer, RULES["magnitude"])
    accelerator.save_state(str(tmp_path))
    (state,) = [torch.load(file, weights_only=True) for file in tmp_path.glob("sparsifier*")]
    assert state["settings"]["algorithm"] == "Magnitude"


def test_automatic_names(tmp_path: Path) -> None:
    configuration = accelerate.utils.ProjectConfiguration(
        str(tmp_path), automatic_checkpoint_naming=True, total_limit=1
    )
    accelerator, model, optimizer = prepared(project_config=configuration)
    sparsifier = prepare_sparsifier(accelerator, model, optimizer, RULES["magnitude"])
    for batch in batches(4):
        train(accelerator, model, optimizer, [batch])
        accelerator.save_state()
    assert [f.parent.name for f in tmp_path.rglob("sparsifier.pt")] == ["checkpoint_3"]
    train(accelerator, model, optimizer, batches(2))
    accelerator.load_state()
    assert sparsifier.step == 4


def test_sparsity_is_logged() -> None:
    class Records(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory = "records", False

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int | None, dict[str, float]]] = []

        @property
        def tracker(self) -> Any:
            return self.seen

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        @on_main_process
        def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
            self.seen.append((step, values))

    records = Records()
    accelerator, model, optimizer = prepared(log_with=records)
    accelerator.init_trackers("run")
    sparsifier = prepare_sparsifier(accelerator, model, optimizer, RULES["magnitude"])
    for batch in batches(10):
        train(accelerator, model, optimizer, [batch])
        accelerator.log(sparsity_metrics(sparsifier, "net/"), step=sparsifier.step)
    assert [step for step, _ in records.seen] == list(range(1, 11))
    values = [entry["net/sparsity"] for _, entry in records.seen]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(0.9, abs=1e-3)
    assert records.seen[-1][1]["net/explored"] == 1.0


def test_clear_errors() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = mlp()
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got a Sequential that is not prepared; call model, optimizer = accel"):
        prepare_sparsifier(accelerator, net, plain, RULES["static"])
    model, optimizer = accelerator.prepare(net, plain)
    with pytest.raises(TypeError, match="unknown option 'sparsity'"):
        prepare_sparsifier(accelerator, model, optimizer, RULES["static"], sparsity=0.5)
    with pytest.raises(TypeError, match="got the class Static"):
        prepare_sparsifier(accelerator, model, optimizer, Static)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a SGD that is not prepared"):
        prepare_sparsifier(accelerator, model, plain, RULES["static"])
    with pytest.raises(ValueError, match="none of the 2 selected weights belongs to the optimizer"):
        prepare_sparsifier(accelerator, accelerator.prepare(mlp(1)), optimizer, RULES["static"])
    assert isinstance(prepare_sparsifier(accelerator, model, optimizer, RULES["static"]), Sparsifier)

"""SparsityCallback in the real Lightning Trainer: masks hold, values are logged, checkpoints resume bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resu.training import Magnitude
from tests.integrations.runs import OPTIMIZERS, RULES, same_bits
from tests.training.helpers import batches, mlp
from tests.training.test_sparsifier import zeros_are_exact

lightning = pytest.importorskip("lightning.pytorch")
twin = pytest.importorskip("pytorch_lightning")

from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from resu.integrations.lightning import SparsityCallback  # noqa: E402

# Runs resume here without the callback that wrote the checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def module(library: Any = lightning, optimizer: str = "adamw", seed: int = 0) -> Any:
    class Module(library.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(seed)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS[optimizer](self.parameters())

    return Module()


class ExactZeros(lightning.Callback):  # type: ignore[misc,name-defined]
    """Looks after every batch."""

    def __init__(self, *callbacks: SparsityCallback) -> None:
        self.callbacks = callbacks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for callback in self.callbacks:
            zeros_are_exact(pl_module, callback.sparsifier)


class Records(Logger):  # type: ignore[misc]
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    name = version = property(lambda self: "records")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Resumable:
    """Batches that go on where they were, as Lightning asks of a loader to resume within an epoch."""

    def __init__(self) -> None:
        self.data, self.position, self.begin = batches(12), 0, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position, self.begin = self.begin, 0
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["position"]


def trainer(callbacks: list[Any], library: Any = lightning, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    ours = [c for c in callbacks if isinstance(c, SparsityCallback)]
    return library.Trainer(callbacks=[*callbacks, ExactZeros(*ours)], **{**given, **changes})


def saving(folder: Path, every: int = 5) -> Any:
    return lightning.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False
    )


@pytest.mark.parametrize("library", [lightning, twin], ids=["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_lines_and_zeros_stay_exact(library: Any, optimizer: str) -> None:
    callback = SparsityCallback(RULES["resu"])
    model = module(library, optimizer)
    trainer([callback], library, max_epochs=4, accumulate_grad_batches=4, gradient_clip_val=0.5).fit(model, Resumable())
    assert callback.sparsifier.step == 12
    assert round(callback.sparsifier.sparsity, 3) == 0.8
    assert list(callback.sparsifier.masks) == ["net.0.weight", "net.2.weight"]


def test_half_precision_and_a_step_that_is_skipped() -> None:
    class Overflow(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_after_backward(self, run: Any, pl_module: Any) -> None:
            if run.global_step == 4:
                pl_module.net[0].weight.grad[0, 0] = torch.inf
                self.masks = callback.sparsifier.masks

    callback, overflow = SparsityCallback(RULES["resu"]), Overflow()
    scaled = MixedPrecision("bf16-mixed", "cpu")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # fp16 alone has one, and the CPU has no fp16
    run = trainer([callback, overflow], plugins=[scaled])
    run.fit(module(), Resumable())
    assert callback.sparsifier.step == 11
    assert scaled.scaler.get_scale() == 4.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("library", [lightning, twin], ids=["lightning", "pytorch_lightning"])
def test_resume_equals_uninterrupted(tmp_path: Path, rule: str, library: Any) -> None:
    whole = SparsityCallback(RULES[rule], seed=3)
    straight = module(library)
    save = library.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer([whole, save], library, enable_checkpointing=True).fit(straight, Resumable())

    again = SparsityCallback(RULES[rule], seed=3)
    resumed = module(library, seed=1)
    run = trainer([again], library)
    run.fit(resumed, Resumable(), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True)
    assert again.sparsifier.step == 12
    assert same_bits(straight, resumed)
    assert again.sparsifier.masks == whole.sparsifier.masks
    assert again.sparsifier.report() == whole.sparsifier.report()


def test_a_run_that_was_stopped_resumes_with_the_same_callback(tmp_path: Path) -> None:
    straight = module()
    trainer([SparsityCallback(RULES["magnitude"])]).fit(straight, Resumable())
    callback, model = SparsityCallback(RULES["magnitude"]), module()
    trainer([callback, saving(tmp_path, 1)], max_steps=7, enable_checkpointing=True).fit(model, Resumable())
    run = trainer([callback])
    run.fit(model, Resumable(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)  # back from 7 to 4
    assert callback.sparsifier.step == 12
    assert same_bits(straight, model)


def test_weights_that_are_loaded_to_be_tested_bring_their_masks(tmp_path: Path) -> None:
    callback, model = SparsityCallback(RULES["magnitude"]), module()
    run = trainer([callback, saving(tmp_path)], enable_checkpointing=True)
    run.fit(model, Resumable())
    last = callback.sparsifier.masks
    run.test(model, Resumable(), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True, verbose=False)
    assert callback.sparsifier.step == 5
    assert callback.sparsifier.masks != last
    before = [p.detach().clone() for p in model.parameters()]
    callback.sparsifier.commit()
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))


def test_sparsity_is_logged() -> None:
    callback, records = SparsityCallback(RULES["magnitude"], prefix="net/"), Records()
    run = trainer([callback], logger=records, log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=2)
    run.fit(module(), Resumable())
    seen = [values["net/sparsity"] for _, values in records.seen]
    assert len(seen) >= 5
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.9, abs=1e-3)
    assert run.callback_metrics["net/explored"] == 1.0


class Two(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """Two networks, each with its optimizer, as an adversarial pair."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = mlp(0), mlp(1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        first, second = self.optimizers()
        for optimizer, net in ((first, self.one), (second, self.two)):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            if net is self.one or index % 2:
                optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.one.parameters()), torch.optim.SGD(self.two.parameters(), lr=0.1, momentum=0.9)]


def test_several_optimizers() -> None:
    first = SparsityCallback(RULES["static"], optimizer=0, prefix="one/")
    second = SparsityCallback(RULES["resu"], optimizer=1, prefix="two/")
    run = trainer([first, second])
    run.fit(Two(), Resumable())
    assert list(first.sparsifier.masks) == ["one.0.weight", "one.2.weight"]
    assert list(second.sparsifier.masks) == ["two.0.weight", "two.2.weight"]
    assert (first.sparsifier.step, second.sparsifier.step) == (12, 6)
    assert run.callback_metrics["one/sparsity"] == pytest.approx(0.8, abs=1e-3)

    alone = SparsityCallback(RULES["static"], exclude="one.*")
    trainer([alone]).fit(Two(), Resumable())
    assert list(alone.sparsifier.masks) == ["two.0.weight", "two.2.weight"]
    with pytest.raises(
        ValueError, match=r"several optimizers own weights to prune: 0 \(2 weights, 'one.0.weight' first"
    ):
        trainer([SparsityCallback(RULES["static"])]).fit(Two(), Resumable())
    with pytest.raises(ValueError, match="optimizer=2 is given, and there are 2"):
        trainer([SparsityCallback(RULES["static"], optimizer=2)]).fit(Two(), Resumable())
    with pytest.raises(ValueError, match="optimizer 0 owns none of the 2 selected weights"):
        trainer([SparsityCallback(RULES["static"], optimizer=0, exclude="one.*")]).fit(Two(), Resumable())


def test_a_rule_from_the_number_of_steps_and_a_second_fit() -> None:
    callback, model = SparsityCallback(lambda steps: Magnitude(sparsity=0.5, end_step=steps // 2, interval=2)), module()
    trainer([callback], max_epochs=2, accumulate_grad_batches=3).fit(model, Resumable())
    first = callback.sparsifier
    assert first.algorithm.end_step == 4
    trainer([callback]).fit(model, Resumable())
    assert callback.sparsifier is not first
    assert (callback.sparsifier.algorithm.end_step, callback.sparsifier.step) == (6, 12)
    with pytest.raises(ValueError, match="the number of steps, which is not known here"):
        trainer([callback], max_epochs=-1).fit(model, Resumable())


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got 0\.9"):
        SparsityCallback(0.9)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="made when training starts"):
        _ = SparsityCallback(RULES["static"]).sparsifier
    run = trainer([saving(tmp_path)], enable_checkpointing=True)
    run.fit(module(), Resumable())
    with pytest.raises(ValueError, match="which holds no state of this callback"):
        trainer([SparsityCallback(RULES["static"])]).fit(
            module(), Resumable(), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True
        )
    model = module()
    trainer([SparsityCallback(RULES["static"])]).fit(model, Resumable())
    with pytest.raises(ValueError, match=r"held by a mask already; call commit\(\)"):
        trainer([SparsityCallback(RULES["static"])]).fit(model, Resumable())

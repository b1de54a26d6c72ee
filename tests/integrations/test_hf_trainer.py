"""SparsityCallback in the real Trainer: masks hold, logs say so, checkpoints resume bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from resu.core.io import FileFormatError
from resu.core.mask_files import read_masks
from resu.training import Magnitude, Static
from tests.integrations.runs import RULES, same_bits
from tests.training.test_sparsifier import zeros_are_exact

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from resu.formats.validate import validate  # noqa: E402
from resu.integrations.hf_trainer import SparsityCallback  # noqa: E402


def tiny(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, n: int = 64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(40, (n, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class ExactZeros(transformers.TrainerCallback):  # type: ignore[misc]
    """Looks after every optimizer step."""

    def __init__(self, callback: SparsityCallback) -> None:
        self.callback = callback
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        zeros_are_exact(kwargs["model"], self.callback.sparsifier)


def trainer(folder: Path, callback: SparsityCallback | None, model: Any = None, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
        "save_steps": 5,
        "logging_steps": 3,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(**{**given, **changes})
    return transformers.Trainer(
        model=tiny() if model is None else model,
        args=arguments,
        train_dataset=Tokens(),
        eval_dataset=Tokens(8),
        callbacks=[] if callback is None else [callback, ExactZeros(callback)],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_torch", "gradient_accumulation_steps": 4},
        {"optim": "adamw_torch_fused", "bf16": True},
        {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.5},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:40],
)
def test_two_lines_and_zeros_stay_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    callback = SparsityCallback(RULES["resu"])
    run = trainer(tmp_path, callback, save_strategy="no", **changes)
    run.train()
    assert run.callback_handler.callbacks[-2].steps == run.state.global_step == callback.sparsifier.step == 12
    assert round(callback.sparsifier.sparsity, 3) == 0.8
    assert callback.sparsifier.optimizer is run.optimizer.optimizer


@pytest.mark.parametrize("rule", RULES)
def test_resume_equals_uninterrupted(tmp_path: Path, rule: str) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = SparsityCallback(RULES[rule], seed=3)
    straight = trainer(tmp_path, whole, **options)
    straight.train()
    assert {f.name for f in tmp_path.glob("checkpoint-5/sparsifier*")} == {"sparsifier.pt"}

    again = SparsityCallback(RULES[rule], seed=3)
    resumed = trainer(tmp_path, again, tiny(seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.sparsifier.step == 12
    assert same_bits(straight.model, resumed.model)
    assert again.sparsifier.masks == whole.sparsifier.masks
    assert again.sparsifier.report() == whole.sparsifier.report()


def test_a_run_that_was_stopped_resumes_in_the_same_trainer_and_from_another_folder(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == 7

    straight = trainer(tmp_path / "a", SparsityCallback(RULES["magnitude"]))
    straight.train()
    callback = SparsityCallback(RULES["magnitude"])
    stopped = trainer(tmp_path / "b", callback)
    stopped.add_callback(Stop)
    stopped.train()
    assert stopped.state.global_step == 7
    stopped.remove_callback(Stop)

    shutil.copytree(tmp_path / "b" / "checkpoint-7", tmp_path / "moved")
    stopped.train(resume_from_checkpoint=True)
    assert same_bits(straight.model, stopped.model)

    shutil.rmtree(tmp_path / "b")
    elsewhere = trainer(tmp_path / "c", SparsityCallback(RULES["magnitude"]))
    with pytest.raises(FileNotFoundError, match=r"resumes at step 7.*SparsityCallback\(resume_from=…\)"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "moved"))
    moved = SparsityCallback(RULES["magnitude"], resume_from=tmp_path / "moved")
    elsewhere = trainer(tmp_path / "c", moved)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert same_bits(straight.model, elsewhere.model)


def test_a_state_of_other_weights_is_found_out(tmp_path: Path) -> None:
    trainer(tmp_path / "a", SparsityCallback(RULES["resu"], seed=0), learning_rate=1e-2).train()
    trainer(tmp_path / "b", SparsityCallback(RULES["resu"], seed=0), learning_rate=3e-2, seed=9).train()
    mixed = trainer(tmp_path / "a", SparsityCallback(RULES["resu"], resume_from=tmp_path / "b" / "checkpoint-5"))
    with pytest.raises(ValueError, match="belongs to other weights than those that were loaded: 'model"):
        mixed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))


def test_logs_have_sparsity_also_where_reports_go(tmp_path: Path) -> None:
    class Reports(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    callback, reports = SparsityCallback(RULES["magnitude"], prefix="net/"), Reports()
    run = trainer(tmp_path, None, eval_strategy="steps", eval_steps=6, save_strategy="no")
    run.add_callback(reports)
    assert callback.attach(run).attach(run) is callback
    result = run.train()
    logged = {entry["step"]: entry["net/sparsity"] for entry in run.state.log_history if "loss" in entry}
    assert sorted(logged) == [3, 6, 9, 12]
    assert logged[3] < logged[6] < logged[9] == pytest.approx(callback.sparsifier.sparsity) == logged[12]
    assert all(("net/explored" in entry) == ("loss" in entry or "train_loss" in entry) for entry in reports.seen)
    assert not any("net/sparsity" in entry for entry in run.state.log_history if "eval_loss" in entry)
    assert result.metrics["net/sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_the_best_model_comes_back_with_its_masks(tmp_path: Path) -> None:
    callback = SparsityCallback(RULES["magnitude"], save_masks=True)
    run = trainer(
        tmp_path,
        callback,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first, for this test
        learning_rate=0.3,
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert callback.sparsifier.step == 3
    assert callback.sparsifier.sparsity < 0.6
    zeros_are_exact(run.model, callback.sparsifier)
    assert read_masks(tmp_path / "masks.safetensors")[0] == callback.sparsifier.masks
    before = [p.detach().clone() for p in run.model.parameters()]
    callback.sparsifier.commit()
    assert all(torch.equal(x, y) for x, y in zip(before, run.model.parameters(), strict=True))


def test_masks_lie_beside_the_model(tmp_path: Path) -> None:
    callback = SparsityCallback(Static(sparsity=0.5), save_masks=True, pattern="2:4", exclude="lm_head")
    run = trainer(tmp_path, callback)
    run.train()
    run.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        masks, header = read_masks(folder / "masks.safetensors")
        assert masks == callback.sparsifier.masks
        assert header["metadata"]["sparsity"] == 0.5
        assert validate(folder)["ok"]


def test_a_tied_weight_has_its_mask_under_the_name_that_is_stored(tmp_path: Path) -> None:
    class Tied(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.PretrainedConfig
        _tied_weights_keys: ClassVar[dict[str, str]] = {"first.weight": "second.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.post_init()

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.second(torch.relu(self.first(input_ids / 40))).square().mean()}

    callback = SparsityCallback(Static(sparsity=0.5), save_masks=True)
    run = trainer(tmp_path, callback, Tied(transformers.PretrainedConfig(tie_word_embeddings=True)))
    run.train()
    assert list(callback.sparsifier.masks) == ["first.weight"]
    assert list(read_masks(tmp_path / "checkpoint-5" / "masks.safetensors")[0]) == ["second.weight"]
    assert validate(tmp_path / "checkpoint-5")["ok"]


def test_steps_that_the_scaler_skips_are_none_and_resume(tmp_path: Path) -> None:
    class Overflow(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.layer = kwargs["model"].lm_head

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (2, 7):
                self.layer.weight.grad[0, 0] = torch.inf

    models = []
    for folder in (None, str(tmp_path / "checkpoint-5")):
        callback = SparsityCallback(RULES["resu"])
        run = trainer(tmp_path, callback, tiny(seed=len(models)), max_grad_norm=0)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # fp16 has one on other devices
        run.add_callback(Overflow)
        run.train(resume_from_checkpoint=folder)
        assert (callback.sparsifier.step, run.state.global_step) == (10, 12)
        models.append(run.model)
    assert same_bits(*models)


def test_a_second_train_begins_anew(tmp_path: Path) -> None:
    callback = SparsityCallback(lambda steps: Magnitude(sparsity=0.5, end_step=steps // 2, interval=2))
    run = trainer(tmp_path, callback, save_strategy="no")
    run.train()
    first = callback.sparsifier
    assert first.algorithm.end_step == 6
    run.train()
    assert callback.sparsifier is not first
    assert callback.sparsifier.step == 12
    assert callback.sparsifier.optimizer is run.optimizer.optimizer


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got the class Static"):
        SparsityCallback(Static)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown option 'patern'; known: pattern, distribution, include"):
        SparsityCallback(RULES["static"], patern="2:4")
    with pytest.raises(RuntimeError, match="made when training begins"):
        _ = SparsityCallback(RULES["static"]).sparsifier
    with pytest.raises(TypeError, match="must return a topology rule, got 6"):
        trainer(tmp_path, SparsityCallback(lambda steps: steps // 2)).train()  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="training starts at step 0"):
        trainer(tmp_path, SparsityCallback(RULES["static"], resume_from=tmp_path)).train()
    with pytest.raises(ValueError, match=r"matches no weight"):
        trainer(tmp_path, SparsityCallback(RULES["static"], include="nothing")).train()

    trainer(tmp_path, SparsityCallback(RULES["static"])).train()
    other = trainer(tmp_path, SparsityCallback(RULES["resu"]))
    with pytest.raises(ValueError, match="other settings"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-12" / "sparsifier.pt").write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match=r"checkpoint-12/sparsifier.pt is damaged"):
        trainer(tmp_path, SparsityCallback(RULES["static"])).train(resume_from_checkpoint=True)

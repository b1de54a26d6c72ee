"""The Trainer of transformers as fine-tuning needs it: only what trains has an optimizer, nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu.core.sharding import whole
from resu.integrations.finetune.batches import Collator
from resu.integrations.finetune.checkpoint import read_state, write_state
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.data import Row
from resu.integrations.finetune.evaluate import evaluate
from resu.integrations.finetune.loss import mean_loss
from resu.integrations.finetune.optimizer_parts import read_part, write_part
from resu.integrations.finetune.optimizers import make_optimizer, trained
from resu.integrations.finetune.prepared import Prepared
from resu.modules.base import RESUModule
from resu.training.wrappers import plain_optimizer

try:
    import accelerate  # noqa: F401
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise ImportError(
        "this needs transformers and accelerate: pip install 'resu-torch[hf,accelerate]'", name=error.name
    ) from error

__all__ = ["FinetuneTrainer", "make_arguments", "make_trainer"]

_LOGS = 100  # lines in a whole run
_NEVER = 10**12
_SCHEDULER = "scheduler.pt"  # as the Trainer calls it


def make_arguments(config: FinetuneConfig, work: Path, steps: int) -> TrainingArguments:
    """The arguments of the Trainer that a configuration comes to."""
    use_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.step_size,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(config.warmup * steps),
        bf16=config.autocast == "bfloat16",
        logging_steps=max(1, steps // _LOGS),
        logging_nan_inf_filter=False,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or _NEVER,
        save_total_limit=2,
        eval_strategy="no" if config.evaluate_steps is None else "steps",
        eval_steps=config.evaluate_steps,
        seed=config.seed,
        use_cpu=use_cpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # codes, masks and scales are the same everywhere and stay so
        ddp_backend="gloo" if use_cpu and "RANK" in os.environ else None,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # copies of a model in one process know no masks
    return arguments


class FinetuneTrainer(Trainer):
    """Trains what a method prepared, and measures as :func:`resu.integrations.finetune.evaluate.evaluate` does.

    A model that is sharded (:mod:`resu.integrations.finetune.sharding`) is taken as it is: accelerate neither moves nor
    wraps it, and a checkpoint has been read before.

    Checkpoints hold the state of the model in its present modes (:mod:`resu.integrations.finetune.checkpoint`), and a
    run that goes on from one equals one that was never stopped, bit for bit.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: FinetuneConfig,
        validation: Sequence[Row],
        collator: Collator,
        **options: Any,
    ) -> None:
        self.prepared, self.config, self.validation, self.collator = prepared, config, validation, collator
        super().__init__(model=prepared.model, data_collator=collator, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Over parameters that require a gradient, without those of layers that update themselves."""
        if self.optimizer is None:
            own = [p for layer in self.prepared.self_updating if (p := layer.theta) is not None]
            self.optimizer = make_optimizer(trained(self.prepared.model, own), self.config)
        return self.optimizer

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Loss and metric of the validation samples, each name after ``eval_``."""
        found = evaluate(self.prepared.model, self.validation, self.collator, self.config.batch_size)
        metrics = {f"eval_{name}": value for name, value in found.items() if name != "count"}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the state of the model into a checkpoint."""
        if self.config.shard or self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            write_state(self.prepared.model, folder, writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.config.shard:
            read_state(self.prepared.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.config.shard:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write_part(self._plain_optimizer(), Path(output_dir), self.args.process_index, self.args.world_size)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.config.shard or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read_part(self._plain_optimizer(), Path(checkpoint), self.args.process_index, self.args.world_size)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:  # the file that says that a checkpoint is whole comes next
            torch.distributed.barrier()

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return plain_optimizer(self.optimizer)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.config.shard:
            super()._move_model_to_device(model, device)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return _number(super()._clip_grad_norm(model))  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return _number(super()._get_grad_norm(model, grad_norm=grad_norm))  # type: ignore[no-untyped-call]

    def take_sharded(self) -> None:
        """Have accelerate add autocast to a sharded model, and nothing else."""
        model = self.prepared.model
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        model._is_accelerate_prepared = True


def _number(norm: Any) -> Any:
    """A norm over parts of all processes as a plain tensor."""
    return whole(norm) if isinstance(norm, torch.Tensor) else norm


class _Epochs(TrainerCallback):
    """Tells the collator which epoch it is, and self-updating layers the present step size."""

    def __init__(self, collator: Collator, layers: Sequence[RESUModule], config: FinetuneConfig) -> None:
        self.collator, self.layers, self.config = collator, layers, config

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.layers:
            rate = kwargs["lr_scheduler"].get_last_lr()[0]
            for layer in self.layers:
                now = layer.settings  # entering again with another step size keeps θ
                layer.enter_qresu_selective_mode(
                    now.bits, now.epsilon, now.qscheme, now.selective_config, rate, now.weight_decay,
                    theta_dtype=now.theta_dtype,
                )  # fmt: skip


def make_trainer(
    prepared: Prepared,
    config: FinetuneConfig,
    arguments: TrainingArguments,
    rows: Sequence[Row],
    validation: Sequence[Row],
    collator: Collator,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneTrainer:
    """A trainer over samples; self-updating layers get the step size of its schedule."""
    if prepared.self_updating:
        own = {id(layer.theta) for layer in prepared.self_updating}
        # These layers average their gradients themselves, so that DDP must not wait for them.
        prepared.model._ddp_params_and_buffers_to_ignore = [
            name for name, p in prepared.model.named_parameters() if id(p) in own
        ]
    trainer = FinetuneTrainer(
        prepared,
        config,
        validation,
        collator,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(validation),
        compute_loss_func=None if collator.task == "causal-lm" else mean_loss,
        callbacks=[_Epochs(collator, prepared.self_updating, config), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if config.shard:
        trainer.take_sharded()
    return trainer

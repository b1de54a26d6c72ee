"""One fine-tuning run, from a directory and a text to a directory: what ``resu finetune`` does."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resu.core.mask_files import write_masks
from resu.core.randomness import derived_seed
from resu.integrations.finetune.batches import Collator
from resu.integrations.finetune.callbacks import Interrupted, Interrupts, LogFile, MemoryWatch, ShownProgress
from resu.integrations.finetune.checkpoint import read_state
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.data import Examples, Row, has_labels, label_names, read_examples, rows_of, split
from resu.integrations.finetune.evaluate import METRICS, evaluate
from resu.integrations.finetune.launch import as_launched, own_sharding, processes
from resu.integrations.finetune.masks import carried, settle_masks, target_names
from resu.integrations.finetune.model import MASK_FILE, LoadedModel, load_for_task, settle_task, usual_length
from resu.integrations.finetune.prepared import Masks, Prepared, prepare, trained_values
from resu.integrations.finetune.save import ADAPTER, LOG, save_adapter, save_run
from resu.integrations.finetune.sharding import Sharding, shard
from resu.integrations.finetune.trainer import FinetuneTrainer, make_arguments, make_trainer
from resu.integrations.finetune.work import Work
from resu.integrations.folders import alone, check_apart, check_free
from resu.integrations.hf import check_directory, quiet

__all__ = ["Interrupted", "finetune"]

Progress = Callable[[int, int, str], None]


def finetune(
    config: FinetuneConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_adapter: bool = False,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune a Hugging Face directory into a new one that ``from_pretrained`` loads.

    Under ``torchrun`` every process takes its part of each batch, and the first one writes. With ``config.shard``, or
    under ``accelerate launch --use_fsdp --fsdp_version 2``, they divide the model among them while it trains (FSDP2).

    Args:
        config: What, on what, how.
        out: The folder to write; while it trains, ``OUT.training`` beside it holds log and checkpoints.
        resume: Go on with an interrupted run; the result is that of a run that was never stopped, bit for bit.
        overwrite: Whether an earlier result, or an interrupted run, may be replaced.
        keep_adapter: Also write the low-rank updates by themselves, as ``OUT/adapter`` (``lora``, ``sparse-lora``).
        max_shard_size: Largest weight file.
        progress: Called with (done, total, what).

    Returns:
        The report, which is ``run.json`` too: ``settings``; ``task``, ``labels``; ``evaluation`` with ``metric``,
        ``source``, ``start``, ``end`` and ``saved`` (loss and metric of the model as it was, as training began, as it
        ended, and as it was saved); ``sparsity`` of what was saved; ``trained`` and ``parameters`` (counts);
        ``memory`` (:class:`MemoryWatch <resu.integrations.finetune.callbacks.MemoryWatch>`); ``steps``, ``seconds``,
        ``notes``, ``bytes``.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: Before anything is trained, on what cannot be meant.
        Interrupted: If it was stopped; a checkpoint is there.
        FloatingPointError: If the loss is no finite number.
    """
    config = as_launched(config)
    if keep_adapter and config.method not in ("lora", "sparse-lora"):
        raise ValueError(f"{config.method!r} trains no adapter that could be kept; lora and sparse-lora do")
    mask = None if config.mask in (None, "zeros") else config.mask
    check_apart(out, config.source, config.data, config.validation, mask)
    check_free(out, overwrite=overwrite)
    with alone(out), quiet(), own_sharding():
        work = Work(out, config, resume=resume, overwrite=overwrite)
        job = _Job.read(config, work, progress)
        try:
            report = job.train()
            adapter = job.adapter() if keep_adapter else None
            return job.save(report, out, adapter, max_shard_size, overwrite)
        except BaseException:
            if job.arguments.should_save:
                work.abandon()
            raise
        finally:
            job.close()


@dataclass
class _Job:
    """Everything of one run that is read and made before it trains."""

    config: FinetuneConfig
    work: Work
    loaded: LoadedModel
    rows: list[Row]
    validation: list[Row]
    collator: Collator
    arguments: Any
    names: list[str]
    progress: Progress | None
    parameters: int
    prepared: Prepared | None = None
    sharding: Sharding | None = None
    interrupts: Interrupts | None = None
    acted_on: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: FinetuneConfig, work: Work, progress: Progress | None) -> _Job:
        labelled = config.task == "classification" or (
            config.task == "auto" and has_labels(config.data, config.encoding)
        )
        config = replace(config, task=settle_task(config.task, config.source, labelled))
        train, held_out = _examples(config, labelled)
        names: list[str] = []
        if train.labels is not None:
            known = check_directory(config.source).get("label2id")
            labels = train.labels if config.validation is not None else [*train.labels, *(held_out.labels or [])]
            names = label_names(labels, known, config.data)
            _check_head(names, known)
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        loaded = load_for_task(config.source, config.task, names=names, dtype=dtype, seed=config.seed)
        length = usual_length(loaded.tokenizer, loaded.model, config.length)
        strung = config.task == "causal-lm"
        rows, validation = (
            rows_of(loaded.tokenizer, part, length, names=names, strung=strung) for part in (train, held_out)
        )
        collator = Collator(loaded.tokenizer, config.task, config.seed)
        each = math.ceil(math.ceil(len(rows) / (config.batch_size * processes())) / config.accumulate)
        steps = config.steps or max(1, math.ceil(config.epochs * each))
        arguments = make_arguments(config, work.folder, steps)
        parameters = sum(p.numel() for p in loaded.model.parameters())
        return cls(config, work, loaded, rows, validation, collator, arguments, names, progress, parameters)

    def measure(self, model: Any) -> dict[str, float]:
        """Loss and metric of a model on the validation samples."""
        if self.sharding is None:
            model.to(self.arguments.device)
        return evaluate(model, self.validation, self.collator, self.config.batch_size, self.progress)

    def train(self) -> dict[str, Any]:
        """Prepare and train; what is there to say of it."""
        self._wait()  # each process has looked before the first one writes
        if self.arguments.should_save:
            self.work.begin()
        self._wait()
        config, model = self.config, self.loaded.model
        before = self.work.start()
        source = self.measure(model) if before is None and config.compare else None
        model.to("cpu")
        masks: Masks = {}
        if config.masks:
            file = self.work.folder / MASK_FILE
            known = file if file.is_file() else None
            self._wait()
            masks = settle_masks(self.loaded, config, self.rows, self.collator, known)
            if known is None and self.arguments.should_save:
                write_masks(masks, file)
        targets = target_names(self.loaded, config)[0] if config.method == "lora" else []
        self.acted_on = (*masks, *targets)
        torch.manual_seed(derived_seed(config.seed, "prepare"))  # θ and low-rank factors may start at random
        self.prepared = prepare(self.loaded, masks, targets, config)
        if config.gradient_checkpointing:
            # The older name is about to go.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trained = trained_values(self.prepared)
        checkpoint = self.work.checkpoint()
        if config.shard:
            if checkpoint is not None:
                read_state(self.prepared.model, checkpoint)
            self.sharding = shard(self.prepared, self.arguments.device)
        if before is None:
            before = {"source": source, "start": self.measure(self.prepared.model)}
            if self.arguments.should_save:
                self.work.note_start(before)
        memory, trainer = MemoryWatch(), None
        started = time.monotonic()
        with Interrupts() as self.interrupts:
            trainer = self._trainer(memory)
            try:
                with warnings.catch_warnings():
                    # accelerate hands DDP an option by the name that torch is about to change
                    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                memory.close()
            if self.interrupts.stopped_at is not None:
                raise Interrupted(f"stopped after step {self.interrupts.stopped_at} of {self.arguments.max_steps}")
        end = self.measure(self.prepared.model)
        if self.sharding is not None:
            self.sharding.gather()
            self.sharding = None
        return {
            "method": config.method,
            "task": config.task,
            "labels": self.names,
            "settings": config.to_json(),
            "evaluation": {"metric": METRICS[config.task], **before, "end": end},
            "trained": trained,
            "parameters": self.parameters,
            "memory": memory.report(),
            "steps": trainer.state.global_step,
            "seconds": time.monotonic() - started,
            "notes": self.prepared.notes,
        }

    def _trainer(self, memory: MemoryWatch) -> FinetuneTrainer:
        assert self.prepared is not None
        assert self.interrupts is not None
        callbacks: list[Any] = [self.interrupts, memory, LogFile(self.work.folder / LOG)]
        if self.progress is not None:
            callbacks.append(ShownProgress(self.progress))
        return make_trainer(
            self.prepared, self.config, self.arguments, self.rows, self.validation, self.collator, callbacks
        )

    def adapter(self) -> Path:
        """Write the adapter, before it is merged."""
        assert self.prepared is not None
        folder = self.work.folder / ADAPTER
        if self.arguments.should_save:
            save_adapter(self.prepared, folder)
        return folder

    def save(
        self, report: dict[str, Any], out: Any, adapter: Path | None, max_shard_size: str, overwrite: bool
    ) -> dict[str, Any]:
        """Make the plain model, measure it once more and write it."""
        assert self.prepared is not None
        model, masks = self.prepared.finish()
        more, notes = carried(self.loaded, self.config, model, masks, self.acted_on)
        masks, report["notes"] = masks | more, [*report["notes"], *notes]
        pruned, numel = sum(m.n_pruned for m in masks.values()), sum(m.numel for m in masks.values())
        report["sparsity"] = pruned / numel if masks else 0.0
        if self.config.compare:
            report["evaluation"]["saved"] = self.measure(model)
        model.to("cpu")
        if self.arguments.should_save:
            report = save_run(
                model,
                self.loaded.tokenizer,
                {name: mask.to("cpu") for name, mask in masks.items()},
                report,
                self.config.source,
                out,
                log=self.work.folder / LOG,
                adapter=adapter,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
            )
            self.work.remove()
        self._wait()
        return report

    def _wait(self) -> None:
        """Until all processes are here."""
        if self.arguments.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Let go of what holds weights."""
        if self.prepared is not None:
            for constraint in self.prepared.constraints:
                constraint.remove()


def _examples(config: FinetuneConfig, labelled: bool) -> tuple[Examples, Examples]:
    """Training and validation samples; one strung text is divided where the share says, its end held out."""
    options: dict[str, Any] = {
        "labelled": labelled,
        "lines": config.task == "masked-lm",
        "encoding": config.encoding,
    }
    examples = read_examples(config.data, **options)
    if config.validation is not None:
        return examples, read_examples(config.validation, **options)
    if len(examples) > 1 or examples.labels is not None:
        return split(examples, config.validation_share, config.seed)
    text = examples.texts[0]
    at = len(text) - max(1, round(len(text) * config.validation_share))
    at = text.find("\n", at) + 1 or at  # no line is cut, where there are lines
    return Examples([text[:at]]), Examples([text[at:]])


def _check_head(names: list[str], known: Mapping[str, int] | None) -> None:
    """Refuse a head made for as many other classes: it would be taken over, its rows meaning something else."""
    other = [] if known is None else [name for name in known if not name.startswith("LABEL_")]
    if len(other) == len(names) and set(other) != set(names):
        raise ValueError(
            f"the model's head was made for the classes {', '.join(other[:8])}, the data has {', '.join(names[:8])}; "
            "rename the labels, or remove id2label and label2id from config.json to train this head on other classes"
        )

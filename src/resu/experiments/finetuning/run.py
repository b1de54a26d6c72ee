"""One run: fine-tune, judge, and measure what it held and what it needed."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resu import __version__
from resu.core.peak_memory import measure_memory
from resu.experiments.finetuning.tasks import Batch, Task
from resu.experiments.finetuning.ways import KINDS, Prepared, Way, prepare
from resu.modules.convert import get_resu_modules
from resu.modules.settings import RESUMode
from resu.training.adamw8bit import AdamW8bit, forget_draws
from resu.training.update_in_backward import optimizer_in_backward

__all__ = ["HEAD_LR", "Row", "held_bytes", "measure", "run"]

#: Of the head, in every way.
HEAD_LR = 1e-3


@dataclass(frozen=True)
class Row:
    """One fine-tuned model; a line of the CSV.

    Attributes:
        task: Name of the task.
        kind: Name of the kind of way.
        size: See :class:`~resu.experiments.finetuning.ways.Way`.
        seed: Of the head, the order of batches and dropout.
        steps: Optimizer steps.
        lr: Learning rate at its highest; that of the head is :data:`HEAD_LR` at most.
        part: What it was judged by, ``"dev"`` or ``"test"``; or ``"memory"``: it was not trained.
        metric: ``"accuracy"`` in percent, or ``"loss"``.
        value: Of the metric.
        trained: Values that train.
        state_bytes: Held between steps: weights, codes, masks, θ, adapters, optimizer state.
        peak_bytes: The most that was held during a step on the example batch.
        lean_bytes: The same with gradient checkpointing, and with updates in the backward pass.
        seconds: Of training, processor time of one thread (of the host, on a GPU).
        torch: Its version.
        resu: The version of this library.
        device: Where it ran and memory was measured.
    """

    task: str
    kind: str
    size: float
    seed: int
    steps: int
    lr: float
    part: str
    metric: str
    value: float
    trained: int
    state_bytes: int
    peak_bytes: int
    lean_bytes: int
    seconds: float
    torch: str
    resu: str
    device: str = "cpu"


def held_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of all dense tensors that are alive in this process on a kind of device, each storage once."""
    gc.collect()
    kind = torch.device(device).type  # not "meta", where those of a dry run are, whatever their tensors say
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # A tensor that wraps others has a storage of the size it stands for, and holds nothing itself.
        if not issubclass(type(thing), Tensor) or is_traceable_wrapper_subclass(thing):
            continue
        if thing.layout is torch.strided:  # sparse ones are made within a step
            storage = thing.untyped_storage()
            if storage.device.type == kind:
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _optimizers(prepared: Prepared, way: Way, lr: float, *, in_backward: bool = False) -> list[Optimizer]:
    """One for what the way trains, one for the head, neither with weight decay."""

    def theta(parameters: Any) -> Optimizer:
        if KINDS[way.kind].eight_bits:
            return AdamW8bit(parameters, lr=lr, weight_decay=0.0)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=fused)

    def head(parameters: Any) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=HEAD_LR, weight_decay=0.0, fused=fused)

    # On CUDA the default works on all parameters at once and holds as much again for it.
    fused = any(p.is_cuda for p in (*prepared.adapter, *prepared.head)) or None

    pairs = [(ps, make) for ps, make in ((prepared.adapter, theta), (prepared.head, head)) if ps]
    return [optimizer_in_backward(ps, make) if in_backward else make(ps) for ps, make in pairs]


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: up over the first tenth, then down in a line."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def _step(model: nn.Module, batch: Batch, optimizers: list[Optimizer]) -> float:
    loss: Tensor = model(**batch).loss
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _set_rates(model: nn.Module, optimizers: list[Optimizer], rates: list[float], share: float, lr: float) -> None:
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * share
    for layer in get_resu_modules(model).values():
        if layer.mode is RESUMode.QRESU_SELECTIVE:
            now = layer.settings
            layer.enter_qresu_selective_mode(
                now.bits, now.epsilon, now.qscheme, lr=lr * share, theta_dtype=now.theta_dtype
            )


def measure(task: Task, way: Way, seed: int, lr: float, *, lean: bool) -> tuple[int, int]:
    """Bytes that are held between steps, and at the peak of a step on the task's example.

    Args:
        task: What is learned.
        way: How.
        seed: Of the head.
        lr: The learning rate.
        lean: With gradient checkpointing, and updates in the backward pass.
    """
    forget_draws()  # of another run in this process: they would count as there before
    before = held_bytes(task.device)
    prepared = prepare(task.model(seed), task, way, lr)
    model: Any = prepared.model
    model.train()
    if lean:
        # Its new name, or that of transformers before 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    optimizers, batch = _optimizers(prepared, way, lr, in_backward=lean), task.example()
    _step(model, batch, optimizers)  # the first makes the optimizers' state
    held = held_bytes(task.device) - before
    with measure_memory(task.device) as used:
        _step(model, batch, optimizers)
    return held, held + used.peak


def run(task: Task, way: Way, seed: int, steps: int, lr: float, part: str, *, measured: bool = True) -> Row:
    """Fine-tune, measure and judge.

    Args:
        task: What is learned.
        way: How.
        seed: Of the head, the order of batches and dropout.
        steps: Optimizer steps.
        lr: The highest learning rate of what the way trains.
        part: What the model is judged by.
        measured: Whether memory is measured (in a model of its own, before).
    """
    held = peak = lean = 0
    if measured:
        held, peak = measure(task, way, seed, lr, lean=False)
        _, lean = measure(task, way, seed, lr, lean=True)
    prepared = prepare(task.model(seed), task, way, lr)
    optimizers = _optimizers(prepared, way, lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    torch.manual_seed(seed)
    prepared.model.train()
    begin = time.process_time()
    for step, batch in enumerate(task.batches(seed, steps)):
        _set_rates(prepared.model, optimizers, rates, _share(step, steps), lr)
        _step(prepared.model, batch, optimizers)
    seconds = time.process_time() - begin
    value = math.nan if part == "memory" else round(task.evaluate(prepared.model, part), 4)
    trained = sum(p.numel() for p in (*prepared.adapter, *prepared.head))
    if way.kind == "selective":  # θ trains itself
        layers = get_resu_modules(prepared.model).values()
        trained = sum(p.numel() for p in prepared.head) + sum(int(one.theta_values().numel()) for one in layers)
    return Row(
        task=task.name,
        kind=way.kind,
        size=way.size,
        seed=seed,
        steps=steps,
        lr=lr,
        part=part,
        metric=task.metric,
        value=value,
        trained=trained,
        state_bytes=held,
        peak_bytes=peak,
        lean_bytes=lean,
        seconds=round(seconds, 2),
        torch=torch.__version__,
        resu=__version__,
        device=torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else task.device.type,
    )

"""One training run: a plain loop, and a folder that says what happened in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resu.core.randomness import derived_seed
from resu.experiments.data import Batch, TrainingData, load
from resu.experiments.train.config import Config
from resu.experiments.train.evaluation import evaluate, metric_of
from resu.experiments.train.finish import finish
from resu.experiments.train.folder import CHECKPOINT, claim, look
from resu.experiments.train.interrupt import Interrupted, Interrupts
from resu.experiments.train.logs import Entry, Logs, check_tensorboard
from resu.experiments.train.lost import watched
from resu.experiments.train.placement import placed
from resu.experiments.train.result import Result
from resu.experiments.train.state import State
from resu.experiments.train.stream import stream

__all__ = ["Event", "run"]

Event = Callable[[str, dict[str, Any]], None]


def _silent(name: str, about: dict[str, Any]) -> None:
    """Nobody listens."""


def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    on_event: Event = _silent,
) -> Result:
    """Train once, measure, and write everything into a folder.

    ``config.json``, ``log.csv`` and ``checkpoint.safetensors`` while it goes on; ``result.json``, ``model.safetensors``
    and ``masks.safetensors`` at the end. With one thread on a CPU all of it but the seconds follows from the
    configuration, for a run that was stopped and went on as for one that was not.

    Args:
        config: What to train and how.
        out: The folder.
        resume: Go on from the folder's checkpoint (from the beginning, if the run was stopped before the first one); a
            finished run gives its result.
        force: Whether files of an earlier run may be replaced.
        on_event: Told of ``"start"``, each ``"step"``, each ``"log"`` (with the fields of its row) and each
            ``"evaluate"``.

    Raises:
        ConfigError: If the configuration cannot be carried out, or is not that of the run to go on with.
        FileExistsError: If the folder is taken.
        FloatingPointError: If the loss is no number any more.
        Interrupted: After Ctrl-C, with a checkpoint written.
        LostProcess: If one of several processes ended.
    """
    out = Path(out)
    with placed(config.compute) as placement:
        finished = look(out, config, resume, force)
        if finished is not None:
            return finished
        # Whatever can be refused is refused here, before the folder is touched.
        check_tensorboard(config.log.tensorboard)
        data = load(config.data.name, config.data.dir, **config.data.options)
        state = State(config, data, placement)
        if resume and (out / CHECKPOINT).is_file():
            state.load(out / CHECKPOINT)
        batches = stream(data, config, state.step, placement.ranks)
        claim(out, config, resume, placement.ranks)
        on_event("start", {"step": state.step, "steps": state.steps, "setting": str(state.setting)})
        logs = Logs(out, state.step, config.log.tensorboard, placement.ranks.rank == 0)
        with contextlib.closing(logs), watched(placement, state):
            _train(state, data, batches, out, logs, on_event)
            return finish(state, data, out)


def _train(
    state: State, data: TrainingData, batches: Iterator[list[Batch]], out: Path, logs: Logs, on_event: Event
) -> None:
    config, placement = state.config, state.placement
    every = config.log
    state.network.train()
    with Interrupts(placement) as interrupts:
        begin = time.perf_counter()
        while state.step < state.steps:
            lr = config.optimizer.lr * config.schedule.factor(state.step, state.steps)
            _step(state, next(batches), lr)
            state.step += 1
            on_event("step", {"step": state.step, "steps": state.steps})
            state.seconds += time.perf_counter() - begin
            last = state.step == state.steps
            measure = _due(state.step, every.evaluate_every) or (last and every.evaluate_every > 0)
            if measure or last or _due(state.step, every.every):
                logs.add(_entry(state, data, lr, measure, on_event))
            if interrupts.stops(state.step) and not last:
                state.save(out / CHECKPOINT)
                raise Interrupted(f"stopped after step {state.step} of {state.steps}")
            if _due(state.step, every.checkpoint_every) and not last:
                state.save(out / CHECKPOINT)
            begin = time.perf_counter()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _step(state: State, pieces: list[Batch], lr: float) -> None:
    """One optimizer step on one batch, in pieces."""
    config, placement = state.config, state.placement
    # What is random in a step follows from it, so there is no random state to save.
    torch.manual_seed(derived_seed(config.seed, "step", state.step, placement.ranks.rank))
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad()
    total = torch.zeros((), device=placement.device)
    for i, piece in enumerate(pieces, start=1):
        x, y = placement.inputs(*piece)
        alone = placement.ranks.world > 1 and i < len(pieces)
        with state.network.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with placement.autocast():
                loss = _loss(state.network(x), y, config.label_smoothing) / len(pieces)
            loss.backward()
        total += loss.detach()
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    state.optimizer.step()
    state.add_loss(total)


def _loss(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Cross entropy, for labels and for sequences alike."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=smoothing)


def _entry(state: State, data: TrainingData, lr: float, measure: bool, on_event: Event) -> Entry:
    """The figures of a step."""
    loss = state.mean_loss()
    if loss != loss or abs(loss) == float("inf"):
        raise FloatingPointError(
            f"the loss is {loss} at step {state.step}: lower optimizer.lr, or set clip_norm or schedule.warmup"
        )
    val = None
    if measure:
        on_event("evaluate", {"step": state.step})
        val = round(evaluate(state.model, data, "val", state.placement), 5)
    sparsity = 0.0 if state.sparsifier is None else state.sparsifier.sparsity
    entry = Entry(state.step, round(loss, 6), lr, round(sparsity, 6), val, round(state.seconds, 2))
    on_event("log", {**asdict(entry), "steps": state.steps, "metric": metric_of(data)})
    return entry

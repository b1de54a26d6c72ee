"""Sparse training in loops of Hugging Face accelerate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from resu.integrations.driving import STATE_FILE, Recipe, gathered_state, read_state, sparsity_metrics, write_state
from resu.training.algorithms.base import Algorithm
from resu.training.sparsifier import Sparsifier
from resu.training.wrappers import unwrap

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ImportError("this needs accelerate: pip install 'resu-torch[accelerate]'", name=error.name) from error

__all__ = ["prepare_sparsifier", "sparsity_metrics"]

# The drivers of each accelerator, with the handles of their hooks.
_made: WeakKeyDictionary[Accelerator, list[tuple[Sparsifier, tuple[Any, ...]]]] = WeakKeyDictionary()


def prepare_sparsifier(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, algorithm: Algorithm, **options: Any
) -> Sparsifier:
    """A driver for what ``accelerator.prepare`` returned; ``save_state`` and ``load_state`` carry it.

    Beside the files of accelerate lies ``sparsifier.pt`` (``sparsifier_1.pt`` for a second driver, as accelerate
    counts its own): tensors and plain values, and read as nothing else, while objects that are given to
    ``register_for_checkpointing`` are unpickled. A run that resumes by ``load_state`` equals the uninterrupted one bit
    for bit. Steps that the scaler skips, and micro-batches within ``accelerator.accumulate(model)``, are not counted.

    To log, ``accelerator.log(sparsity_metrics(sparsifier), step=…)``.

    Args:
        accelerator: The one that prepared model and optimizer.
        model: Prepared.
        optimizer: Prepared.
        algorithm: The topology rule.
        **options: ``pattern``, ``distribution``, ``include``, ``exclude``, ``seed``, as of
            :class:`~resu.training.sparsifier.Sparsifier`.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If model or optimizer is not prepared.

    Example:
        >>> import torch
        >>> from resu.training import Static
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Linear(8, 8)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        >>> prepare_sparsifier(accelerator, model, optimizer, Static(sparsity=0.5)).sparsity
        0.5
    """
    prepared = any(unwrap(model) is unwrap(one) for one in accelerator._models)
    if not (prepared and isinstance(optimizer, AcceleratedOptimizer)):
        got = optimizer if prepared else model
        raise ValueError(
            f"got a {type(got).__name__} that is not prepared; call model, optimizer = accelerator.prepare(model, "
            "optimizer) first and give what it returns"
        )
    sparsifier = Recipe(algorithm, options).make(model, optimizer)
    made = _made.setdefault(accelerator, [])
    _forget_freed(accelerator, made)
    name = f"_{len(made)}".join(os.path.splitext(STATE_FILE)) if made else STATE_FILE

    def save(models: Any, weights: Any, folder: str) -> None:
        state = gathered_state(sparsifier)  # on every rank
        everywhere = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if everywhere else accelerator.is_main_process:
            write_state(state, Path(folder) / name)

    def load(models: Any, folder: str) -> None:
        sparsifier.load_state_dict(read_state(Path(folder) / name))

    handles = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    made.append((sparsifier, handles))
    return sparsifier


def _forget_freed(accelerator: Accelerator, made: list[tuple[Sparsifier, tuple[Any, ...]]]) -> None:
    """Drop drivers of models that ``free_memory`` has let go: what is prepared next begins at the first file again."""
    prepared = [unwrap(model) for model in accelerator._models]
    for sparsifier, handles in list(made):
        if not any(sparsifier.model is model for model in prepared):
            made.remove((sparsifier, handles))
            for handle in handles:
                handle.remove()

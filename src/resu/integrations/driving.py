"""What integrations with training loops share: a driver made inside a loop of others, and its state in a file."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.io import FileFormatError, replacing
from resu.core.sharding import is_sharded, whole
from resu.training.algorithms.base import Algorithm
from resu.training.sparsifier import Sparsifier
from resu.training.wrappers import plain_optimizer

__all__ = [
    "STATE_FILE",
    "Recipe",
    "check_zeros",
    "gathered_state",
    "plain_optimizer",
    "read_state",
    "release",
    "sparsity_metrics",
    "write_state",
]

#: The state of a driver in the folder of a checkpoint.
STATE_FILE = "sparsifier.pt"


@dataclass(frozen=True)
class Recipe:
    """A driver that is yet to be made, once its loop has an optimizer and knows its length.

    Args:
        algorithm: A topology rule, or a function from the number of optimizer steps to one.
        options: Keyword arguments of :class:`~resu.training.sparsifier.Sparsifier`.

    Raises:
        TypeError: If the algorithm is neither, or an option is unknown.

    Example:
        >>> from resu.training import Magnitude
        >>> model = nn.Linear(8, 8)
        >>> recipe = Recipe(lambda steps: Magnitude(sparsity=0.5, end_step=steps // 2), {"distribution": "uniform"})
        >>> recipe.make(model, torch.optim.SGD(model.parameters()), 100).algorithm.end_step
        50
    """

    algorithm: Algorithm | Callable[[int], Algorithm]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.algorithm, type) or not (isinstance(self.algorithm, Algorithm) or callable(self.algorithm)):
            got = f"the class {self.algorithm.__name__}" if isinstance(self.algorithm, type) else repr(self.algorithm)
            raise TypeError(
                f"algorithm must be a topology rule such as Magnitude(sparsity=0.9), or a function from the number of "
                f"optimizer steps to one; got {got}"
            )
        known = [*inspect.signature(Sparsifier).parameters][3:]  # after model, optimizer and algorithm
        if unknown := [name for name in self.options if name not in known]:
            raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")

    def make(self, model: nn.Module, optimizer: Any, steps: float | None = None) -> Sparsifier:
        """The driver.

        Args:
            model: As the loop trains it.
            optimizer: Of the loop, wrapped or not.
            steps: Optimizer steps the loop will do; None or not finite: unknown.
        """
        algorithm = self.algorithm
        if not isinstance(algorithm, Algorithm):
            if steps is None or not 0 < steps < float("inf"):
                raise ValueError(
                    f"the algorithm is given as a function of the number of steps, which is not known here ({steps}); "
                    "limit the run, or give the rule itself"
                )
            algorithm = algorithm(int(steps))
            if not isinstance(algorithm, Algorithm):
                raise TypeError(f"the function of the number of steps must return a topology rule, got {algorithm!r}")
        return Sparsifier(model, plain_optimizer(optimizer), algorithm, **self.options)


def sparsity_metrics(sparsifier: Sparsifier, prefix: str = "") -> dict[str, float]:
    """What to log of a driver: ``sparsity``; ``explored``, the share of positions that were ever active (R_s of ITOP,
    arXiv 2102.02887); and ``grown``, the number of positions that the last topology update grew.

    Example:
        >>> from resu.training import Static
        >>> model = nn.Linear(8, 8)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters()), Static(sparsity=0.5))
        >>> sparsity_metrics(sparsifier, "model/")
        {'model/sparsity': 0.5, 'model/explored': 0.5, 'model/grown': 0.0}
    """
    report = sparsifier.report()
    return {
        f"{prefix}sparsity": report.sparsity,
        f"{prefix}explored": report.explored,
        f"{prefix}grown": float(report.grown),
    }


def release(sparsifier: Sparsifier | None) -> None:
    """End a driver of an earlier run, unless it was committed: what it zeroed stays zero and is free to move."""
    if sparsifier is not None:
        sparsifier.commit()


def gathered_state(sparsifier: Sparsifier) -> dict[str, Any]:
    """``sparsifier.state_dict()`` for one file: what is sharded over ranks is gathered, so every one of them must ask.

    Example:
        >>> from resu.training import Static
        >>> model = nn.Linear(8, 8)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters()), Static(sparsity=0.5))
        >>> gathered_state(sparsifier)["masks"]["weight"]["packed"].shape
        torch.Size([8, 1])
    """
    gathered: dict[str, Any] = _gather(sparsifier.state_dict())
    return gathered


def _gather(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _gather(one) for key, one in value.items()}
    return whole(value) if isinstance(value, Tensor) else value


def write_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a driver's :func:`gathered_state` to a file, whole or not at all; one that is there is replaced."""
    with replacing(path, overwrite=True) as temporary, open(temporary, "wb") as file:
        torch.save(dict(state), file)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_state` wrote. Nothing but tensors and plain values is read.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, something else, or a pickle with code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}: the checkpoint was written without a sparsifier")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileFormatError(f"{path} is damaged, or holds more than tensors and plain values; refused") from error
    if not isinstance(state, dict) or "masks" not in state:
        raise FileFormatError(f"{path} is not the state of a sparsifier")
    return state


def check_zeros(sparsifier: Sparsifier, where: object) -> None:
    """Find out whether the masks of a loaded state belong to the weights that were loaded.

    Raises:
        ValueError: If a weight is not zero where its mask prunes.
    """
    for name, mask in sparsifier.masks.items():
        weight = sparsifier.layers[name].weight.detach()
        if is_sharded(weight):  # its mask is gathered, and only a part of it lies here
            continue
        if wrong := int(torch.count_nonzero(mask.zero_(weight.clone(), active=True))):
            raise ValueError(
                f"{where} belongs to other weights than those that were loaded: {name!r} is not zero at {wrong} pruned "
                "positions; load model and sparsifier from the same checkpoint"
            )

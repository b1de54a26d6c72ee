"""How large a model is, and how long it takes: parameters, multiply-adds, seconds on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from resu.pruning.structured.running import call, plain_forward

__all__ = ["Latency", "count_macs", "count_parameters", "latencies", "time_in_turns"]


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters; tied ones once.

    Example:
        >>> count_parameters(nn.Linear(4, 3))
        15
    """
    return sum(p.numel() for p in model.parameters())


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-adds of one pass in products and convolutions, attention's among them; elementwise work is not counted.

    Args:
        model: Run once, in evaluation mode, without gradients.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.

    Example:
        >>> count_macs(nn.Linear(4, 3), torch.zeros(2, 4))
        24
    """
    counter = _Flops()
    with _evaluating(model), plain_forward(), counter:
        call(model, example_inputs)
    return counter.total // 2


class _Flops(TorchDispatchMode):
    """Counts by torch's formulas; unlike ``FlopCounterMode`` without hooks on modules, which not all models bear."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=out))
        return out


@dataclass(frozen=True)
class Latency:
    """Seconds of one pass of several models, measured in turns.

    Attributes:
        seconds: Median of each.
        ratios: Median over turns of each one's time over the first one's in the same turn.
    """

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]


def latencies(models: Sequence[nn.Module], example_inputs: Any, *, rounds: int = 15, seconds: float = 0.02) -> Latency:
    """Time models against each other, as a user would run them: evaluation mode, no gradients, threads as they are set.

    In each round every model is timed in turn, so that what slows the machine for a while slows all of them; medians
    over rounds leave out single stalls.

    Args:
        models: The first is what the others are compared with.
        example_inputs: What each is run on.
        rounds: How many.
        seconds: How long each model runs in a round, about; at least one pass.

    Raises:
        ValueError: Without models or rounds.

    Example:
        >>> small, large = nn.Linear(8, 8), nn.Sequential(*[nn.Linear(300, 300) for _ in range(9)])
        >>> latencies([small], torch.zeros(1, 8), rounds=3, seconds=0.001).ratios
        (1.0,)
    """
    with _evaluating(*models), torch.inference_mode():
        return time_in_turns([partial(call, model, example_inputs) for model in models], rounds=rounds, seconds=seconds)


def time_in_turns(calls: Sequence[Callable[[], object]], *, rounds: int = 15, seconds: float = 0.02) -> Latency:
    """Time functions against each other as :func:`latencies` does models.

    Args:
        calls: The first is what the others are compared with.
        rounds: How many.
        seconds: How long each runs in a round, about; at least one call.

    Raises:
        ValueError: Without functions or rounds.

    Example:
        >>> len(time_in_turns([lambda: None, lambda: sum(range(1000))], rounds=3, seconds=0.001).seconds)
        2
    """
    if not calls or rounds < 1:
        raise ValueError(f"give at least one thing to time and one round, got {len(calls)} and rounds={rounds!r}")
    counts = []
    for one in calls:
        one()  # first passes choose kernels and fill caches
        once = min(_timed(one, 1) for _ in range(3))
        counts.append(max(1, round(seconds / max(once, 1e-7))))
    turns = [[_timed(one, n) for one, n in zip(calls, counts, strict=True)] for _ in range(rounds)]
    medians = tuple(statistics.median(turn[i] for turn in turns) for i in range(len(calls)))
    ratios = tuple(statistics.median(turn[i] / turn[0] for turn in turns) for i in range(len(calls)))
    return Latency(medians, ratios)


def _timed(one: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        one()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times

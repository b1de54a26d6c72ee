"""The state of a driver as tensors and plain values, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from resu.core.counting import positions
from resu.core.mask import SparseMask
from resu.core.sharding import is_sharded, local, part_of, shard_like, whole
from resu.pruning.allocation import described
from resu.training.algorithms.base import Algorithm

if TYPE_CHECKING:
    from resu.training.held_layer import HeldLayer
    from resu.training.sparsifier import Sparsifier

__all__ = ["load", "save", "settings"]

_FORMAT = 2
_COUNTERS = ("keep", "reached", "explored", "grown", "grown_total", "forward_work", "update_work")


def settings(driver: Sparsifier) -> dict[str, Any]:
    """What two drivers must have in common for one to go on where the other stopped; plain values."""
    return {
        "algorithm": type(driver.algorithm).__name__,
        "options": {key: _plain(value) for key, value in dataclasses.asdict(driver.algorithm).items()},
        "pattern": repr(driver.pattern),
        "distribution": _plain(described(driver.distribution)),
        "seed": driver.seed,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def save(driver: Sparsifier) -> dict[str, Any]:
    """See ``Sparsifier.state_dict``."""
    held = driver._held

    def mask(one: HeldLayer, what: SparseMask) -> dict[str, Tensor]:
        weight = one.layer.weight
        # A copy: torch.distributed.checkpoint reads into the tensors of a state, and a mask is never written to.
        return {
            "packed": shard_like(what.packed.clone(), weight),
            "shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def tensors(attribute: str, dtype: torch.dtype | None, possible: bool) -> dict[str, Tensor]:
        found = {}
        for name, one in held.items():
            value, weight = getattr(one, attribute), one.layer.weight
            # torch.distributed.checkpoint reads into what is there: among processes, the same keys at every step.
            if value is None and possible and driver._agreement.group is not None:
                value = torch.zeros_like(one.weight, dtype=dtype)
            if value is not None:
                found[name] = shard_like(value.detach().clone(), weight)
        return found

    rule = driver.algorithm
    reaches = type(rule).reach is not Algorithm.reach
    return {
        "format": _FORMAT,
        "step": driver.step,
        "settings": settings(driver),
        "masks": {name: mask(one, one.constraint.mask) for name, one in held.items()},
        "explored": {name: mask(one, one.ever) for name, one in held.items()},
        "reach": {name: mask(one, one.reach or one.constraint.mask) for name, one in held.items() if reaches},
        "theta": tensors("theta", None, rule.learns_pruned),
        "momentum": tensors("momentum", torch.float32, rule.gradient_memory is not None),
        "counters": {name: torch.tensor([getattr(one, key) for key in _COUNTERS]) for name, one in held.items()},
    }


def load(driver: Sparsifier, state: Mapping[str, Any]) -> None:
    """See ``Sparsifier.load_state_dict``."""
    if driver.committed:
        raise RuntimeError(
            "this Sparsifier holds nothing since commit(); make another one and load the state into that"
        )
    _check(driver, state)
    held = driver._held

    def masks(key: str) -> dict[str, SparseMask]:
        return {
            name: SparseMask.from_packed(_mine(saved["packed"], held[name].layer.weight), held[name].weight.shape)
            for name, saved in state[key].items()
        }

    found = {key: masks(key) for key in ("masks", "explored", "reach")}
    # If the model was loaded before this driver was made, the pruning at step 0 took weights that the saved mask keeps:
    # give them back. If it was loaded since, the weights are the saved ones already.
    driver._give_back()
    driver.step = int(state["step"])
    driver._unclear = {}  # done in the saved run, unless it had not begun
    if driver.step == 0 and driver.algorithm.clears_state:
        driver._unclear = {name: positions(mask.mask.logical_not()) for name, mask in found["masks"].items()}
    learning = driver.algorithm.learns_pruned and driver.algorithm.learning(driver.step)
    for name, one in held.items():
        weight, full = one.weight, one.layer.weight
        one.constraint.mask = found["masks"][name].to(weight.device)
        one.ever = found["explored"][name].to(weight.device)
        reach = found["reach"].get(name) if learning else None
        one.reach = one.constraint.gradient_mask = None if reach is None else reach.to(weight.device)
        theta, momentum = state["theta"].get(name) if learning else None, state["momentum"].get(name)
        one.theta = None if theta is None else _mine(theta, full).to(weight.device, weight.dtype, copy=True)
        one.momentum = None if momentum is None else _mine(momentum, full).to(weight.device, torch.float32, copy=True)
        for key, value in zip(_COUNTERS, state["counters"][name].tolist(), strict=True):
            setattr(one, key, value)
    driver._prepare()


def _mine(saved: Tensor, weight: Tensor) -> Tensor:
    """Of a saved tensor, sharded or not, what belongs to the local part of a weight, sharded or not."""
    if is_sharded(saved):
        return local(saved) if is_sharded(weight) else whole(saved)
    return part_of(saved, weight)


def _check(driver: Sparsifier, state: Mapping[str, Any]) -> None:
    if state.get("format") != _FORMAT:
        raise ValueError(f"sparsifier state has format {state.get('format')!r}, this version reads {_FORMAT}")
    here = settings(driver)
    different = [
        f"{key}: saved {state['settings'].get(key)!r}, here {here[key]!r}"
        for key in here
        if state["settings"].get(key) != here[key]
    ]
    if different:
        raise ValueError("the saved run has other settings; build the Sparsifier alike: " + "; ".join(different))
    if set(state["masks"]) != set(driver.layers):
        odd = sorted(set(state["masks"]) ^ set(driver.layers))
        raise ValueError(f"the saved run has other layers; not in both: {', '.join(odd[:10])}")
    shapes = {name: tuple(layer.weight.shape) for name, layer in driver.layers.items()}
    for key in ("theta", "momentum"):
        for name, value in state[key].items():
            if tuple(value.shape) != shapes.get(name):
                what = "θ" if key == "theta" else key
                raise ValueError(f"the saved run has {what} {tuple(value.shape)} for {name!r}: no such weight here")
    for key in ("masks", "explored", "reach"):
        for name, saved in state[key].items():
            if tuple(saved["shape"].tolist()) != shapes.get(name):
                raise ValueError(
                    f"saved mask of {name!r} has shape {tuple(saved['shape'].tolist())}, the weight {shapes.get(name)}"
                )

"""One block trained towards the outputs of the dense block: AdamW on cached activations, the best epoch kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.randomness import derived_generator
from resu.pruning.repairs import Repair

__all__ = ["Fit", "Targets", "fit_block", "split_batches"]

Run = Callable[[int, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Targets:
    """What a block shall give.

    Attributes:
        outputs: For each batch.
        tokens: For each batch a bool mask of the first dimensions of its output, True = counts; None: all.
    """

    outputs: Sequence[Tensor]
    tokens: Sequence[Tensor | None]

    def distance(self, i: int, output: Tensor) -> Tensor:
        """``‖output − target‖²`` of one batch, in float32 or wider."""
        return self._rows(i, output).sub(self._rows(i, self.outputs[i].to(output.device))).square().sum()

    def size(self, i: int) -> float:
        """``‖target‖²`` of one batch."""
        return float(self._rows(i, self.outputs[i]).square().sum(dtype=torch.float64))

    def _rows(self, i: int, x: Tensor) -> Tensor:
        tokens = self.tokens[i]
        x = x if tokens is None else x[tokens.to(x.device)]
        return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Fit:
    """How a block's training went.

    Attributes:
        before: Relative squared error on the held-out batches before.
        after: And at the epoch that is kept.
        epoch: Which that is; 0: nothing was better than what was there.
        history: The error after each epoch, ``before`` first.
    """

    before: float
    after: float
    epoch: int
    history: tuple[float, ...]


def split_batches(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the batches that are trained on and of those that choose the epoch.

    Raises:
        ValueError: If there are fewer than two batches.

    Example:
        >>> train, held = split_batches(8, 0.125, seed=0)
        >>> len(train), len(held)
        (7, 1)
    """
    if count < 2:
        raise ValueError(
            f"reconstruction needs two calibration batches or more, one of them to choose the epoch by; got {count}: "
            "use smaller batches, or more samples"
        )
    held = min(max(1, round(count * held_out)), count - 1)
    order = torch.randperm(count, generator=derived_generator(seed, "held out")).tolist()
    return sorted(order[held:]), sorted(order[:held])


def fit_block(
    name: str,
    repairs: Mapping[str, Repair],
    run: Run,
    targets: Targets,
    split: tuple[Sequence[int], Sequence[int]],
    *,
    epochs: int,
    lr: float,
    seed: int,
    told: Callable[[int, float], None] = lambda epoch, error: None,
) -> Fit:
    """Train the repairs of one block; they hold the best epoch's values afterwards.

    The loss of a batch is ``‖f(x̂; W) − y‖²``, over the mean of ``‖y‖²`` of all training batches. Steps are AdamW's
    without weight decay, of size ``lr`` times what :attr:`resu.pruning.repairs.Repair.step` says, falling linearly to
    0. Batches come in an order that depends on the seed, the block and the epoch alone.

    Args:
        name: Of the block.
        repairs: ``{parameter name inside the block: repair}``.
        run: ``run(batch, weights) -> output`` of the block with other weights.
        targets: What it shall give.
        split: Batches to train on, batches to choose the epoch by.
        epochs: How often each batch comes.
        lr: See above.
        seed: See above.
        told: Called with the epoch and its error.

    Raises:
        ValueError: If the targets are all zero, or an output is not finite before anything is trained.
    """
    train, held = split
    scale, held_size = sum(map(targets.size, train)) / len(train), sum(map(targets.size, held))
    if not scale or not held_size:
        raise ValueError(f"the outputs of the dense block {name!r} are all zero, so there is nothing to reconstruct")

    def weights() -> dict[str, Tensor]:
        return {parameter: repair.weight() for parameter, repair in repairs.items()}

    @torch.no_grad()
    def error() -> float:
        now = weights()
        return sum(float(targets.distance(i, run(i, now)).double()) for i in held) / held_size

    groups = [{"params": repair.trained, "lr": lr * repair.step} for repair in repairs.values()]
    trained = [tensor for repair in repairs.values() for tensor in repair.trained]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = epochs * len(train)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    history = [error()]
    if not math.isfinite(history[0]):
        raise ValueError(f"the outputs of the block {name!r} are not finite; its weights or activations overflow")
    told(0, history[0])
    best, state = 0, copy.deepcopy([t.detach() for t in trained])
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train), generator=derived_generator(seed, name, epoch)).tolist()
        for k in order:
            with torch.enable_grad():
                loss = targets.distance(train[k], run(train[k], weights())) / scale
            optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:  # not where no token reached any of the layers
                torch.autograd.backward(loss, inputs=trained)
            optimizer.step()
            falling.step()
        history.append(error())
        told(epoch, history[-1])
        if history[-1] < history[best]:
            best, state = epoch, copy.deepcopy([t.detach() for t in trained])
    with torch.no_grad():
        for tensor, value in zip(trained, state, strict=True):
            tensor.copy_(value)
    return Fit(history[0], history[best], best, tuple(history))

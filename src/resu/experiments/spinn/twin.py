"""The network of one quantity: scaled inputs in, a measurement in its unit out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resu.experiments.spinn.laws import Archard, LumpedHeat

__all__ = ["HIDDEN", "Twin", "dense_network", "score"]

HIDDEN = (512, 512, 512, 256)
"""Widths of the dense network: about 667 000 parameters."""


def dense_network(inputs: int, outputs: int, hidden: Sequence[int] = HIDDEN) -> nn.Sequential:
    """Linear layers with tanh between them, started by Glorot's rule (Glorot and Bengio 2010, eq. 12).

    Example:
        >>> sum(p.numel() for p in dense_network(18, 2).parameters())  # the size known from the literature
        666882
    """
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Twin(nn.Module):
    """A network with the scale of what it predicts, and the law that it is trained by.

    Args:
        network: ``[rows, inputs] → [rows, channels]``, about of size 1.
        targets: ``[rows, channels]`` of the training part: their mean and standard deviation are the scale.
        law: Part of the module, so that checkpoints hold its constants; None: no physics.

    Raises:
        ValueError: If a channel does not vary over the targets: it has no scale.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Sequential, targets: Tensor, law: Archard | LumpedHeat | None = None) -> None:
        super().__init__()
        still = (targets == targets[:1]).all(0).nonzero()[:, 0].tolist()
        if still:
            raise ValueError(
                f"channels {still} of the targets are the same in all {len(targets)} rows to train on; leave them out"
            )
        self.network, self.law = network, law
        self.register_buffer("mean", targets.mean(0))
        self.register_buffer("scale", targets.std(0))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[rows, inputs]`` to ``[rows, channels]`` in the unit of the targets."""
        found: Tensor = self.network(inputs)
        return self.mean + self.scale * found

    def predict(self, inputs: Tensor) -> Tensor:
        """The same without gradients."""
        with torch.no_grad():
            found: Tensor = self(inputs)
        return found


def score(predicted: Tensor, measured: Tensor, reference: Tensor | None = None) -> float:
    """R², mean over channels: 1 − mean squared error / variance.

    Args:
        predicted, measured: ``[rows, channels]``.
        reference: Rows whose variance counts; None: the measured ones themselves. (In a stretch of time where nothing
            happens the variance is next to nothing, and R² tells nothing.)

    Example:
        >>> score(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        0.5
    """
    error = (predicted - measured).double().square().mean(0)
    spread = (measured if reference is None else reference).double().var(0, correction=0)
    return float((1 - error / spread).mean())

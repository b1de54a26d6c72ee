"""Metrics of a network on a part of a data set."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from resu.experiments.data import Part, TrainingData
from resu.experiments.train.placement import Placement

__all__ = ["evaluate", "higher_is_better", "metric_of"]


def metric_of(data: TrainingData) -> str:
    """What is measured: ``"accuracy"`` (percent), of characters ``"loss"`` (nats), of words ``"perplexity"``."""
    if len(data.shape) == 3:
        return "accuracy"
    return "loss" if isinstance(getattr(data, "symbols", ""), str) else "perplexity"


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric == "accuracy"


@torch.no_grad()
def evaluate(model: nn.Module, data: TrainingData, part: Part, placement: Placement) -> float:
    """The metric of ``data`` over a whole part, to which each process adds its share; the model is left in its mode."""
    placement.share_buffers(model)
    training = model.training
    model.eval()
    metric = metric_of(data)
    sums = torch.zeros(2, dtype=torch.float64)
    ranks = placement.ranks
    for batch in data.evaluation(part, share=(ranks.rank, ranks.world)):
        x, y = placement.inputs(*batch)
        with placement.autocast():
            logits = model(x).flatten(0, -2)
        labels = y.flatten()
        if metric == "accuracy":
            found = (logits.argmax(1) == labels).sum().double()
        else:
            found = F.cross_entropy(logits.float(), labels, reduction="sum").double()
        sums += torch.stack([found.cpu(), torch.tensor(float(len(labels)), dtype=torch.float64)])
    model.train(training)
    total, count = placement.total(sums).tolist()
    mean = float(total / count)
    if metric == "accuracy":
        return 100 * mean
    return mean if metric == "loss" else math.exp(min(mean, 700.0))

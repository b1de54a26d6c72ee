"""Scores: how good a weight is. One small file each; importing one registers it."""

from resu.pruning.importance import fisher, gradient, lamp, magnitude, random, ria, snip, sparsegpt, taylor, wanda
from resu.pruning.importance.base import Importance, importances, register_importance
from resu.pruning.importance.layers import (
    compute_layer_importance,
    gradient_importance,
    magnitude_importance,
    random_importance,
    score_layer,
    taylor_importance,
)
from resu.pruning.statistics import Stats

__all__ = [
    "Importance",
    "Stats",
    "compute_layer_importance",
    "fisher",
    "gradient",
    "gradient_importance",
    "importances",
    "lamp",
    "magnitude",
    "magnitude_importance",
    "random",
    "random_importance",
    "register_importance",
    "ria",
    "score_layer",
    "snip",
    "sparsegpt",
    "taylor",
    "taylor_importance",
    "wanda",
]

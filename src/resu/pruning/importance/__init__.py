"""Scores of single weights, higher = keep; one small file each. ``importances`` is their registry."""

from __future__ import annotations

from resu.pruning.importance import gradient, magnitude, random, wanda
from resu.pruning.importance.base import Importance, Stats, importances, register_importance

__all__ = ["Importance", "Stats", "importances", "register_importance"]

"""Topology rules, one small file each. ``algorithms`` is their registry."""

from __future__ import annotations

from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.magnitude import Magnitude
from resu.training.algorithms.resu import RESU
from resu.training.algorithms.static import Static

__all__ = ["RESU", "Algorithm", "Magnitude", "Static", "View", "algorithms"]

"""Topology rules, one small file each. ``algorithms`` is their registry."""

from __future__ import annotations

from resu.training.algorithms.acdc import ACDC
from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.granet import GraNet
from resu.training.algorithms.magnitude import Magnitude
from resu.training.algorithms.mest import MEST
from resu.training.algorithms.resu import RESU
from resu.training.algorithms.rigl import RigL
from resu.training.algorithms.set import SET
from resu.training.algorithms.snfs import SNFS
from resu.training.algorithms.srigl import SRigL
from resu.training.algorithms.static import Static
from resu.training.algorithms.ste import STE
from resu.training.algorithms.topkast import TopKAST

__all__ = [
    "ACDC",
    "MEST",
    "RESU",
    "SET",
    "SNFS",
    "STE",
    "Algorithm",
    "GraNet",
    "Magnitude",
    "RigL",
    "SRigL",
    "Static",
    "TopKAST",
    "View",
    "algorithms",
]

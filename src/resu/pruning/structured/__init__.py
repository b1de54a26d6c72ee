"""Structured pruning: channels, filters, neurons and heads are taken out of a model, which is verified afterwards."""

from resu.pruning.structured.block_pruner import BlockPruner
from resu.pruning.structured.blocks import Blocks, Skip, find_blocks, remove_blocks
from resu.pruning.structured.files import load_shrunk, save_shrunk
from resu.pruning.structured.groups import Group, Structure, find_structure
from resu.pruning.structured.keeps import Keep, shrink_modules
from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.removal import Removal, shrink_tensors
from resu.pruning.structured.result import StructuredResult
from resu.pruning.structured.steps import GradualShrinker, shrink_iteratively
from resu.pruning.structured.verify import Check, verify_removal

__all__ = [
    "BlockPruner",
    "Blocks",
    "Check",
    "GradualShrinker",
    "Group",
    "Keep",
    "Removal",
    "Skip",
    "Structure",
    "StructuredPruner",
    "StructuredResult",
    "find_blocks",
    "find_structure",
    "load_shrunk",
    "remove_blocks",
    "save_shrunk",
    "shrink_iteratively",
    "shrink_modules",
    "shrink_tensors",
    "verify_removal",
]

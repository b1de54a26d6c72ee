"""What a training step leaves held in each mode of the layers, measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from resu.experiments.data import Dataset
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.memory import memory_report

__all__ = ["memory_by_mode"]

KINDS = {
    "active": "active weights",
    "codes": "4-bit codes",
    "scales": "scales, offsets",
    "mask": "mask",
    "theta": "θ",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "cache": "cache",
    "other": "biases",
}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "sparse": ("SPARSE", {}),
    "resu": ("RESU", {}),
    "qresu": ("QRESU, 4 bits", {}),
    "qresu bf16": ("QRESU, 4 bits, bf16 θ", {"theta_dtype": torch.bfloat16}),
    "qresu_selective": ("QRESU-Selective", {}),
}


def memory_by_mode(model: nn.Module, sparsity: float, data: Dataset) -> dict[str, dict[str, int]]:
    """Bytes by kind that one training step leaves held, with the network in each mode; measured.

    Adam trains what the mode trains: everything while dense or sparse, θ (and biases) otherwise.
    """
    found = {}
    for key, (label, options) in MODES.items():
        network = convert_to_resu(copy.deepcopy(model)).train()
        mode = key.partition(" ")[0]
        for layer in get_resu_modules(network).values():
            if mode != "dense":
                layer.prune_by_magnitude(sparsity)
            if mode not in ("dense", "sparse"):
                getattr(layer, f"enter_{mode}_mode")(**options)
        trained = resurrection_parameters(network) if mode not in ("dense", "sparse") else []
        optimizer = torch.optim.Adam(trained or list(network.parameters()), lr=1e-3)
        x, y = next(iter(data.batches(0, 32, 1)))
        nn.functional.cross_entropy(network(x), y).backward()
        if mode != "qresu_selective":
            optimizer.step()
        sizes = memory_report(network, optimizer).by_kind
        found[label] = {KINDS[kind]: size for kind, size in sizes.items()}
    return found



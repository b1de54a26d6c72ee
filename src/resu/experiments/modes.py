"""What a training step leaves held in each mode of the layers, measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from resu.experiments.data import Batch, Dataset
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.memory import memory_report
from resu.training import RESU, Sparsifier

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
    "sparse": ("masked (SPARSE)", {}),
    "dormant": ("RESU dormant", {}),
    "resu": ("RESU inline", {}),
    "qresu": ("QRESU, 4 bits", {}),
    "qresu bf16": ("QRESU, 4 bits, bf16 θ", {"theta_dtype": torch.bfloat16}),
    "qresu_selective": ("QRESU-Selective", {}),
}


def memory_by_mode(model: nn.Module, sparsity: float, data: Dataset) -> dict[str, dict[str, int]]:
    """Bytes by kind that one training step leaves held, with the network in each mode; measured.

    Adam trains what the mode trains: everything while dense, masked or dormant, θ alone otherwise.
    """
    batch = next(iter(data.batches(0, 32, 1)))
    return {
        label: _measured(copy.deepcopy(model).train(), key.partition(" ")[0], options, sparsity, batch)
        for key, (label, options) in MODES.items()
    }


def _measured(model: nn.Module, mode: str, options: Mapping[str, Any], sparsity: float, batch: Batch) -> dict[str, int]:
    model = convert_to_resu(model)
    inline = mode not in ("dense", "sparse", "dormant")
    for layer in get_resu_modules(model).values():
        if inline or mode == "sparse":
            layer.prune_by_magnitude(sparsity)
        if inline:
            getattr(layer, f"enter_{mode}_mode")(**options)
    trained = resurrection_parameters(model) if inline else list(model.parameters())
    optimizer = torch.optim.Adam(trained or list(model.parameters()), lr=1e-3)
    driver = None
    if mode == "dormant":
        driver = Sparsifier(model, optimizer, RESU(sparsity=sparsity, initial_sparsity=None))
    x, y = batch
    nn.functional.cross_entropy(model(x), y).backward()
    if mode != "qresu_selective":  # its layers have taken their step in the backward pass
        optimizer.step()
    sizes = memory_report(model, optimizer).by_kind
    if driver is not None:
        state = driver.state_dict()
        sizes["theta"] += sum(theta.nbytes for theta in state["theta"].values())
        sizes["mask"] += sum(mask.nbytes for mask in driver.masks.values())
    return {KINDS[kind]: size for kind, size in sizes.items()}

"""Parameters that train beside an adapter: norms, biases, and the head of the task."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from resu.core.globs import glob_matches, listing
from resu.pruning.sparse_lora.config import SparseLoRAConfig

__all__ = ["parameters_beside"]


def parameters_beside(
    model: nn.Module, config: SparseLoRAConfig, adapted: Collection[str] = ()
) -> dict[str, nn.Parameter]:
    """What ``config.train_norms``, ``train_biases`` and ``train_head`` name, by parameter name, in the model's order.

    A norm is a module whose class has "norm" in its name; a bias is a parameter whose name ends in "bias".

    Args:
        model: With adapters or without.
        config: Of the adapter.
        adapted: Names of weights that adapters are for; they are frozen, so the head cannot be one of them.

    Raises:
        ValueError: If a glob matches no parameter, or an adapted weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> list(parameters_beside(model, SparseLoRAConfig(train_norms=True, train_head=["2"])))
        ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    own = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not {"lora_A", "lora_B"} & set(name.split(".")[:-1])
    }
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    wanted: set[str] = set()
    for name in own:
        module, _, attribute = name.rpartition(".")
        if (config.train_norms and module in norms) or (config.train_biases and attribute.endswith("bias")):
            wanted.add(name)
    for glob in config.train_head:
        # A glob that names a module means all that is inside it.
        inside = {n for n, _ in model.named_modules() if n and glob_matches(glob, n)}
        matched = {name for name in own if glob_matches(glob, name) or any(name.startswith(f"{n}.") for n in inside)}
        if not matched:
            raise ValueError(f"train_head: {glob!r} matches no parameter; there are: {listing(own)}")
        clash = sorted(matched & set(adapted))
        if clash:
            raise ValueError(
                f"train_head: {glob!r} names {listing(clash)}, which adapters are for: name it in exclude_modules"
            )
        wanted |= matched
    return {name: parameter for name, parameter in own.items() if name in wanted}

"""From a model and masks to a model whose sparse layers have adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from resu.core.counting import check_finite
from resu.core.enforcement import is_held
from resu.core.globs import glob_matches, listing
from resu.core.mask import SparseMask
from resu.pruning.holding import HeldMasks
from resu.pruning.mask_stats import packed_masks
from resu.pruning.sparse_lora.beside import parameters_beside
from resu.pruning.sparse_lora.config import SparseLoRAConfig
from resu.pruning.sparse_lora.kinds import kind_of, to_plain, to_sparse_lora
from resu.pruning.sparse_lora.layer import SparseLoRALayer, check_adapter_name
from resu.pruning.targets import pruning_targets

__all__ = ["apply_sparse_lora", "get_lora_layers", "lora_parameters", "unload_sparse_lora"]

_KINDS = {"Linear": ("Linear", "Conv1D"), "Conv2d": ("Conv2d",), "Conv1D": ("Conv1D",)}


def apply_sparse_lora(
    model: nn.Module,
    masks: Mapping[str, Tensor | SparseMask] | None = None,
    config: SparseLoRAConfig | None = None,
    adapter: str = "default",
) -> nn.Module:
    """Prune by masks, freeze the model and put adapters beside its sparse layers, in place.

    Layers are replaced by :class:`resu.pruning.sparse_lora.kinds.SparseLoRALinear` and its siblings, which share the
    layers' parameters under the same names. Everything else is frozen, but for what ``config.train_*`` names. Masks of
    weights that are no target are laid on (and held) as well. A second call adds another adapter to the same layers
    and makes it the one that acts; ``masks`` is then None or says the same.

    Args:
        model: Any module. If it is itself a layer, its replacement is returned.
        masks: ``{parameter name: bool tensor or SparseMask}``, True = kept, as any pruner returns; targets without a
            mask get no adapter. None: each target is pruned to ``config.initial_sparsity`` by magnitude; the output
            head and what is tied to an embedding are none, unless a glob names them.
        config: Settings of the adapter.
        adapter: Its name.

    Returns:
        The model.

    Raises:
        ValueError: If a name or mask does not fit, a glob matches nothing, a target shares its weight with another
            module or is held by another mask, or nothing is left to adapt; the model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> config = SparseLoRAConfig(r=2, alpha=4, sparsity_mode="sparse_to_sparse")
        >>> model = apply_sparse_lora(model, None, config)
        >>> sum(p.numel() for p in lora_parameters(model)), model[0].mask.sparsity
        (84, 0.5)
    """
    config = config or SparseLoRAConfig()
    check_adapter_name(adapter)
    found = get_lora_layers(model)
    packed = packed_masks(masks) if masks is not None else None
    if packed is not None:
        _check_masks(model, found, packed)
    targets = _targets(model, config, packed, again=bool(found))
    plain: dict[str, nn.Parameter | None] = {}
    for name, module in targets.items():
        if isinstance(module, SparseLoRALayer):
            if adapter in module.configs:
                raise ValueError(f"{name!r} has an adapter {adapter!r} already; give this one another name")
            if module.configs and module.mode != config.sparsity_mode:
                raise ValueError(f"{name!r} has adapters in mode {module.mode!r}; another mode cannot be added to them")
        else:
            plain[name] = module._parameters["weight"]
    _check_free(model, [*plain, *(packed or {})], found)
    chosen: dict[str, SparseMask] = {}
    for name, weight in plain.items():
        assert weight is not None
        check_finite(weight, name)
        chosen[name] = packed[name] if packed else SparseMask.from_magnitude(weight, config.initial_sparsity)
    beside = parameters_beside(model, config, adapted=set(targets))

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    aliases: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(module_name)
    for name, module in targets.items():
        layer = module
        if not isinstance(layer, SparseLoRALayer):
            layer = to_sparse_lora(module, chosen[name], bits=config.base_bits, hold=config.maintain_sparsity)
            for alias in aliases[id(module)]:
                model = _replace(model, alias, layer)
        layer.add_adapter(adapter, config)
    others = {name: mask for name, mask in (packed or {}).items() if name not in targets}
    _lay_on(model, {name: mask for name, mask in others.items() if name not in found}, hold=config.maintain_sparsity)
    for parameter in beside.values():
        parameter.requires_grad_(True)
    return model


def get_lora_layers(model: nn.Module) -> dict[str, SparseLoRALayer]:
    """Layers with adapters by the name of their weight (``"fc1.weight"``); shared ones once."""
    return {_weight_of(name): module for name, module in model.named_modules() if isinstance(module, SparseLoRALayer)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer has to train: the active adapters, and what ``config.train_*`` names beside them.

    These are the parameters that require gradients; everything else was frozen when the adapters were applied.
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def unload_sparse_lora(model: nn.Module) -> nn.Module:
    """Put plain layers back, with the weights as they are now: merged ones merged, others the sparse base.

    Adapters are gone afterwards, and masks are held no more: :func:`resu.pruning.holding.hold_masks` holds them in what
    trains next. A packed base becomes a dense weight of its dequantized values. What was frozen stays frozen.

    Returns:
        The model; a plain layer if it was itself a layer with adapters.
    """
    replaced: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SparseLoRALayer):
            new = replaced.get(id(module))
            if new is None:
                new = replaced[id(module)] = to_plain(module)
            model = _replace(model, name, new)
    held = model.__dict__.pop("_sparse_lora_held", None)
    if held is not None:
        held.release()
    return model


def _weight_of(module_name: str) -> str:
    return f"{module_name}.weight" if module_name else "weight"


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, attribute, new)
    if isinstance(owner, nn.TransformerEncoderLayer) and isinstance(new, SparseLoRALayer):
        new.watch_calls()
        parts = name.split(".")
        for above in (model.get_submodule(".".join(parts[:n])) for n in range(len(parts))):
            if isinstance(above, nn.TransformerEncoder):
                above.use_nested_tensor = False  # which its layers take on their fast path only
    return model


def _targets(
    model: nn.Module,
    config: SparseLoRAConfig,
    masks: dict[str, SparseMask] | None,
    *,
    again: bool,
) -> dict[str, nn.Module]:
    """``{name of the weight: layer}`` of what gets the adapter."""
    layers = {_weight_of(name): module for name, module in model.named_modules() if kind_of(module)}
    if again:
        layers = {name: module for name, module in layers.items() if isinstance(module, SparseLoRALayer)}
    if not layers:
        raise ValueError("the model has no layer that takes adapters: nn.Linear, nn.Conv2d or Hugging Face Conv1D")
    usual = set(layers)
    if masks is not None:
        usual &= set(masks)
    elif not again:
        usual &= set(pruning_targets(model)[0])
    chosen: set[str] = set()
    for entry in config.target_modules:
        if entry in _KINDS:
            matched = {name for name in usual if kind_of(layers[name]) in _KINDS[entry]}
        else:
            matched = {name for name in layers if _means(entry, name) and (masks is None or name in masks)}
        if not matched:
            what = "" if masks is None else "with a mask "
            raise ValueError(
                f"target_modules: {entry!r} matches no layer {what}that takes adapters; there are: "
                f"{listing([n for n in layers if masks is None or n in masks]) or 'none'}"
            )
        chosen |= matched
    for glob in config.exclude_modules:
        left_out = {name for name in layers if _means(glob, name)}
        if not left_out:
            raise ValueError(f"exclude_modules: {glob!r} matches no layer; there are: {listing(layers)}")
        chosen -= left_out
    if not chosen:
        raise ValueError(f"exclude_modules leaves no layer to adapt; target_modules means: {listing(usual)}")
    return {name: module for name, module in layers.items() if name in chosen}


def _means(glob: str, name: str) -> bool:
    module = name.rpartition(".")[0]
    return glob_matches(glob, name) or glob_matches(glob, module.rpartition(".")[2])


def _check_masks(model: nn.Module, found: Mapping[str, SparseLoRALayer], masks: Mapping[str, SparseMask]) -> None:
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        shape = found[name].weight_shape if name in found else known[name].shape if name in known else None
        if shape is None:
            raise ValueError(f"the model has no parameter {name!r}; it has: {listing(known) or 'none'}")
        if shape != mask.shape:
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(shape)}")
        if name in found and found[name].mask != mask.to(found[name].bitmask.device):
            raise ValueError(f"{name!r} has another mask already, which its adapters were made for; unload them first")


def _check_free(model: nn.Module, names: list[str], found: Mapping[str, SparseLoRALayer]) -> None:
    """Weights about to be masked are here, belong to one module each, and to no other mask."""
    modules = {_weight_of(name): module for name, module in model.named_modules(remove_duplicate=False)}
    owners: dict[int, dict[int, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = modules.get(name)
        owners.setdefault(id(parameter), {}).setdefault(id(owner or parameter), name)
    known = dict(model.named_parameters(remove_duplicate=False))
    held = model.__dict__.get("_sparse_lora_held")
    ours = held.masks if held is not None else {}
    for name in names:
        if name in found or name in ours:
            continue
        if known[name].is_meta:
            raise ValueError(f"{name!r} is on the meta device (not loaded, or offloaded); load the model whole")
        shared = list(owners[id(known[name])].values())
        if len(shared) > 1:
            raise ValueError(
                f"{name!r} is one weight of several modules ({', '.join(shared)}): a mask or a merge would change all "
                "of them; leave it out of the masks, or name it in exclude_modules"
            )
        if is_held(known[name]):
            raise ValueError(
                f"{name!r} is held by a mask already; let go of it first: release() on what hold_masks gave, commit() "
                "on a Sparsifier, remove_mask() on a resurrection layer"
            )


def _lay_on(model: nn.Module, masks: Mapping[str, SparseMask], *, hold: bool) -> None:
    """Set pruned positions of weights without adapters to 0, and hold them."""
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        mask.to(known[name].device).apply_(known[name])
    if masks and hold:
        held = model.__dict__.setdefault("_sparse_lora_held", HeldMasks(model, {}))
        held.update(masks)

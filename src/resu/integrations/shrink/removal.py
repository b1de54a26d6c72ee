"""Units and blocks of a transformer taken away for real, and taken back where the result is not what it must be.

What is removed is exactly what masking would silence: a head or neuron goes with its columns in the layer that reads
it, so the smaller model computes what the larger one does with those columns at zero; a block that goes leaves the
residual stream as it is. :func:`remove` checks this in float64 on random tokens, and puts everything back if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resu.integrations.shrink.config import state_sizes
from resu.integrations.shrink.exactness import compare_outputs, outputs_in_float64
from resu.integrations.shrink.families import Site, after, blocks_of, is_transposed, sites_of
from resu.integrations.shrink.resizing import count_heads, replace_parameter, state_size

__all__ = ["TOLERANCE", "RemovalError", "masked", "remove"]

TOLERANCE = 1e-9


class RemovalError(ValueError):
    """A removal that did not give the model it must give, and was undone."""


def remove(
    model: Any,
    units: Mapping[str, Tensor],
    blocks: Sequence[int] | None = None,
    *,
    verify: bool = True,
) -> float:
    """Take units and blocks away from a model, in place; its ``config`` says the new sizes afterwards.

    Args:
        model: A ``PreTrainedModel`` of a known family (:data:`resu.integrations.shrink.families.FAMILIES`).
        units: Kept units, int64 and ascending, by the name of their :class:`Site`; sites not named keep all.
        blocks: Indices of the blocks that stay, ascending; None: all.
        verify: Whether to compare the result with the masked model in float64. It takes a copy of the model in float64,
            and no more than one at a time.

    Returns:
        The largest difference between the outputs of the two, relative to the largest output (0 without ``verify``).

    Raises:
        RemovalError: If it is more than 10⁻⁹; the model is then as before.
        ValueError: If a site is not known, or nothing of it would stay.
    """
    kept = _checked(model, units, blocks)
    wanted = None
    if verify:
        with masked(model, units, blocks):
            wanted = outputs_in_float64(model)
    undo = _take(model, kept, blocks)
    if wanted is None:
        return 0.0
    try:
        difference = compare_outputs(wanted, outputs_in_float64(model))
        if not difference <= TOLERANCE:
            raise RemovalError(
                f"the smaller model differs from the masked one by {difference:.2g} (relative, in float64; "
                f"{TOLERANCE:g} at most), so the removal was undone: {type(model).__name__} uses its layers in a way "
                "that is not known here"
            )
    except BaseException:
        undo()
        raise
    return difference


def _checked(model: Any, units: Mapping[str, Tensor], blocks: Sequence[int] | None) -> dict[str, tuple[Site, Tensor]]:
    sites = {site.name: site for site in sites_of(model)}
    depth = len(blocks_of(model))
    if unknown := sorted(set(units) - set(sites)):
        raise ValueError(f"the model has no {unknown[0]!r}; known: {', '.join(list(sites)[:4])}, …")
    if blocks is not None and (not blocks or list(blocks) != sorted(set(blocks) & set(range(depth)))):
        raise ValueError(f"blocks that stay must be ascending, of 0 to {depth - 1}, at least one; got {list(blocks)}")
    for name, kept in units.items():
        count = sites[name].count
        listed = kept.tolist()
        if not listed or listed != sorted(set(listed) & set(range(count))):
            raise ValueError(f"units that stay of {name} must be ascending, of 0 to {count - 1}, at least one")
    stay = set(range(depth) if blocks is None else blocks)
    return {
        name: (sites[name], kept)
        for name, kept in units.items()
        if sites[name].block in stay and len(kept) < sites[name].count
    }


# -- the masked model ----------------------------------------------------------------------------------


@contextmanager
def masked(model: Any, units: Mapping[str, Tensor], blocks: Sequence[int] | None = None) -> Iterator[None]:
    """The model with the same units and blocks silenced and nothing removed, for as long as the context lasts.

    Weights stay as they are: units are silenced where the layer after them reads them, and a block hands on what it is
    given.
    """
    base = model.base_model
    handles, skipped = [], []
    try:
        for site in sites_of(model):
            if site.name in units:
                gone = torch.ones(site.count, dtype=torch.bool)
                gone[units[site.name]] = False
                columns = site.columns.of(gone.nonzero().view(-1))
                handles.append(base.get_submodule(site.outer).register_forward_pre_hook(_silence(columns)))
        for index, block in enumerate(blocks_of(model)):
            if blocks is not None and index not in blocks:
                skipped.append(block)
                block.forward = _hand_on
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in skipped:
            del block.forward


def _silence(columns: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].index_fill(-1, columns.to(inputs[0].device), 0.0), *inputs[1:])

    return hook


def _hand_on(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    return hidden_states


# -- removal -------------------------------------------------------------------------------------------


def _take(model: Any, kept: Mapping[str, tuple[Site, Tensor]], blocks: Sequence[int] | None) -> Callable[[], None]:
    """Remove; returns what puts everything back."""
    base, saved = model.base_model, _Saved()
    saved.keep(model.config)
    try:
        for site, stay in kept.values():
            _cut_site(base, site, stay, saved)
        if blocks is not None:
            _cut_blocks(blocks_of(model), blocks, saved)
        state_sizes(model, blocks)
    except BaseException:
        saved.restore()
        raise
    return saved.restore


def _cut_site(base: nn.Module, site: Site, stay: Tensor, saved: _Saved) -> None:
    for name in dict.fromkeys(rows.module for rows in site.inner):
        module = base.get_submodule(name)
        saved.keep(module)
        _cut(module, torch.cat([rows.of(stay) for rows in site.inner if rows.module == name]), out=True)
    outer = base.get_submodule(site.outer)
    saved.keep(outer)
    _cut(outer, site.columns.of(stay), out=False)
    if site.kind == "heads":
        attention = base.get_submodule(site.name)
        saved.keep(attention)
        count_heads(attention, after(site, len(stay)))


def _cut(module: nn.Module, index: Tensor, *, out: bool) -> None:
    """Keep only some rows (``out``) or columns of a linear layer."""
    weight = module.get_parameter("weight")
    index = index.to(weight.device)
    replace_parameter(module, "weight", weight.detach().index_select(0 if out != is_transposed(module) else 1, index))
    bias = getattr(module, "bias", None)
    if out and bias is not None:
        replace_parameter(module, "bias", bias.detach().index_select(0, index))
    state_size(module, len(index), out=out)


def _cut_blocks(layers: nn.ModuleList, blocks: Sequence[int], saved: _Saved) -> None:
    saved.keep(layers)
    stay = [layers[index] for index in blocks]
    layers._modules = {str(index): block for index, block in enumerate(stay)}
    for index, block in enumerate(stay):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # the place of its keys and values in a cache
                saved.keep(module)
                setattr(module, "layer_idx", index)  # noqa: B010


class _Saved:
    """Attributes, parameters and children of modules as they were."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, dict[str, Any]]] = []

    def keep(self, thing: Any) -> None:
        # The dictionaries of a module in which its parameters and children are must be copies of their own.
        own = {
            name: dict(value) if name in ("_parameters", "_modules") else value for name, value in vars(thing).items()
        }
        self._before.append((thing, own))

    def restore(self) -> None:
        for thing, before in reversed(self._before):
            vars(thing).clear()
            vars(thing).update(before)
        self._before.clear()

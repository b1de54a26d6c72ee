"""Units and blocks of a transformer taken away for real, and put back where the result is not what it must be.

What is removed is exactly what masking would silence: a head or neuron goes with its columns in the layer that reads
it, so the smaller model computes what the larger one does with those columns at zero; a block that goes leaves the
residual stream as it is. :func:`remove` checks this in float64 on random tokens, and puts everything back if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resu.integrations.shrink.config import state_sizes
from resu.integrations.shrink.cutting import cut_sites
from resu.integrations.shrink.exactness import random_batch
from resu.integrations.shrink.families import Site, blocks_of, sites_of
from resu.pruning.structured.attributes import set_attribute
from resu.pruning.structured.verify import compare, double_copy

__all__ = ["TOLERANCE", "RemovalError", "handing_on", "masked", "remove"]

#: Largest difference from the masked model, in float64, relative to the largest output.
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
        verify: Whether to compare the result with the masked model in float64, for which both are copied.

    Returns:
        The largest difference between the outputs of the two, relative to the largest output (0 without ``verify``).

    Raises:
        RemovalError: If it is more than 10⁻⁹, or the model does not run on plain tokens; it is then as before.
        ValueError: If a site is not known, nothing of it would stay, or the sizes could not be loaded again.
    """
    kept = _checked(model, units, blocks)
    reference = None
    if verify:
        with masked(model, units, blocks):
            reference = double_copy(model)
    undo = _take(model, kept, blocks)
    if reference is None:
        return 0.0
    try:
        check = compare(reference, double_copy(model), random_batch(model), TOLERANCE)
        if not check:
            raise RemovalError(
                f"the smaller model is not the masked one, so the removal was undone: {check.reason}; "
                f"{type(model).__name__} uses its layers in a way that is not known here"
            )
    except TypeError as error:  # it cannot be run, so nothing can be verified
        undo()
        raise RemovalError(f"the removal was undone: {error}") from error
    except BaseException:
        undo()
        raise
    return check.error


def _checked(model: Any, units: Mapping[str, Tensor], blocks: Sequence[int] | None) -> list[tuple[Site, Tensor]]:
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
    return [
        (sites[name], kept)
        for name, kept in units.items()
        if sites[name].block in stay and len(kept) < sites[name].count
    ]


# -- the masked model ----------------------------------------------------------------------------------


@contextmanager
def masked(model: Any, units: Mapping[str, Tensor], blocks: Sequence[int] | None = None) -> Iterator[None]:
    """The model with the same units and blocks silenced and nothing removed, for as long as the context lasts.

    Weights stay as they are: units are silenced where the layer after them reads them, and a block hands on what it is
    given.
    """
    base = model.base_model
    with ExitStack() as stack:
        for site in sites_of(model):
            if site.name in units:
                gone = torch.ones(site.count, dtype=torch.bool)
                gone[units[site.name]] = False
                columns = site.columns.of(gone.nonzero().view(-1))
                hook = base.get_submodule(site.outer).register_forward_pre_hook(_silence(columns))
                stack.callback(hook.remove)
        for index, block in enumerate(blocks_of(model)):
            if blocks is not None and index not in blocks:
                stack.enter_context(handing_on(block))
        yield


@contextmanager
def handing_on(block: Any) -> Iterator[None]:
    """A block that gives what it is given, for as long as the context lasts."""
    block.forward = _hand_on
    try:
        yield
    finally:
        del block.forward


def _silence(columns: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].index_fill(-1, columns.to(inputs[0].device), 0.0), *inputs[1:])

    return hook


def _hand_on(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    return hidden_states


# -- removal -------------------------------------------------------------------------------------------


def _take(model: Any, kept: Sequence[tuple[Site, Tensor]], blocks: Sequence[int] | None) -> Callable[[], None]:
    """Remove; returns what puts everything back."""
    stated = dict(vars(model.config))
    removal = cut_sites(model.base_model, kept)
    back: list[Callable[[], None]] = [removal.undo]

    def undo() -> None:
        while back:
            back.pop()()
        vars(model.config).clear()
        vars(model.config).update(stated)

    try:
        if blocks is not None:
            _take_blocks(blocks_of(model), blocks, back)
        state_sizes(model, blocks)
    except BaseException:
        undo()
        raise
    return undo


def _take_blocks(layers: nn.ModuleList, blocks: Sequence[int], back: list[Callable[[], None]]) -> None:
    before, stay = dict(layers._modules), [layers[index] for index in blocks]
    back.append(lambda: setattr(layers, "_modules", before))
    layers._modules = {str(index): block for index, block in enumerate(stay)}
    for index, block in enumerate(stay):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # the place of its keys and values in a cache
                back.append(set_attribute(module, "layer_idx", index))

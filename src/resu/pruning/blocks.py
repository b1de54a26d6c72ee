"""The blocks of a model: which there are, in which order they run, and where each gets its arguments from.

One forward pass per kind of batch is watched. A block's argument that *is* (the same tensor object) an output of an
earlier block is linked to it; what else it is given has to be captured by running the model up to there.
Nothing is assumed of signatures, of masks that differ from block to block, or of what lies between two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from resu.core.layers import Layer
from resu.pruning.links import Recorder, Slot, signature
from resu.pruning.trees import leaves

__all__ = ["Chain", "Unit", "plan_units"]

Run = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Chain:
    """Blocks that run one after another.

    Attributes:
        blocks: Module names, in the order in which they run.
        templates: ``{kind of batch: [(args, kwargs) of each block]}`` with :class:`Slot` and :class:`Const` leaves.
        captures: Blocks before which the model has to run up to there.
        mutates: Whether a block changes its arguments in place.
    """

    blocks: tuple[str, ...]
    templates: Mapping[str, Sequence[Any]]
    captures: frozenset[int]
    mutates: bool

    def needed(self, after: int) -> set[Slot]:
        """What blocks behind ``after`` are given, of what is known by then."""
        found: set[Slot] = set()
        for templates in self.templates.values():
            for template in templates[after + 1 :]:
                found |= {one for _, one in leaves(template) if isinstance(one, Slot) and one.block <= after}
        return found


@dataclass(frozen=True)
class Unit:
    """What is pruned at a time: a block of a chain, or layers outside of blocks.

    Attributes:
        name: Of the block or the layer.
        layers: Names of the layers.
        chain: Index of the chain, None outside of blocks.
        index: Of the block in its chain.
    """

    name: str
    layers: tuple[str, ...]
    chain: int | None = None
    index: int = 0


def plan_units(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Any],
    run: Run,
    blocks: str | Iterable[str] | None = None,
) -> tuple[list[Unit], list[Chain]]:
    """In which order layers are pruned, and by which chains of blocks.

    Args:
        model: Any module, in the state in which it will run (evaluation mode, device).
        layers: What is to be pruned.
        batches: One of each kind (:func:`signature`).
        run: How a batch runs.
        blocks: Globs of module names; None: found. Containers (``ModuleList``, ``Sequential``, ``ModuleDict``) whose
            items each run once, in order; of nested ones the outer, ``ModuleList`` before the others.

    Returns:
        Units in the order in which they run; a layer outside of blocks is a unit of its own. Chains.

    Raises:
        ValueError: If a glob matches no module, or a module that does not run exactly once.
    """
    modules = dict(model.named_modules())
    given = None if blocks is None else _matching(modules, [blocks] if isinstance(blocks, str) else list(blocks))
    containers = _containers(modules, layers) if given is None else [given]
    watched = {name for one in containers for name in one}
    firsts: dict[str, int] = {}
    counts: dict[str, int] = {}
    passes: list[tuple[str, list[Recorder]]] = []
    homes = dict(modules) | {layer.module_name: layer.module for layer in layers.values()}
    counted = {**dict.fromkeys(watched), **dict.fromkeys(_home(layer, modules) for layer in layers.values())}
    for batch in batches:
        recorders = [Recorder(one) for one in containers]
        here: dict[str, int] = {}
        with ExitStack() as stack:
            for name in counted:
                hook = homes[name].register_forward_pre_hook(partial(_count, here, name))
                stack.callback(hook.remove)
            for recorder in recorders:
                for i, name in enumerate(recorder.blocks):
                    before = modules[name].register_forward_pre_hook(partial(recorder.before, i), with_kwargs=True)
                    after = modules[name].register_forward_hook(recorder.after, with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            run(model, batch)
        for name in here:
            firsts.setdefault(name, len(firsts))
            counts[name] = max(counts.get(name, 0), here[name])
        passes.append((signature(batch), recorders))
    if given is not None:
        _check_given(given, counts, passes)
    chosen = _choose(containers, passes, counts, modules, layers) if given is None else [0]
    return _units(chosen, passes, firsts, layers, modules)


def _home(layer: Layer, modules: Mapping[str, nn.Module]) -> str:
    """The module whose call says that the layer runs; attention does not call its output projection."""
    parent = layer.module_name.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else layer.module_name


def _count(counts: dict[str, int], name: str, module: nn.Module, args: Any) -> None:
    counts[name] = counts.get(name, 0) + 1


def _matching(modules: Mapping[str, nn.Module], globs: list[str]) -> list[str]:
    found: list[str] = []
    for glob in globs:
        here = [name for name in modules if name and fnmatchcase(name, glob)]
        if not here:
            raise ValueError(
                f"the glob {glob!r} of blocks matches no module; there are for example {', '.join(list(modules)[1:13])}"
            )
        found += here
    return [n for n in dict.fromkeys(found) if not any(n.startswith(f"{other}.") for other in found)]


def _check_given(blocks: list[str], counts: Mapping[str, int], passes: Sequence[tuple[str, list[Recorder]]]) -> None:
    odd = [name for name in blocks if counts.get(name, 0) != 1]
    if odd:
        raise ValueError(
            f"a block has to run once in a forward pass; {odd[0]!r} ran {counts.get(odd[0], 0)} times. Name modules "
            "that run one after another"
        )
    orders = [recorders[0].order for _, recorders in passes]
    if any(order != orders[0] for order in orders):
        raise ValueError("the blocks run in another order for another batch; leave blocks out, or name others")


def _inside(name: str, layers: Iterable[str]) -> list[str]:
    return [one for one in layers if one.startswith(f"{name}.")]


def _containers(modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> list[list[str]]:
    found = []
    for name, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            items = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
            if _inside(name, layers) if name else layers:
                found.append([item for item in items if item in modules])
    return [one for one in found if one]


def _choose(
    containers: list[list[str]],
    passes: Sequence[tuple[str, list[Recorder]]],
    counts: Mapping[str, int],
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Layer],
) -> list[int]:
    """Indices of containers that are chains, without overlap."""
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}

    def held(name: str) -> int:
        return sum(sizes[one] for one in _inside(name, layers))

    def parent(i: int) -> str:
        return containers[i][0].rpartition(".")[0]

    def valid(i: int) -> bool:
        ran = [name for name in containers[i] if name in counts]
        orders = [recorders[i].order for _, recorders in passes]
        in_order = all(order == sorted(order) and order == orders[0] for order in orders)
        return bool(ran) and in_order and all(counts[n] == 1 for n in ran) and sum(map(held, ran)) > 0

    def coarse(i: int) -> bool:
        # A backbone and a head in a row: better the blocks inside of the backbone.
        if isinstance(modules[parent(i)], nn.ModuleList):
            return False
        total = sum(map(held, containers[i]))
        return any(
            2 * held(item) > total and any(j != i and containers[j][0].startswith(f"{item}.") for j in candidates)
            for item in containers[i]
        )

    candidates = [i for i in range(len(containers)) if valid(i)]
    order = sorted(
        (i for i in candidates if not coarse(i)),
        key=lambda i: (not isinstance(modules[parent(i)], nn.ModuleList), -sum(map(held, containers[i]))),
    )
    chosen: list[int] = []
    for i in order:
        a = f"{parent(i)}." if parent(i) else ""
        apart = all(
            not a.startswith(b) and not b.startswith(a) for b in (f"{parent(j)}." if parent(j) else "" for j in chosen)
        )
        if apart:
            chosen.append(i)
    return chosen


def _units(
    chosen: Sequence[int],
    passes: Sequence[tuple[str, list[Recorder]]],
    firsts: Mapping[str, int],
    layers: Mapping[str, Layer],
    modules: Mapping[str, nn.Module],
) -> tuple[list[Unit], list[Chain]]:
    chains: list[Chain] = []
    placed: list[tuple[int, Unit]] = []
    left = dict(layers)
    for i in chosen:
        recorders = [recorders[i] for _, recorders in passes]
        names = tuple(recorders[0].blocks[k] for k in recorders[0].order)
        inside = [tuple(_inside(name, left)) for name in names]
        last = max((k for k, found in enumerate(inside) if found), default=-1)
        if last < 0:
            continue
        templates = {kind: [r[i].templates[k] for k in range(last + 1)] for kind, r in passes}
        captures = frozenset[int]().union(*(r.captures for r in recorders))
        mutates = any(r.mutates for r in recorders)
        chains.append(Chain(names[: last + 1], templates, captures, mutates))
        for k in range(last + 1):
            placed.append((firsts[names[k]], Unit(names[k], inside[k], len(chains) - 1, k)))
            left = {name: layer for name, layer in left.items() if name not in inside[k]}
    never = len(firsts)
    for name, layer in left.items():
        placed.append((firsts.get(_home(layer, modules), never), Unit(name, (name,))))
    placed.sort(key=lambda pair: pair[0])
    units = [unit for place, unit in placed if place < never]
    rest = tuple(unit.name for place, unit in placed if place == never)
    return [*units, *([Unit("layers that did not run", rest)] if rest else [])], chains

"""What can be removed: units that are alike make a group, and compete with each other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from resu.core.globs import glob_list, glob_matches, listing
from resu.core.layers import is_conv1d_of_transformers
from resu.pruning.structured.slots import Slot, slots
from resu.pruning.structured.trace import Trace, trace

__all__ = ["Group", "Structure", "find_structure"]

Place = tuple[str, int]
# Names of attributes that may hold a width. Others of the same value (classes, layers) mean something else.
_SIZE = re.compile(
    r"^(?!.*(class|vocab|kernel|patch|image|window|batch|layer))"
    r".*(head|hidden|channel|feature|width|dim|inner|plane|group|flat|embed|filter|size|unit|neuron)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Group:
    """Units of one kind: the channels of a residual stream, the neurons between two layers, the heads of an attention.

    Attributes:
        name: The first layer that makes them.
        places: ``{(tensor name, dimension): [units, indices of each]}``: where each unit is.
        makers: All layers that make them.
    """

    name: str
    places: Mapping[Place, Tensor]
    makers: tuple[str, ...]

    def __len__(self) -> int:
        return len(next(iter(self.places.values())))

    @property
    def width(self) -> int:
        """Indices of one unit where it is made, the fewest: 1 for a channel, the size of a head for a head."""
        return min(indices.shape[1] for indices in self.places.values())


@dataclass(frozen=True)
class Structure:
    """Everything of a model that could be removed.

    Attributes:
        groups: By name.
        fixed: ``{name of a layer: why none of its outputs can be removed}``.
        trace: What was seen.
    """

    groups: dict[str, Group]
    fixed: dict[str, str]
    trace: Trace

    def slices(self, model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """What is left of each tensor.

        Args:
            model: The model as it was traced.
            kept: ``{group name: bool per unit}``, True = kept; groups not named stay whole.

        Returns:
            ``{tensor name: {dimension: indices kept}}``.
        """
        left: dict[Place, Tensor] = {}
        found = slots(model)
        for name, mask in kept.items():
            if bool(mask.all()):
                continue
            for place, indices in self.groups[name].places.items():
                n = found[place[0]].tensor.shape[place[1]]
                stays = left.setdefault(place, torch.ones(n, dtype=torch.bool, device="cpu"))
                stays[indices[~mask].reshape(-1)] = False
        result: dict[str, dict[int, Tensor]] = {}
        for (name, dim), stays in left.items():
            result.setdefault(name, {})[dim] = stays.nonzero().view(-1)
        return result

    def attributes(
        self, model: nn.Module, kept: Mapping[str, Tensor], guessed: Collection[str] = ()
    ) -> dict[str, dict[str, Any]]:
        """Attributes that follow: counts of layers of torch; for ``guessed`` groups, sizes that other modules hold.

        A module whose code was seen to use a size of 64, and which has an attribute of 64 with the name of a width or
        a count of heads, gets what is left of the 64. Whether that was meant is for the verification to say.
        """
        result: dict[str, dict[str, Any]] = {}
        units, gone = self.trace.units, self._gone(kept)
        for count in self.trace.counts:
            now = int((~torch.isin(units.roots(count.labels), gone)).sum())
            if now != len(count.labels):
                result.setdefault(count.module_name, {})[count.attribute] = now
        gone = self._gone({name: mask for name, mask in kept.items() if name in guessed})
        wanted: dict[tuple[str, str], set[int]] = {}
        for size in self.trace.sizes if len(gone) else ():
            now = int((~torch.isin(units.roots(size.labels), gone)).sum())
            for attribute, value in vars(model.get_submodule(size.module_name)).items():
                if type(value) is int and value == size.size and now != value and _SIZE.search(attribute):
                    wanted.setdefault((size.module_name, attribute), set()).add(now)
        for (module_name, attribute), values in wanted.items():
            if len(values) == 1:
                result.setdefault(module_name, {})[attribute] = values.pop()
        return result

    def _gone(self, kept: Mapping[str, Tensor]) -> Tensor:
        """The labels of the units that go."""
        labels = []
        for name, mask in kept.items():
            (tensor, dim), indices = next(iter(self.groups[name].places.items()))
            labels.append(self.trace.units.roots(self.trace.labels[tensor][dim])[indices[~mask][:, 0]])
        return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64, device="cpu")

    def chosen(
        self, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None, *, later: bool = False
    ) -> dict[str, Group]:
        """The groups that globs over names of layers mean.

        A group is removed from as a whole, so ``include`` must name all the layers that make it, and ``exclude`` need
        name one only.

        Args:
            include: Globs; None: all.
            exclude: Globs.
            later: Whether units went earlier: that no more can go, of what is named or at all, is no error then.

        Raises:
            ValueError: If a glob matches no layer whose outputs could be removed, or nothing is left.
        """
        include, exclude = glob_list(include), glob_list(exclude) or []
        for glob in [*(include or ()), *exclude] if not later else ():
            if not any(_meant(glob, maker) for maker in self.makers) and not (
                glob in exclude and any(_meant(glob, name) for name in self.fixed)
            ):
                raise ValueError(f"the glob {glob!r} matches no layer whose outputs can be removed; {self._known()}")
        left: dict[str, Group] = {}
        partly: list[Group] = []
        for name, group in self.groups.items():
            if any(_meant(glob, maker) for glob in exclude for maker in group.makers):
                continue
            named = [any(_meant(glob, maker) for glob in include) for maker in group.makers] if include else [True]
            if all(named):
                left[name] = group
            elif any(named):
                partly.append(group)
        if not left and not later:
            why = f"; coupled, name them all: {listing(partly[0].makers)}" if partly else f"; {self._known()}"
            raise ValueError(f"there is nothing to remove{why}")
        return left

    def _known(self) -> str:
        fixed = "; ".join(f"{name}: {why}" for name, why in list(self.fixed.items())[:8])
        return f"there are: {listing(self.makers) or 'none'}; fixed are: {fixed or 'none'}"

    @property
    def makers(self) -> list[str]:
        """All layers whose outputs could be removed."""
        return [maker for group in self.groups.values() for maker in group.makers]


def _meant(glob: str, layer: str) -> bool:
    return glob_matches(glob, f"{layer}.weight")


def find_structure(model: nn.Module, example_inputs: Any) -> Structure:
    """Trace a model and group what can be removed.

    Args:
        model: Any module; left as it was.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments; a batch of one will do.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> structure = find_structure(net, torch.zeros(1, 4))
        >>> {name: len(group) for name, group in structure.groups.items()}, structure.fixed
        ({'0': 8}, {'2': 'an output of the model'})
    """
    found = trace(model, example_inputs)
    units: dict[int, dict[Place, list[int]]] = {}
    unseen = set()
    for name, dims in found.labels.items():
        for dim, labels in dims.items():
            roots = found.units.roots(labels).tolist()
            if name not in found.seen:
                unseen.update(roots)
            for index, root in enumerate(roots):
                units.setdefault(root, {}).setdefault((name, dim), []).append(index)
    known = slots(model)
    makers = {place: maker for name, dims in found.labels.items() for place, maker in _makers(known, name, dims)}
    alike: dict[tuple[tuple[Place, int], ...], list[dict[Place, list[int]]]] = {}
    fixed: dict[str, str] = {}
    free: set[str] = set()
    for root, places in units.items():
        reason = found.units.reason(root)
        if reason is None and root not in unseen and _layers(known, makers, places):
            alike.setdefault(tuple((place, len(indices)) for place, indices in places.items()), []).append(places)
            continue
        for place in places:
            if place in makers:
                fixed.setdefault(makers[place], reason or "the example inputs do not run through it")
    groups: dict[str, Group] = {}
    for kind, members in alike.items():
        layers = _layers(known, makers, [place for place, _ in kind])
        if len(members) < 2:
            fixed.setdefault(layers[0], "all of a dimension goes together")
            continue
        name, k = layers[0], 2
        while name in groups:
            name, k = f"{layers[0]}#{k}", k + 1
        groups[name] = Group(name, {p: torch.tensor([m[p] for m in members], device="cpu") for p, _ in kind}, layers)
        free.update(layers)
    return Structure(groups, {n: why for n, why in fixed.items() if n not in free}, found)


def _layers(known: Mapping[str, Slot], makers: Mapping[Place, str], places: Iterable[Place]) -> tuple[str, ...]:
    """The layers that make a unit; where none is known to (a weight ``[in, out]`` of no known layer), all it is in."""
    places = list(places)
    own = [makers[place] for place in places if place in makers]
    if not own and len(places) > 1:
        own = [known[n].module_name or known[n].attribute for n, _ in places if known[n].tensor.ndim > 1]
    return tuple(dict.fromkeys(own))


def _makers(known: Mapping[str, Slot], name: str, dims: Mapping[int, Tensor]) -> Iterable[tuple[Place, str]]:
    """The dimension of a tensor that makes units, and the layer's name; none of vectors."""
    slot = known[name]
    if slot.tensor.ndim < 2:
        return
    module, module_name = slot.module, slot.module_name
    if ".parametrizations." in f".{name}":
        module_name = f".{name}".rpartition(".parametrizations.")[0].lstrip(".")
    turned = isinstance(module, (_ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)) or is_conv1d_of_transformers(module)
    dim = 1 if turned else 0
    if dim in dims:
        yield (name, dim), module_name or slot.attribute

"""Layer-by-layer calibration: one block at a time on the device, and each pruned block feeds the next.

For every block: the calibration batches run through it and its statistics are gathered; it is pruned; the batches run
through it again, and what comes out is what the next block is given. Between blocks, activations wait in main memory.
Layers outside of blocks are pruned where they come in the order of execution, by running the whole model once for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from resu.core.layers import Layer
from resu.pruning.blocks import Chain, Unit, plan_units
from resu.pruning.inputs import Inputs, padding_masks
from resu.pruning.links import Const, Slot, signature
from resu.pruning.placement import Placement, outer_items
from resu.pruning.statistics import eager, run_batch, undisturbed
from resu.pruning.trees import leaves, map_leaves

__all__ = ["Activations", "Step", "Visit", "Walk"]

Visit = Callable[[Unit, Inputs], None]
Activations = list[dict[Slot, Any]]
Weights = Mapping[str, Tensor]


class _Reached(BaseException):
    """Ends a forward pass; no handler of ``Exception`` in a model's code stops it."""


@dataclass(frozen=True)
class Step:
    """A block in its turn: it can be run on any batch, as often as wanted, before the walk goes on.

    Attributes:
        block: The block, on the device that computes.
        run: ``run(batch index, weights=None) -> output`` on what the blocks before it have given; ``weights``,
            ``{parameter name inside the block: tensor}``, take the place of the block's own.
        keep: ``keep(batch index, output)``: this is what later blocks are given; batches for which nothing is kept
            run once more at the end of the step.
    """

    block: nn.Module
    run: Callable[..., Any]
    keep: Callable[[int, Any], None]
    _kept: set[int] = field(default_factory=set)


class Walk:
    """A way through a model, unit by unit.

    Args:
        model: Any module.
        layers: ``{name: Layer}`` to visit.
        batches: Calibration batches; kept in main memory.
        blocks: Globs of module names; None: found (:func:`resu.pruning.blocks.plan_units`).
        forward: ``forward(model, batch)`` where the default is not right.
        device: Where to compute; None: where the model is. With another device than the model's, one block at a time
            is moved there.
        store: Where activations wait until they are needed: given one, returns an equal one; None: main memory.

    Attributes:
        units: What is visited, in order.

    Use it as a context: in it the model is in evaluation mode, and left as it was at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: Iterable[Any],
        *,
        blocks: str | Iterable[str] | None = None,
        forward: Callable[[nn.Module, Any], object] | None = None,
        device: torch.device | str | None = None,
        store: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.layers, self.run = model, layers, forward or run_batch
        self._store = store
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there is no calibration batch; pass at least one")
        self._blocks = blocks
        self._device = device
        self._stack = ExitStack()
        self._kinds: list[str] = []
        self._autocast: list[Any] = []
        self.units: list[Unit] = []
        self.chains: list[Chain] = []

    def __enter__(self) -> Walk:
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model, {}))
            stack.enter_context(eager(self.model))
            stack.enter_context(torch.no_grad())
            self.placement = Placement(self.model, self._device, outer_items(self.model))
            self.batches = [map_leaves(lambda _, x: self.placement.kept(x), batch) for batch in self.batches]
            self._kinds = [signature(batch) for batch in self.batches]
            kinds = dict(zip(self._kinds, self.batches, strict=True))
            try:
                self._plan(list(kinds.values()))
            except RuntimeError:
                if not self.placement.moves:
                    raise
                # An item of a container is used without being called, so its weights stayed behind.
                self.placement = Placement(self.model, self._device)
                self._plan(list(kinds.values()))
            blocks = [name for chain in self.chains for name in chain.blocks]
            self.placement = Placement(self.model, self._device, blocks)
            self._stack = stack.pop_all()
        return self

    def _plan(self, kinds: list[Any]) -> None:
        with self.placement.all():
            lent = [self.placement.lent(batch) for batch in kinds]
            self.units, self.chains = plan_units(self.model, self.layers, lent, self.run, self._blocks)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def go(
        self,
        needs: Collection[str],
        visit: Visit,
        *,
        pruning: bool = True,
        start: int = 0,
        activations: Activations | None = None,
        done: Callable[[int, Activations], None] | None = None,
    ) -> None:
        """Visit every unit from ``start`` on.

        Args:
            needs: Statistics, of ``"inputs"`` and ``"hessian"``.
            visit: ``visit(unit, inputs)``: may change the weights of the unit's layers in place.
            pruning: Whether ``visit`` does so; if not, a block runs once.
            start: The first unit to visit.
            activations: Outputs of earlier blocks that a start in the middle of a chain takes, for each batch.
            done: ``done(units done, activations)`` after each unit.
        """
        held: Activations = [dict(one) for one in activations or [{} for _ in self.batches]]
        if start < len(self.units):
            self.catch_up(self.units[start], held)
        for number, unit in enumerate(self.units[start:], start + 1):
            if unit.chain is None:
                if unit.layers:
                    self._whole(unit, needs, visit)
            else:
                self._block(unit, needs, visit, pruning, held)
            if done is not None:
                done(number, [{s: x for s, x in one.items() if s.kind == "out"} for one in held])

    def _inputs(self, unit: Unit, needs: Collection[str]) -> Inputs:
        return Inputs({name: self.layers[name] for name in unit.layers}, needs)

    def _whole(self, unit: Unit, needs: Collection[str], visit: Visit) -> None:
        inputs = self._inputs(unit, needs)
        with self.placement.all():
            for batch in self.batches:
                with inputs.watching(padding_masks(batch)):
                    self.run(self.model, self.placement.lent(batch))
            visit(unit, inputs)

    def _block(self, unit: Unit, needs: Collection[str], visit: Visit, pruning: bool, held: Activations) -> None:
        with self.at(unit, held) as step:
            if not unit.layers:
                return
            inputs = self._inputs(unit, needs)
            for i, batch in enumerate(self.batches):
                with inputs.watching(padding_masks(batch)):
                    output = step.run(i)
                if not pruning:
                    step.keep(i, output)
            visit(unit, inputs)

    @contextmanager
    def at(self, unit: Unit, held: Activations) -> Iterator[Step]:
        """A block of a chain in its turn; afterwards ``held`` is what the next one takes.

        Args:
            unit: Of a chain; units are to come in order, each once for each ``held``.
            held: What the blocks before have given for each batch; changed in place. Begin with empty ones.
        """
        assert unit.chain is not None
        chain, index = self.chains[unit.chain], unit.index
        if index in chain.captures:
            self._capture(chain, index, held)
        block = self.model.get_submodule(unit.name)
        needed = chain.needed(index)
        made = [slot for slot in needed if slot.kind == "out" and slot.block == index]

        def run(i: int, weights: Weights | None = None) -> Any:
            return self._call(block, chain, index, i, held, weights)

        def keep(i: int, output: Any) -> None:
            found = dict(leaves(output)) if made else {}
            held[i].update({slot: self._kept(found[slot.path]) for slot in made})
            step._kept.add(i)

        step = Step(block, run, keep)
        with self.placement.here(block):
            yield step
            if made:
                for i in range(len(self.batches)):
                    if i not in step._kept:
                        keep(i, run(i))
        for one in held:
            for slot in [s for s in one if s not in needed]:
                del one[slot]

    def waiting(self, held: Mapping[Slot, Any], unit: Unit, path: Any, x: Tensor) -> Tensor:
        """An output of a block where it waits: in ``held`` if it is kept there already."""
        known = held.get(Slot("out", unit.index, path))
        return self._kept(x) if known is None else known  # type: ignore[no-any-return]

    def _kept(self, x: Any) -> Any:
        waiting = self.placement.kept(x)
        return self._store(waiting) if self._store is not None and isinstance(waiting, Tensor) else waiting

    def _call(
        self, block: nn.Module, chain: Chain, index: int, batch: int, held: Activations, weights: Weights | None
    ) -> Any:
        def value(path: Any, leaf: Slot | Const) -> Any:
            x = held[batch][leaf] if isinstance(leaf, Slot) else leaf.value
            if not isinstance(x, Tensor):
                return _fresh(x)
            lent = x if isinstance(x, nn.Parameter) else x.to(self.placement.device)
            return lent.clone() if chain.mutates and lent is x and not isinstance(x, nn.Parameter) else lent

        args, kwargs = map_leaves(value, chain.templates[self._kinds[batch]][index])
        with _autocast(self._autocast[batch]):
            return block(*args, **kwargs) if weights is None else functional_call(block, dict(weights), args, kwargs)

    # -- what a block is given from outside of its chain

    def catch_up(self, unit: Unit, held: Activations) -> None:
        """Before a start at ``unit`` in the middle of a chain: add what earlier blocks were given from outside."""
        if unit.chain is None or not unit.index:
            return
        chain = self.chains[unit.chain]
        for block in sorted(b for b in chain.captures if b < unit.index):
            self._capture(chain, block, held)

    def _capture(self, chain: Chain, index: int, held: Activations) -> None:
        """Run the model up to a block, and keep what it and later blocks are given there."""
        block = self.model.get_submodule(chain.blocks[index])
        wanted = {
            slot
            for templates in chain.templates.values()
            for template in templates
            for _, slot in leaves(template)
            if isinstance(slot, Slot) and slot.kind == "in" and slot.block == index
        }
        self._autocast = self._autocast or [None] * len(self.batches)
        with self.placement.all():
            for i, batch in enumerate(self.batches):

                def reached(module: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                    given = dict(leaves((tuple(args), dict(kwargs))))
                    held[i].update({s: self._kept(given[s.path]) for s in wanted if s.path in given})
                    self._autocast[i] = _autocast_now(self.placement.device.type)
                    raise _Reached

                hook = block.register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
                try:
                    self.run(self.model, self.placement.lent(batch))
                except _Reached:
                    continue
                finally:
                    hook.remove()
                raise ValueError(
                    f"the block {chain.blocks[index]!r} did not run for calibration batch {i}; name other blocks"
                )


def _fresh(x: Any) -> Any:
    """Plain values as they are; objects that a block may write to (caches) as a copy."""
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)):
        return x
    try:
        return copy.deepcopy(x)
    except Exception:
        return x


def _autocast_now(device: str) -> tuple[str, torch.dtype] | None:
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


@contextmanager
def _autocast(state: tuple[str, torch.dtype] | None) -> Iterator[None]:
    if state is None:
        yield
        return
    with torch.autocast(state[0], dtype=state[1]):
        yield

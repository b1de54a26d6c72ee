"""Runs a model once and follows every index of every weight to where it is used.

The model is not analysed but watched, operation by operation, below all modules and functions: so whatever its code
looks like, what happens is what is seen. Each operation has a rule (:mod:`resu.pruning.structured.rules`); one
without a rule fixes whatever enters it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from resu.pruning.statistics import eager
from resu.pruning.structured import rules_layers, rules_over, rules_views  # noqa: F401  (they register themselves)
from resu.pruning.structured.flow import Components, Operand, rearrange
from resu.pruning.structured.outputs import output_tensors
from resu.pruning.structured.rules import apply_rule
from resu.pruning.structured.running import call, plain_forward
from resu.pruning.structured.slots import Slot, slots
from resu.pruning.structured.units import Units
from resu.pruning.trees import leaves

__all__ = ["Count", "Size", "Trace", "check_model", "check_runs", "trace"]


@dataclass(frozen=True)
class Size:
    """A size that was written into an operation, which a module of the user's may hold as an attribute.

    Attributes:
        module_name: The innermost module that is not of torch.
        size: The size.
        labels: The units of its indices, ``[size]``.
    """

    module_name: str
    size: int
    labels: Tensor


@dataclass(frozen=True)
class Count:
    """An attribute of a layer of ``torch.nn`` that counts units, and no tensor of the layer says.

    Attributes:
        module_name: The layer.
        attribute: The attribute.
        labels: The units it counts.
    """

    module_name: str
    attribute: str
    labels: Tensor


@dataclass
class Trace:
    """What was seen.

    Attributes:
        units: All indices, united and fixed.
        labels: ``{tensor name: {dimension: labels}}`` of each parameter and buffer, under its first name.
        seen: Names of those that an operation used.
        sizes: Sizes that were written into operations.
        counts: Attributes of layers that count units.
    """

    units: Units
    labels: dict[str, dict[int, Tensor]]
    seen: set[str] = field(default_factory=set)
    sizes: list[Size] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Run the model on ``example_inputs``, in evaluation mode and without gradients, and follow all indices.

    Args:
        model: Left as it was.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.

    Raises:
        TypeError: If the model is a script, or its parameters are without values, or quantized.
        ValueError: If it does not run on the inputs.
    """
    check_model(model)
    units = Units()
    places: dict[int, Slot] = {}
    for slot in slots(model).values():
        places.setdefault(id(slot.tensor), slot)
    labels = {s.name: {d: units.new(n) for d, n in enumerate(s.tensor.shape) if n > 1} for s in places.values()}
    found = Trace(units, labels)
    for slot in places.values():
        reason = _untouchable(slot)
        for ids in labels[slot.name].values():
            if reason:
                units.fix(ids, reason)
    modes = {module: module.training for module in model.modules()}
    watcher = Watcher(model, found, places)
    try:
        model.eval()
        try:
            with plain_forward(), eager(model), watcher.modules(), watcher:
                out = call(model, example_inputs)
        except Exception:
            check_runs(model, example_inputs)
            raise
    finally:
        for module, training in modes.items():
            module.training = training
    for tensor in output_tensors(out):
        for component in watcher.labels_of(tensor):
            units.fix(component, "an output of the model")
    return found


def check_model(model: nn.Module) -> None:
    """Refuse a model that is a script, or has parameters without values, or with values that are not what they seem.

    Raises:
        TypeError: If it is.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError("a scripted model keeps its sizes in its code; make the model smaller, then script it")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TypeError(f"{name!r} has no shape yet; run the model once, which gives lazy layers their sizes")
        if tensor.is_meta:
            raise TypeError(f"{name!r} is on the meta device, without values; load the model first")
        if is_traceable_wrapper_subclass(tensor):  # quantized, packed: what is in it is not [out, in]
            kind = type(tensor.data).__name__
            raise TypeError(
                f"{name!r} is a {kind}, whose values are kept otherwise; make the model smaller, then quantize"
            )


def check_runs(model: nn.Module, inputs: Any) -> None:
    """Say so where a model does not run on its inputs, watched or not."""
    try:
        with plain_forward(), eager(model):
            call(model, inputs)
    except Exception as error:
        given = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x)[:40] for _, x in leaves(inputs))
        raise ValueError(
            f"{type(model).__name__} does not run on the example inputs ({given}): {' '.join(str(error).split())[:200]}"
        ) from error


def _untouchable(slot: Slot) -> str | None:
    if not slot.saved:
        return f"{slot.name} is a buffer that is not saved"
    if isinstance(slot.module, nn.MultiheadAttention):
        return "nn.MultiheadAttention takes the size of its heads from its input"
    return None


class Watcher(TorchDispatchMode):
    """Inside this context, labels follow operations."""

    def __init__(self, model: nn.Module, found: Trace, places: dict[int, Slot]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units, self.found, self._places = found.units, found, places
        self._known: dict[int, tuple[Tensor, Components]] = {}  # tensors too, so that no id is used twice
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._names[id(module)] = name
        self._stack: list[nn.Module] = []
        self._memory = {s.tensor.untyped_storage().data_ptr(): s for s in places.values() if s.tensor.numel()}

    # -- where we are

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Inside, it is known which module runs."""
        handles = [
            hooks.register_module_forward_pre_hook(lambda module, _: self._stack.append(module)),
            hooks.register_module_forward_hook(lambda module, *_: self._leave(module), always_call=True),
        ]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module) -> None:
        while self._stack and self._stack.pop() is not module:
            pass

    @property
    def place(self) -> str:
        """Name of the module that runs."""
        return next((self._names[id(m)] for m in reversed(self._stack) if id(m) in self._names), "") or "the model"

    @property
    def owner(self) -> nn.Module | None:
        """The innermost module that is not of torch: the one whose code writes sizes down."""
        own = (m for m in reversed(self._stack) if not type(m).__module__.startswith("torch.nn"))
        return next((m for m in own if id(m) in self._names), None)

    def note_size(self, size: int, labels: Tensor) -> None:
        """A size of this many indices, with these labels, was used."""
        if self.owner is not None and size > 1:
            self.found.sizes.append(Size(self._names[id(self.owner)], size, labels.reshape(-1).clone()))

    def note_count(self, kind: type[nn.Module], attribute: str, labels: Tensor) -> None:
        """An attribute of the module that runs, if it is of this kind, counts these units."""
        module = self._stack[-1] if self._stack else None
        if isinstance(module, kind) and id(module) in self._names:
            self.found.counts.append(Count(self._names[id(module)], attribute, labels.reshape(-1).clone()))

    # -- labels

    def labels_of(self, tensor: Tensor) -> Components:
        """The components of a tensor; of a parameter, one for each dimension."""
        if id(tensor) in self._known:
            return [c for c in map(self.units.compact, self._known[id(tensor)][1]) if c is not None]
        slot = self._places.get(id(tensor))
        if slot is None:
            self._aliased(tensor)
            return []
        self.found.seen.add(slot.name)
        result = []
        for dim, ids in self.found.labels[slot.name].items():
            compact = self.units.compact(ids.view([-1 if d == dim else 1 for d in range(tensor.ndim)]))
            if compact is not None:
                result.append(compact)
        return result

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor as the rules see it."""
        return Operand.of(tensor, self.labels_of(tensor))

    def put(self, tensor: Tensor, labels: Components) -> None:
        """These are the components of a tensor."""
        self._known[id(tensor)] = (tensor, labels)

    def fix(self, tensors: list[Tensor], reason: str) -> None:
        """Nothing of these tensors can be removed."""
        for tensor in tensors:
            for component in self.labels_of(tensor):
                self.units.fix(component, reason)

    def moved(self, tensor: Tensor, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Components after ``func``, which moves elements only."""
        shape = tuple(tensor.shape)
        return rearrange(self.units, shape, self.labels_of(tensor), lambda c: func(c, *args, **kwargs))

    def _aliased(self, tensor: Tensor) -> None:
        """A parameter reached around the parameter itself (``weight.data``): it cannot be followed."""
        slot = self._memory.get(tensor.untyped_storage().data_ptr()) if tensor.layout == torch.strided else None
        if slot is not None and tensor.numel():
            for ids in self.found.labels[slot.name].values():
                self.units.fix(ids, f"{slot.name} is used around the parameter itself, at {self.place}")

    # -- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        apply_rule(self, func, args, kwargs, out)
        return out

"""The one mechanism that enforces masks: what an optimizer step may not change in a weight.

A :class:`Constraint` names, for one parameter, the positions that training must leave alone: the pruned
ones, which stay exactly +0.0 (``kind="zero"``), or the active ones, which stay bit-identical
(``kind="frozen"``). It acts at two places and nowhere else:

* a hook on the parameter has the gradient zeroed there at the end of the backward pass that accumulated it (set,
  not multiplied: NaN does not survive), or at once where anything may look at it before. It edits ``.grad`` in
  place: a tensor hook would have to return a second gradient-sized tensor;
* after every step of *any* ``torch.optim.Optimizer`` that owns the parameter, the positions are put back.

The second is needed because a zero gradient freezes nothing: momentum carried over from before and weight
decay still move a weight.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from resu.core.mask import SparseMask, apply_all_
from resu.core.optimizer_state import clear_state
from resu.core.sharding import is_sharded, local

__all__ = ["Constraint", "GradientObserver", "constraints_on", "is_held"]

# By id of the parameter, so that a step looks at its own parameters alone, however many networks there are.
_live: dict[int, list[weakref.ref[Constraint]]] = {}
_installed = False
# By backward pass: whose gradients it has accumulated and are to be masked when it ends.
_waiting: dict[int, list[Constraint]] = {}

# With zero gradient, zero state and no weight decay these leave a weight bit-identical (w - lr * 0 = w).
# Anything else is put back from a copy taken just before the step.
_STILL = {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta"}


class GradientObserver(Protocol):
    """Sees a gradient as it is accumulated, before and after held positions are zeroed in it."""

    def before(self, gradient: Tensor) -> None:
        """The gradient as the backward pass has left it."""
        ...

    def after(self, gradient: Tensor) -> None:
        """The same tensor, masked."""
        ...


class Constraint:
    """Positions of one parameter that no optimizer step may change, until :meth:`remove`.

    Of a parameter that is sharded over ranks (``DTensor``) it holds the part that lies here, with a mask of that shape.

    Args:
        parameter: The weight (a leaf that requires grad, or will).
        mask: True = active. ``kind="zero"`` holds the pruned positions, ``kind="frozen"`` the active ones.
        kind: ``"zero"`` (held positions are +0.0) or ``"frozen"`` (held positions keep their bits).
        mask_gradient: Whether the gradient at held positions is zeroed. A method that learns from the
            gradient at pruned positions sets it to False for a time; the positions are held all the same.

    Attributes:
        gradient_mask: With ``kind="zero"``: where the gradient is let through instead of at active positions; None
            (the usual): there.
        observer: Told of each gradient, or None.

    Raises:
        ValueError: If the mask does not fit the parameter.
    """

    def __init__(self, parameter: Tensor, mask: SparseMask, kind: str = "zero", mask_gradient: bool = True) -> None:
        if kind not in ("zero", "frozen"):
            raise ValueError(f"kind must be 'zero' or 'frozen', got {kind!r}")
        here = local(parameter).shape
        if mask.shape != here:
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit a weight of shape {tuple(here)}")
        self._parameter = weakref.ref(parameter)
        self.mask = mask
        self.kind = kind
        self.mask_gradient = mask_gradient
        self._sharded = is_sharded(parameter)
        self.gradient_mask: SparseMask | None = None
        self.observer: GradientObserver | None = None
        self._before: Tensor | None = None
        self._zeroed: tuple[SparseMask, int] | None = None
        self._cleared: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hook: RemovableHandle | None = None
        self._watch(parameter)
        self._mask_gradient(parameter)  # one accumulated before is not applied any more
        _install()
        self._key = id(parameter)
        _live.setdefault(self._key, []).append(weakref.ref(self, functools.partial(_forget, self._key)))

    @property
    def parameter(self) -> Tensor | None:
        """The weight, or None once it is gone."""
        return self._parameter()

    def held(self) -> Tensor:
        """Bool tensor of the local part's shape, True where training may change nothing."""
        parameter = self._parameter()
        if parameter is not None:
            self._follow(local(parameter))
        mask = self.mask.mask
        return mask.logical_not_() if self.kind == "zero" else mask

    def _follow(self, tensor: Tensor) -> None:
        """Move the mask to where the weight has gone (``model.to(device)`` keeps the parameter object)."""
        if self.mask.device != tensor.device:
            self.mask = self.mask.to(tensor.device)
            if self.gradient_mask is not None:
                self.gradient_mask = self.gradient_mask.to(tensor.device)

    def _watch(self, parameter: Tensor) -> None:
        if self._hook is None and parameter.requires_grad:
            self._hook = parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        """A gradient has come in: mask it with the others of this backward pass, or now.

        Between the large operations of a backward pass everything else has left the processor's caches, and the few
        small ones here would take several times as long as they do in a row at its end.
        """
        if not (self.mask_gradient or self.observer):
            return
        if is_dynamo_compiling():  # compiled autograd does not tell when a pass ends
            torch.compiler.disable(self._mask_gradient)(parameter)
            return
        task = torch._C._current_graph_task_id()  # -1: no backward pass of autograd's own
        waiting = _waiting.get(task)
        if len(parameter._post_accumulate_grad_hooks) > 1:  # another one may look at it
            self._mask_gradient(parameter)
        elif waiting is not None:
            waiting.append(self)
        elif task < 0 or (dist.is_available() and dist.is_initialized()):  # a reducer takes it before the pass ends
            self._mask_gradient(parameter)
        else:
            _waiting.setdefault(task, []).append(self)
            Variable._execution_engine.queue_callback(functools.partial(_mask_waiting, task))

    def _mask_gradient(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None or not (self.mask_gradient or self.observer):
            return
        if grad.is_sparse:
            grad = parameter.grad = grad.to_dense()
        if self._sharded:
            grad = local(grad)
        if self.observer is not None:
            self.observer.before(grad)
        if self.mask_gradient:
            self._passed(grad).zero_(grad, active=self.kind == "frozen")
        if self.observer is not None:
            self.observer.after(grad)

    def _passed(self, grad: Tensor) -> SparseMask:
        self._follow(grad)
        return self.mask if self.gradient_mask is None else self.gradient_mask

    def enforce(self) -> None:
        """Zero the pruned positions now (``kind="zero"``)."""
        parameter = self._parameter()
        if parameter is not None and self.kind == "zero":
            here = local(parameter) if self._sharded else parameter
            self._follow(here)
            self.mask.apply_(here)

    def take_pruned(self) -> Tensor:
        """As :meth:`enforce`; returns what was at pruned positions, and 0 elsewhere (``kind="zero"``)."""
        parameter = self._parameter()
        assert parameter is not None
        here = local(parameter) if self._sharded else parameter
        self._follow(here)
        taken = self.mask.take_pruned_(here)
        if here is parameter:  # the count of writes of another view tells nothing
            self._zeroed = self.mask, here._version
        return taken

    def remove(self) -> None:
        """Let go of the parameter: no hook, no copy, no enforcement."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._before = self.observer = None
        for one in _live.get(self._key, ()):
            if one() is self:
                _forget(self._key, one)
                break

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy constrains the copied parameter: copy and pickle keep the two together.
        return Constraint, (self.parameter, self.mask, self.kind, self.mask_gradient)

    # -- around an optimizer step ---------------------------------------------------------------------
    def _before_step(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        parameter = self._parameter()
        assert parameter is not None
        self._zeroed = None
        if self._hook is None and parameter.requires_grad:  # it did not require a gradient before
            self._watch(parameter)
            self._mask_gradient(parameter)
        if self.kind != "frozen":
            return
        if optimizer not in self._cleared:  # momentum from before the freeze would move frozen weights
            clear_state(optimizer, parameter, self.held())
            self._cleared.add(optimizer)
        if not (self.mask_gradient and _keeps_bits(optimizer, group)):
            self._before = local(parameter).detach().clone()

    def _after_step(self) -> Tensor | None:
        """Put the held positions back; or what is to be zeroed at pruned ones, for all to be done at once."""
        parameter = self._parameter()
        assert parameter is not None
        if self.kind == "zero":
            # Not a second time where this step has done it already and nobody has written since.
            if self._zeroed == (self.mask, parameter._version):
                return None
            here = local(parameter) if self._sharded else parameter
            self._follow(here)
            return here
        if self._before is not None:
            self.mask.restore_(local(parameter), self._before)
            self._before = None
        return None


def is_held(parameter: Tensor, except_for: Constraint | None = None) -> bool:
    """Whether a live constraint (another than ``except_for``) holds positions of this parameter."""
    return any(constraint is not except_for for constraint in constraints_on(parameter))


def constraints_on(parameter: Tensor) -> list[Constraint]:
    """The live constraints on a parameter."""
    known = _live.get(id(parameter))
    if known is None:
        return []
    found = [constraint for one in known if (constraint := one()) is not None]
    return [constraint for constraint in found if constraint._parameter() is parameter]  # an id may be used again


def _forget(key: int, one: weakref.ref[Constraint]) -> None:
    known = [other for other in _live.pop(key, ()) if other is not one]
    if known:
        _live[key] = known


def _keeps_bits(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a weight with zero gradient and zero state keeps its bits."""
    known = type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ in _STILL
    # maximize turns a zero gradient into -0.0, which would turn a weight of -0.0 into +0.0.
    return known and not group.get("weight_decay") and not group.get("maximize") and group.get("eps", 1.0) > 0


def _owned(optimizer: Optimizer) -> list[tuple[Constraint, dict[str, Any]]]:
    if not _live:
        return []
    return [
        (one, group)
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in _live
        for one in constraints_on(p)
    ]


def _mask_waiting(task: int) -> None:
    plain, observed = [], []
    for constraint in reversed(_waiting.pop(task, [])):  # the last one may still be in the caches
        parameter = constraint._parameter()
        if parameter is None or constraint._hook is None:  # gone, or let go of
            continue
        grad = parameter.grad
        if grad is None or grad.is_sparse or constraint.kind != "zero" or not constraint.mask_gradient:
            constraint._mask_gradient(parameter)
            continue
        if constraint.observer is not None:
            constraint.observer.before(grad)
            observed.append((constraint.observer, grad))
        plain.append((constraint._passed(grad), grad))
    apply_all_(plain)
    for observer, grad in observed:
        observer.after(grad)


def _pre_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_dynamo_compiling():  # a decorator would import the compiler for all
        torch.compiler.disable(_pre_step)(optimizer, args, kwargs)
        return
    for task in list(_waiting):  # a step within a backward pass, or one that has failed
        _mask_waiting(task)
    for constraint, group in _owned(optimizer):
        constraint._before_step(optimizer, group)


def _post_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_dynamo_compiling():
        torch.compiler.disable(_post_step)(optimizer, args, kwargs)
        return
    owned = reversed(_owned(optimizer))  # as in _mask_waiting
    apply_all_([(one.mask, here) for one, _ in owned if (here := one._after_step()) is not None])


def _install() -> None:
    """Register the two process-wide hooks once, when the first constraint is made."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_pre_step)
        register_optimizer_step_post_hook(_post_step)
        _installed = True

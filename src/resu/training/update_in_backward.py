"""The optimizer's step made within the backward pass, weight by weight, so that gradients never coexist.

A gradient is used up and freed as soon as it has been accumulated, before that of the layer below is made: what
training holds besides weights and optimizer state is one gradient instead of all of them (as LOMO does for SGD, Lv et
al., arXiv 2306.09782; here for any optimizer that treats its parameters one by one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer

from resu.core.sharding import is_sharded

__all__ = ["OptimizerInBackward", "optimizer_in_backward"]

Factory = Callable[[list[dict[str, Any]]], Optimizer]
_NOT_OPTIONS = ("params", "param_names")


def optimizer_in_backward(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]], factory: Factory
) -> OptimizerInBackward:
    """Update each parameter as soon as its gradient is there, with an optimizer of its own, and free the gradient.

    The loop stays as it is: ``backward()`` makes the updates, ``step()`` ends the step (schedulers and hooks count it),
    ``zero_grad()`` finds nothing to do. Results are those of ``factory(parameters)`` bit for bit, and so is the
    ``state_dict``: a run may go on with the plain optimizer, or the other way round. Masks and frozen weights are held
    as under any optimizer.

    Args:
        parameters: What a ``torch.optim`` optimizer takes: tensors, ``(name, tensor)``, or groups with options.
        factory: Makes the optimizer of one group, such as ``lambda groups: torch.optim.AdamW(groups, lr=1e-3)``. One
            that looks at several parameters at once (a norm over all, for one) gives other results.

    Raises:
        TypeError: If the factory makes no ``torch.optim.Optimizer`` with one group.
        RuntimeError: Later, in the backward pass or ``step()``: on gradient accumulation, a ``GradScaler`` or several
            processes, which all need a gradient that outlives the pass (but for ``fully_shard``, which adds those of
            all processes up first). Clipping by the norm of all gradients would find none and do nothing:
            :meth:`OptimizerInBackward.check` refuses it where settings are known.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = optimizer_in_backward(layer.parameters(), lambda groups: torch.optim.AdamW(groups, lr=0.1))
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        >>> layer(torch.ones(3, 4)).sum().backward()
        >>> layer.weight.grad is None  # used up
        True
        >>> optimizer.step()
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """
    return OptimizerInBackward(parameters, factory)


class OptimizerInBackward(Optimizer):
    """Looks like one optimizer and holds one for each parameter; made by :func:`optimizer_in_backward`.

    ``param_groups`` are read at every update, so that schedulers work; ``state`` is that of all parameters.
    """

    def __init__(self, parameters: Any, factory: Factory) -> None:
        self._factory = factory
        self._optimizers: dict[Tensor, Optimizer] = {}
        self._handles: dict[Tensor, Any] = {}
        self._updated: set[int] = set()  # ids of parameters that had their update since the last step()
        super().__init__(parameters, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take more parameters, with options of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        given = _options(group)
        for parameter in group["params"]:
            made = self._factory([{"params": [parameter], **given}])
            if not isinstance(made, Optimizer) or len(made.param_groups) != 1:
                raise TypeError(
                    f"the factory must make a torch.optim.Optimizer with the one group it is given, it made {made!r}"
                )
            for option, value in _options(made.param_groups[0]).items():
                group.setdefault(option, value)
            self.defaults = made.defaults
            made.state = self.state
            self._optimizers[parameter] = made
            hook = partial(self._arrived, group_index=len(self.param_groups) - 1)
            self._handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    # -- in the backward pass -------------------------------------------------------------------------
    def _arrived(self, parameter: Tensor, group_index: int) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and not is_sharded(parameter):  # FSDP2 has reduced the gradient of a part before it calls this
            raise RuntimeError(
                "an update in the backward pass would use the gradient of this process alone, before the others' is "
                f"added ({dist.get_world_size()} processes); use the plain optimizer, or fully_shard"
            )
        if id(parameter) in self._updated:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} has had its update since the last step(), and gets "
                "another gradient: gradients cannot be accumulated over passes, since each is used up at once. Call "
                "step() after every backward pass, make one batch of the small ones, or use the plain optimizer (also "
                "for weights shared between parts that are checkpointed with use_reentrant=True)"
            )
        self._updated.add(id(parameter))
        hooks: Any = parameter._post_accumulate_grad_hooks
        mine = self._handles[parameter].id
        if next(reversed(hooks)) == mine:
            self._update(parameter, group_index)
            return

        # A mask came after this optimizer. Its hook has to act first: this time by waiting, from now on by the order.
        def later() -> None:
            hooks[mine] = hooks.pop(mine)
            self._update(parameter, group_index)

        Variable._execution_engine.queue_callback(later)

    def _update(self, parameter: Tensor, group_index: int) -> None:
        made = self._optimizers[parameter]
        made.param_groups[0].update(_options(self.param_groups[group_index]))
        with torch.no_grad():
            made.step()
        parameter.grad = None

    # -- what a loop calls ----------------------------------------------------------------------------
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the step. Gradients that are there without having come from a backward pass are applied now."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for before in self._optimizer_step_pre_hooks.values():
            before(self, (), {})
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, index)
        self._updated.clear()
        for after in self._optimizer_step_post_hooks.values():
            after(self, (), {})
        return result

    # Not wrapped by torch: each update has called the process-wide hooks, which hold masks, for its own parameter.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin anew, also after a backward pass that failed half-way."""
        self._updated.clear()
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks before it steps."""
        raise RuntimeError(
            "a GradScaler cannot be used with an update in the backward pass: it looks for infinities in all gradients "
            "before any is applied, and these were applied, scaled, already. Train in bfloat16, or use the plain one"
        )

    @staticmethod
    def check(*, accumulation: int = 1, max_norm: float | None = None, scaler: bool = False) -> None:
        """Refuse settings of a training loop that need all gradients at once.

        Args:
            accumulation: Backward passes per step.
            max_norm: Norm of all gradients to clip to; None or 0: none.
            scaler: Whether there is a ``GradScaler`` (fp16).

        Raises:
            ValueError: Naming the setting.

        Example:
            >>> OptimizerInBackward.check(max_norm=1.0)
            Traceback (most recent call last):
            ValueError: clipping to a norm of all gradients (1.0) needs them at once, ...
        """
        advice = "and an update in the backward pass uses each up at once: turn one of the two off"
        if accumulation != 1:
            raise ValueError(
                f"gradient accumulation ({accumulation} passes per step) needs gradients to last, {advice}"
            )
        if max_norm:
            raise ValueError(f"clipping to a norm of all gradients ({max_norm}) needs them at once, {advice}")
        if scaler:
            raise ValueError(f"a GradScaler (fp16) looks at all gradients before a step, {advice}, or use bfloat16")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state: of this, or of the plain optimizer over the same parameters."""
        given, groups = state_dict["state"], state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})  # checks, and takes the options
        for saved, group in zip(groups, self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                made = self._optimizers[parameter]
                state = {0: given[key]} if key in given else {}
                made.load_state_dict({"state": state, "param_groups": [{**_options(group), "params": [0]}]})
                if parameter in made.state:
                    self.state[parameter] = made.state[parameter]
                made.state = self.state

    def remove(self) -> None:
        """Let go of the parameters: gradients last again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NOT_OPTIONS}

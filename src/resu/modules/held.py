"""What a resurrection layer holds in each mode, and how that is made from its parts.

``weight`` is the plain Parameter in DENSE, SPARSE and RESU. In the quantized modes it is not registered: the
same Parameter object waits, emptied, and takes the weight up again at exit, so that an optimizer made before
still owns it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask
from resu.core.resurrection import PackedRows, active_checksum, gather_active, gather_theta, row_offsets
from resu.modules import self_update, state
from resu.modules.assembled import assembled_weight
from resu.modules.capture import ActivationCapture
from resu.modules.settings import RESUMode, Settings, illegal
from resu.modules.sparse_forward import SparseProduct, check_threshold

__all__ = ["HeldWeight"]

# Kept in their own precision whatever the layer is converted to.
_EXACT = ("scale", "zero", "theta_m", "theta_v")
_BUFFERS = ("bitmask", "codes", *_EXACT)


class HeldWeight(ActivationCapture, nn.Module):
    """The state of a layer whose weight may be pruned and resurrected, without the calls that change it."""

    theta: nn.Parameter | None
    bitmask: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    theta_m: Tensor | None
    theta_v: Tensor | None

    # Names of parameters that are the same tensor as this weight; set by convert_to_resu.
    _shared_with: tuple[str, ...]
    # Never copied or saved: made again from the rest.
    _DERIVED: ClassVar[tuple[str, ...]] = ("_constraint", "_product", "_theta_hook")

    def _init_resu(self, sparse_threshold: float | str = "auto") -> None:
        self.register_parameter("theta", None)
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self._settings = Settings()
        self._sparse_mask: SparseMask | None = None
        self._offsets: Tensor | None = None  # active positions before each row; made from the bits
        # The emptied weight of the quantized modes; in a list, where nn.Module does not see it.
        self._waiting: list[nn.Parameter] = []
        self._waiting_trains = True
        self._checksum: tuple[int, int] | None = None
        self._weight_shape = torch.Size(self.weight.shape)
        self._shared_with = ()
        self._constraint: Constraint | None = None
        self._product: SparseProduct | None = None
        self._theta_hook: Any = None
        self.sparse_threshold = check_threshold(sparse_threshold)
        self.gradient_scale: float | Tensor = 1.0
        self.last_update: dict[str, float] = {}
        self._init_capture()

    # -- what is there --------------------------------------------------------------------------------
    @property
    def mode(self) -> RESUMode:
        """The present mode."""
        return self._settings.mode

    @property
    def settings(self) -> Settings:
        """What was asked for when the present mode was entered."""
        return self._settings

    @property
    def mask(self) -> SparseMask | None:
        """Which positions are active; None while DENSE."""
        return self._sparse_mask

    @property
    def _mask(self) -> SparseMask | None:
        return self._sparse_mask

    @property
    def _theta(self) -> nn.Parameter | None:
        return self.theta

    @property
    def sparsity(self) -> float:
        """Fraction of pruned positions (also in the RESU modes, where they hold θ); 0 while DENSE."""
        return 0.0 if self._sparse_mask is None else self._sparse_mask.sparsity

    @property
    def is_sparse(self) -> bool:
        """Whether there is a mask."""
        return self._sparse_mask is not None

    @property
    def is_resu_active(self) -> bool:
        """Whether θ trains (modes RESU, QRESU and QRESU_SELECTIVE)."""
        return self.mode.resurrects

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, in every mode."""
        return self._weight_shape

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weight, in every mode."""
        weight: Tensor = self._waiting[0] if self._waiting else self.weight
        return weight.dtype

    def __getattr__(self, name: str) -> Any:
        # Other code reads `layer.weight` for its dtype or multiplies with it; without a dense weight it
        # gets one made for the occasion. Not a leaf: an optimizer refuses it instead of training a copy.
        if name == "weight" and self.__dict__.get("_waiting"):
            return self.effective_weight()
        return super().__getattr__(name)

    def effective_weight(self) -> Tensor:
        """The dense weight that acts in the forward pass, in every mode.

        DENSE, SPARSE, RESU: the Parameter itself. Quantized modes: assembled now (a tensor of full size);
        gradients flow to θ.
        """
        weight: Tensor
        if not self.mode.quantized:
            weight = self.weight
            return weight
        weight = assembled_weight(self._theta_parameter(), self._rows(), self._known_mask(), self.weight_dtype)
        return weight

    def theta_values(self) -> Tensor:
        """θ, ``[p]`` row-major, detached (a copy in RESU mode).

        Raises:
            ModeError: In a mode without θ.
        """
        if self.mode is RESUMode.RESU:
            return gather_theta(self.weight, self._known_mask())
        if self.mode.quantized:
            return self._theta_parameter().detach()
        raise illegal("theta_values", self.mode, "there is no θ")

    def active_values(self) -> Tensor:
        """Values at active positions, row-major, detached (dequantized in the quantized modes).

        Raises:
            ModeError: While DENSE.
        """
        if self._sparse_mask is None:
            raise illegal("active_values", self.mode, "there is no mask")
        return gather_active(self.effective_weight().detach(), self._sparse_mask)

    def _require(self, call: str, *modes: RESUMode, hint: str = "") -> None:
        if self.mode not in modes:
            raise illegal(call, self.mode, hint)

    def _known_mask(self) -> SparseMask:
        assert self._sparse_mask is not None
        return self._sparse_mask

    def _theta_dtype(self) -> torch.dtype:
        return self.weight_dtype if self.theta is None else self.theta.dtype

    def _theta_parameter(self) -> nn.Parameter:
        assert self.theta is not None
        return self.theta

    def _rows(self) -> PackedRows:
        codes, bitmask, scale, zero = self.codes, self.bitmask, self.scale, self.zero
        assert codes is not None
        assert bitmask is not None
        assert scale is not None
        assert zero is not None
        assert self._offsets is not None
        columns = self._weight_shape[1:].numel()
        return PackedRows(codes, bitmask, scale, zero, self._offsets, columns, self._settings.bits)

    # -- the states, made from their parts ------------------------------------------------------------
    def _become_dense(self) -> None:
        self._leave()
        self._settings = Settings()
        self._sparse_mask, self.bitmask = None, None

    def _become_sparse(self, mask: SparseMask) -> None:
        self._leave()
        self._settings = Settings(mode=RESUMode.SPARSE)
        self._sparse_mask, self.bitmask = mask, mask.packed
        mask.apply_(self.weight)
        if self.weight.grad is not None:
            mask.apply_(self.weight.grad)
        self._rebuild()

    def _install_quantized(
        self, settings: Settings, mask: SparseMask, codes: Tensor, scale: Tensor, zero: Tensor, theta: Tensor
    ) -> None:
        self._leave()
        self._settings = settings
        self._sparse_mask, self.bitmask = mask, mask.packed
        self.codes, self.scale, self.zero = codes, scale, zero
        self.theta = nn.Parameter(theta)
        if not self._waiting:
            self._drop_weight()
        if settings.use_selective:
            self._make_averages(theta)
        self._rebuild()

    def _drop_weight(self) -> None:
        weight = self._parameters["weight"]
        assert weight is not None
        self._waiting, self._parameters["weight"] = [weight], None
        weight.grad = None
        # What nn.Module.to() does, for the same reason: the object stays known to optimizers.
        weight.data = weight.data.new_empty(0)

    def _take_up_weight(self, values: Tensor) -> None:
        weight = self._waiting.pop()
        weight.data = values.view(self._weight_shape)
        self._parameters["weight"] = weight

    def _release_theta(self) -> None:
        self.theta = None
        self.codes = self.scale = self.zero = None
        self._offsets = None

    def _make_averages(self, theta: Tensor) -> None:
        dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
        self.theta_m = torch.zeros_like(theta, dtype=dtype)
        self.theta_v = torch.zeros_like(theta, dtype=dtype)

    def _leave(self) -> None:
        """Let go of everything that belongs to the present mode except the weight and the mask."""
        if self._constraint is not None:
            self._constraint.remove()
        if self._theta_hook is not None:
            self._theta_hook.remove()
        self._constraint = self._product = self._theta_hook = self._checksum = None
        self.theta_m = self.theta_v = None
        self.last_update = {}

    def _rebuild(self) -> None:
        """Make what is derived: the constraint or hook of the present mode, offsets, checksum."""
        mode, mask = self.mode, self._sparse_mask
        if mask is None:
            return
        if mode is RESUMode.SPARSE:
            self._constraint = Constraint(self.weight, mask, kind="zero")
        elif mode is RESUMode.RESU:
            self._constraint = Constraint(self.weight, mask, kind="frozen")
            if self._checksum is None:
                self._checksum = active_checksum(self.weight, mask)
        else:
            if self._offsets is None:
                self._offsets = row_offsets(mask)
            if mode is RESUMode.QRESU_SELECTIVE:
                self._theta_hook = self_update.attach(self)

    # -- nn.Module's own ways -------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name).dtype for name in _EXACT if getattr(self, name) is not None}
        before = self.weight_dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in exact.items():
            setattr(self, name, getattr(self, name).to(dtype))
        if self._waiting:
            self._waiting[0].data = fn(self._waiting[0].data)
        if self.is_resu_active:
            self._settings = replace(self._settings, theta_dtype=self._theta_dtype())
        if self._sparse_mask is not None and self.bitmask is not None:
            self._sparse_mask = self._sparse_mask.to(self.bitmask.device)
            self.bitmask = self._sparse_mask.packed
            if self.weight_dtype != before:
                self._checksum = None
            for derived in (self._constraint, self._theta_hook):
                if derived is not None:
                    derived.remove()
            self._product = None
            self._rebuild()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self._DERIVED)}

    def __setstate__(self, state_: dict[str, Any]) -> None:
        super().__setstate__(state_)  # type: ignore[no-untyped-call]
        self._rebuild()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mode is not RESUMode.DENSE:
            destination[prefix + state.SETTINGS] = self._settings.to_tensor()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # args: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        ready = state.prepare(self, state_dict, prefix, args[-1])
        if ready is not None:
            super()._load_from_state_dict(ready, prefix, *args)
            state.finish(self)

    def extra_repr(self) -> str:
        """The layer's sizes, its mode and sparsity."""
        text = super().extra_repr()
        return text if not self.is_sparse else f"{text}, mode={self.mode.name}, sparsity={self.sparsity:.4f}"

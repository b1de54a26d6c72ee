"""What ``RESULinear`` and ``RESUConv2d`` share: modes and the transitions between them.

One mode at a time; every transition is one method. ``weight`` is the plain Parameter in DENSE, SPARSE and RESU. In the
quantized modes it is not registered: the same Parameter object waits, emptied, and takes the weight up again at exit, so
that an optimizer made before still owns it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from resu.core.counting import check_finite, check_sparsity, keep_count, top_k_mask
from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask
from resu.core.pattern import Unstructured
from resu.core.quantization import pack_codes, quantize
from resu.core.resurrection import (
    PackedRows,
    active_checksum,
    gather_active,
    gather_theta,
    init_theta,
    row_offsets,
    scatter_theta_,
    sigma_active,
)
from resu.core.selective import SelectionConfig
from resu.modules import self_update, state
from resu.modules.assembled import assembled_weight
from resu.modules.capture import ActivationCapture
from resu.modules.settings import FrozenWeightError, ModeError, RESUMode, Settings, illegal
from resu.modules.sparse_forward import SparseProduct, check_threshold

__all__ = ["FrozenWeightError", "ModeError", "RESUMode", "RESUModule"]

# Kept in their own precision whatever the layer is converted to.
_EXACT = ("scale", "zero", "theta_m", "theta_v")
_BUFFERS = ("bitmask", "codes", *_EXACT)


class RESUModule(ActivationCapture, nn.Module):
    """A layer with a weight that may be pruned and resurrected. Use ``RESULinear`` or ``RESUConv2d``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    theta: nn.Parameter | None
    bitmask: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    theta_m: Tensor | None
    theta_v: Tensor | None

    # Names of what other layers this weight is shared with; set by convert_to_resu.
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
        return self._waiting[0].dtype if self._waiting else self.weight.dtype

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
        if not self.mode.quantized:
            return self.weight
        return assembled_weight(self._theta_parameter(), self._rows(), self._known_mask(), self.weight_dtype)

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

    def _known_mask(self) -> SparseMask:
        assert self._sparse_mask is not None
        return self._sparse_mask

    def _theta_parameter(self) -> nn.Parameter:
        assert self.theta is not None
        return self.theta

    def _rows(self) -> PackedRows:
        assert self.codes is not None and self.bitmask is not None and self._offsets is not None
        assert self.scale is not None and self.zero is not None
        columns = self._weight_shape[1:].numel()
        return PackedRows(
            self.codes, self.bitmask, self.scale, self.zero, self._offsets, columns, self._settings.bits
        )

    # -- pruning --------------------------------------------------------------------------------------
    def _require(self, call: str, *modes: RESUMode, hint: str = "") -> None:
        if self.mode not in modes:
            raise illegal(call, self.mode, hint)

    def prune_by_magnitude(self, sparsity: float, global_pruning: bool = True) -> None:
        """Keep the largest ``|weight|``; mode becomes SPARSE.

        Args:
            sparsity: Fraction removed, in [0, 1).
            global_pruning: True: weights compete over the whole layer, exact count. False: within each output row.

        Raises:
            ModeError: Unless DENSE or SPARSE.
            ValueError: On NaN weights or a sparsity out of range.
        """
        self._require("prune_by_magnitude", RESUMode.DENSE, RESUMode.SPARSE)
        check_sparsity(sparsity)
        check_finite(self.weight, "weight")
        self._prune(self.weight.detach().abs(), sparsity, global_pruning)

    def prune_by_wanda(self, sparsity: float, activation_norms: Tensor) -> None:
        """Keep the largest ``|weight| · norm of its input``, compared within each output row; mode becomes SPARSE.

        Args:
            sparsity: Fraction removed of each row, in [0, 1).
            activation_norms: L2 norm per input: ``[in]``; for a convolution ``[in]`` (channels) or
                ``[in, kh, kw]``. :attr:`activation_norms` gives them.

        Raises:
            ModeError: Unless DENSE or SPARSE.
            ValueError: On norms of another shape, negative or not finite.
        """
        self._require("prune_by_wanda", RESUMode.DENSE, RESUMode.SPARSE)
        check_sparsity(sparsity)
        check_finite(self.weight, "weight")
        if not isinstance(activation_norms, Tensor):
            raise TypeError(
                f"activation_norms must be a tensor, got {type(activation_norms).__name__}; set "
                "capture_activations = True, run batches and pass layer.activation_norms"
            )
        check_finite(activation_norms, "activation_norms")
        if bool((activation_norms < 0).any()):
            raise ValueError("activation_norms holds negative values; L2 norms are >= 0")
        norms = self._norms_like_weight(activation_norms.to(self.weight.device, torch.float32))
        self._prune(self.weight.detach().abs().float() * norms, sparsity, False)

    def _prune(self, scores: Tensor, sparsity: float, whole: bool) -> None:
        if whole:
            mask = top_k_mask(scores, keep_count(scores.numel(), sparsity))
        else:
            mask = Unstructured("row").mask(scores, sparsity)
        self.set_mask(mask)

    def set_mask(self, mask: SparseMask | Tensor) -> None:
        """Use this mask: pruned positions become 0 and stay 0; mode becomes SPARSE.

        Raises:
            ModeError: Unless DENSE or SPARSE.
            TypeError: If the mask is not a SparseMask or a bool tensor.
            ValueError: If its shape differs from the weight's.
        """
        self._require("set_mask", RESUMode.DENSE, RESUMode.SPARSE, hint="exit the present mode first")
        if not isinstance(mask, SparseMask):
            mask = SparseMask(mask)
        if mask.shape != self._weight_shape:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not fit the weight of shape {tuple(self._weight_shape)}"
            )
        self._become_sparse(mask.to(self.weight.device))

    def remove_mask(self) -> None:
        """Forget the mask: mode becomes DENSE, zeros are free to train."""
        self._require("remove_mask", RESUMode.DENSE, RESUMode.SPARSE)
        self._become_dense()

    # -- entering -------------------------------------------------------------------------------------
    def enter_resu_mode(
        self,
        epsilon: float = 0.1,
        use_selective: bool = False,
        selective_config: SelectionConfig | None = None,
        lr: float = 1e-4,
    ) -> None:
        """Freeze the active weights and give pruned positions θ ~ N(0, (ε·σ_active)²); mode becomes RESU.

        θ lives in ``weight`` itself: train it with any ``torch.optim`` optimizer over ``layer.weight`` (active weights
        stay bit-identical), or with :meth:`resu_step`.

        Args:
            epsilon: Size of the start values relative to the active weights.
            use_selective: Whether :meth:`resu_step` moves selected coordinates only.
            selective_config: How it selects.
            lr: Step size of :meth:`resu_step`.

        Raises:
            ModeError: Unless SPARSE (in RESU mode with the same settings it does nothing).
        """
        settings = Settings(
            mode=RESUMode.RESU,
            epsilon=epsilon,
            use_selective=use_selective,
            lr=lr,
            selective_config=selective_config or SelectionConfig(),
            theta_dtype=self.weight_dtype,
        )
        if self._reentered("enter_resu_mode", settings):
            return
        mask, weight = self._known_mask(), self.weight
        theta = init_theta(mask, sigma_active(weight, mask), epsilon, weight.dtype, weight.device)
        self._leave()
        self._settings = settings
        self._waiting_trains = weight.requires_grad
        weight.requires_grad_(True)
        weight.grad = None
        scatter_theta_(weight, theta, mask)
        if use_selective:
            self._make_averages(theta)
        self._rebuild()

    def enter_qresu_mode(
        self,
        bits: int = 4,
        epsilon: float = 0.1,
        qscheme: str = "per_channel",
        *,
        theta_dtype: torch.dtype | None = None,
    ) -> None:
        """Quantize and freeze the active weights, free the dense weight, give pruned positions θ; mode QRESU.

        Args:
            bits: 4 or 8.
            epsilon: Size of θ's start values relative to the active weights.
            qscheme: ``"per_channel"`` (a scale per output row) or ``"per_tensor"``.
            theta_dtype: Dtype of θ; that of the weight by default.

        Raises:
            ModeError: Unless SPARSE (in QRESU mode with the same settings it does nothing).
            ValueError: On unknown bits or scheme, or a weight shared with another layer.
        """
        self._enter_quantized(
            "enter_qresu_mode",
            Settings(
                mode=RESUMode.QRESU,
                bits=bits,
                qscheme=qscheme,
                epsilon=epsilon,
                theta_dtype=theta_dtype or self.weight_dtype,
            ),
        )

    def enter_qresu_selective_mode(
        self,
        bits: int = 4,
        epsilon: float = 0.1,
        qscheme: str = "per_channel",
        selective_config: SelectionConfig | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        theta_dtype: torch.dtype | None = None,
    ) -> None:
        """Like :meth:`enter_qresu_mode`, and the layer updates θ itself as each gradient arrives; mode QRESU_SELECTIVE.

        No optimizer is needed. Only coordinates whose gradient is large and consistent move (see
        ``resu.core.selective``). Across ``torch.distributed`` ranks the gradient is averaged first. Under a GradScaler,
        set ``layer.gradient_scale = scaler.get_scale()``. A gradient with NaN or infinities changes nothing.

        Args:
            bits: 4 or 8.
            epsilon: Size of θ's start values relative to the active weights.
            qscheme: ``"per_channel"`` or ``"per_tensor"``.
            selective_config: How coordinates are selected.
            lr: Step size.
            weight_decay: Decay of selected coordinates.
            theta_dtype: Dtype of θ; that of the weight by default.

        Raises:
            ModeError: Unless SPARSE (in this mode with the same settings it does nothing).
        """
        self._enter_quantized(
            "enter_qresu_selective_mode",
            Settings(
                mode=RESUMode.QRESU_SELECTIVE,
                bits=bits,
                qscheme=qscheme,
                epsilon=epsilon,
                use_selective=True,
                lr=lr,
                weight_decay=weight_decay,
                selective_config=selective_config or SelectionConfig(),
                theta_dtype=theta_dtype or self.weight_dtype,
            ),
        )

    def _enter_quantized(self, call: str, settings: Settings) -> None:
        if self._reentered(call, settings):
            return
        if self._shared_with:
            raise ValueError(
                f"this weight is shared with {', '.join(self._shared_with)}, which would lose it when the dense weight is "
                "freed; exclude the layer or use enter_resu_mode()"
            )
        mask, weight = self._known_mask(), self.weight
        sigma = sigma_active(weight, mask)
        quantized = quantize(weight, settings.bits, settings.qscheme, mask.mask)
        codes = pack_codes(gather_active(quantized.codes, mask), settings.bits)
        theta = init_theta(mask, sigma, settings.epsilon, settings.theta_dtype, weight.device)
        self._install_quantized(settings, mask, codes, quantized.scale, quantized.zero, theta)

    def _reentered(self, call: str, settings: Settings) -> bool:
        """Whether the layer is in this mode already; raises unless it is that or SPARSE."""
        if self.mode is not settings.mode:
            self._require(call, RESUMode.SPARSE, hint="" if self.is_sparse else "prune the layer first")
            return False
        now = self._settings
        rates = {"lr", "weight_decay", "selective_config"}  # may change while θ stays
        if replace(settings, **{name: getattr(now, name) for name in rates}) != now:
            raise ModeError(
                f"{call}() with other settings than the present ones ({now}) is illegal in mode {self.mode.name}; "
                "exit the mode first, or pass the same settings to keep θ"
            )
        self._settings = settings
        return True

    # -- leaving --------------------------------------------------------------------------------------
    def resu_step(self, grad_matrix: Tensor | None = None) -> dict[str, float]:
        """One update of θ by the layer itself (RESU mode), with the ``lr`` given at entry.

        With ``use_selective`` only selected coordinates move (``resu.core.selective``); otherwise it is
        ``θ <- θ - lr·g``.

        Args:
            grad_matrix: Gradient of the effective weight, of the weight's shape. By default ``weight.grad``, which is
                used up: it is None afterwards, so that an optimizer does not apply it again.

        Returns:
            ``mean_consistency``, ``selection_ratio``, ``n_selected``, ``n_pruned`` and ``skipped`` (1.0 if the gradient
            held NaN or infinities and nothing was changed).

        Raises:
            ModeError: Unless in RESU mode.
            ValueError: If there is no gradient, or it has another shape.
        """
        self._require("resu_step", RESUMode.RESU)
        return self_update.resu_step(self, grad_matrix)

    def exit_resu_mode(self, commit: bool = True, *, verify: bool = True) -> None:
        """Leave RESU mode.

        Args:
            commit: True: W = M⊙W + Φ(θ), the mask is dropped, mode DENSE (``set_mask`` to prune again). False: pruned
                positions are 0 again, mode SPARSE with the same mask.
            verify: Whether to compare the active weights with their checksum from entry.

        Raises:
            ModeError: Unless in RESU mode.
            FrozenWeightError: If active weights have changed; the layer stays as it is.
        """
        self._require("exit_resu_mode", RESUMode.RESU)
        mask, weight = self._known_mask(), self.weight
        if verify and active_checksum(weight, mask) != self._checksum:
            raise FrozenWeightError(
                "active weights have changed since enter_resu_mode() although they were frozen: they were written "
                "directly, or by an optimizer that is not a torch.optim.Optimizer. Train through a torch.optim.Optimizer "
                "(subclass it), or call resu_step(); exit_resu_mode(verify=False) accepts the changed values"
            )
        weight.requires_grad_(self._waiting_trains)
        weight.grad = None
        if commit:
            self._become_dense()
        else:
            self._become_sparse(mask)

    def exit_qresu_mode(self, commit: bool = True) -> None:
        """Leave QRESU or QRESU_SELECTIVE mode; the dense weight is there again, the same Parameter object.

        Args:
            commit: True: W = M⊙dequantized + Φ(θ), mode DENSE. False: pruned positions are 0, mode SPARSE.

        Raises:
            ModeError: Unless in one of these modes.
        """
        self._require("exit_qresu_mode", RESUMode.QRESU, RESUMode.QRESU_SELECTIVE)
        mask = self._known_mask()
        values = self.effective_weight().detach()
        self._release_theta()
        self._take_up_weight(values)
        if commit:
            self._become_dense()
        else:
            self._become_sparse(mask)

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
        if self.theta is not None:
            self._settings = replace(self._settings, theta_dtype=self.theta.dtype)
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
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self.mode is not RESUMode.DENSE:
            destination[prefix + state.SETTINGS] = self._settings.to_tensor()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # args: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        ready = state.prepare(self, state_dict, prefix, args[-1])
        if ready is not None:
            super()._load_from_state_dict(ready, prefix, *args)  # type: ignore[no-untyped-call]
            state.finish(self)

    def extra_repr(self) -> str:
        """The layer's sizes, its mode and sparsity."""
        text = super().extra_repr()
        return text if not self.is_sparse else f"{text}, mode={self.mode.name}, sparsity={self.sparsity:.4f}"

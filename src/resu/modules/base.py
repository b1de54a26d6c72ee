"""What ``RESULinear`` and ``RESUConv2d`` share: the calls that take a layer from mode to mode.

::

    DENSE --prune_*, set_mask--> SPARSE --enter_*--> RESU | QRESU | QRESU_SELECTIVE
      ^------remove_mask-----------'  ^---exit_*(commit=False)---|
      ^--------------------------------------exit_*(commit=True)-'
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from resu.core.counting import check_finite, check_sparsity, keep_count, top_k_mask
from resu.core.enforcement import is_held
from resu.core.mask import SparseMask
from resu.core.pattern import Unstructured
from resu.core.quantization import pack_codes, quantize
from resu.core.resurrection import active_checksum, gather_active, scatter_theta_
from resu.core.selective import SelectionConfig
from resu.modules import self_update
from resu.modules.held import HeldWeight
from resu.modules.settings import FrozenWeightError, ModeError, RESUMode, Settings
from resu.modules.theta_start import start_theta

__all__ = ["FrozenWeightError", "ModeError", "RESUMode", "RESUModule"]


class RESUModule(HeldWeight):
    """A layer with a weight that may be pruned and resurrected. Use ``RESULinear`` or ``RESUConv2d``."""

    # -- pruning --------------------------------------------------------------------------------------
    def prune_by_magnitude(self, sparsity: float, global_pruning: bool = True) -> None:
        """Keep the largest ``|weight|``; mode becomes SPARSE.

        Args:
            sparsity: Fraction removed, in [0, 1).
            global_pruning: True: weights compete over the whole layer, exact count. False: within each output
                row.

        Raises:
            ModeError: Unless DENSE or SPARSE.
            ValueError: On NaN weights or a sparsity out of range.
        """
        self._require("prune_by_magnitude", RESUMode.DENSE, RESUMode.SPARSE)
        check_sparsity(sparsity)
        check_finite(self.weight, "weight")
        self._prune(self.weight.detach().abs(), sparsity, global_pruning)

    def prune_by_wanda(self, sparsity: float, activation_norms: Tensor) -> None:
        """Keep the largest ``|weight| · norm of its input``, compared within each output row; mode becomes
        SPARSE.

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
            ValueError: If its shape differs from the weight's, or the weight is held by another mask already: that
                of a layer that shares it, or of a Sparsifier.
        """
        self._require("set_mask", RESUMode.DENSE, RESUMode.SPARSE, hint="exit the present mode first")
        if not isinstance(mask, SparseMask):
            mask = SparseMask(mask)
        if mask.shape != self._weight_shape:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not fit the weight of shape {tuple(self._weight_shape)}"
            )
        if is_held(self.weight, except_for=self._constraint):
            shared = f" (it is shared with {', '.join(self._shared_with)})" if self._shared_with else ""
            raise ValueError(
                f"this weight{shared} is held by another mask already, and two masks on one weight prune more than "
                "either says: prune it through the layer that holds it, or let go of it there first, with "
                "remove_mask() on that layer or commit() on the Sparsifier"
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
        *,
        init: str | Tensor = "normal",
    ) -> None:
        """Freeze the active weights and give pruned positions θ ~ N(0, (ε·σ_active)²); mode becomes RESU.

        θ lives in ``weight`` itself: train it with any ``torch.optim`` optimizer over ``layer.weight``
        (active weights stay bit-identical), or with :meth:`resu_step`.

        Args:
            epsilon: Size of the start values relative to the active weights.
            use_selective: Whether :meth:`resu_step` moves selected coordinates only.
            selective_config: How it selects.
            lr: Step size of :meth:`resu_step`.
            init: What θ starts at: ``"normal"`` as above, ``"zeros"``, or values ``[p]`` (:func:`start_theta
                <resu.modules.theta_start.start_theta>`). Not looked at where the layer is in the mode already.

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
        theta = start_theta(init, weight, mask, epsilon, weight.dtype)
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
        init: str | Tensor = "normal",
    ) -> None:
        """Quantize and freeze the active weights, free the dense weight, give pruned positions θ; mode QRESU.

        Args:
            bits: 4 or 8.
            epsilon: Size of θ's start values relative to the active weights.
            qscheme: ``"per_channel"`` (a scale per output row) or ``"per_tensor"``.
            theta_dtype: Dtype of θ; that of the weight by default.
            init: What θ starts at, as in :meth:`enter_resu_mode`.

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
            init,
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
        init: str | Tensor = "normal",
    ) -> None:
        """Like :meth:`enter_qresu_mode`, and the layer updates θ itself as each gradient arrives; mode
        QRESU_SELECTIVE.

        No optimizer is needed. Only coordinates whose gradient is large and consistent move (see
        ``resu.core.selective``). Across ``torch.distributed`` ranks the gradient is averaged first. Under a
        GradScaler, set ``layer.gradient_scale = scaler.get_scale()``. A gradient with NaN or infinities
        changes nothing.

        Args:
            bits: 4 or 8.
            epsilon: Size of θ's start values relative to the active weights.
            qscheme: ``"per_channel"`` or ``"per_tensor"``.
            selective_config: How coordinates are selected.
            lr: Step size.
            weight_decay: Decay of selected coordinates.
            theta_dtype: Dtype of θ; that of the weight by default.
            init: What θ starts at, as in :meth:`enter_resu_mode`.

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
            init,
        )

    def _enter_quantized(self, call: str, settings: Settings, init: str | Tensor) -> None:
        if self._reentered(call, settings):
            return
        if self._shared_with:
            raise ValueError(
                f"this weight is shared with {', '.join(self._shared_with)}, which would lose it when the "
                "dense weight is freed; exclude the layer or use enter_resu_mode()"
            )
        mask, weight = self._known_mask(), self.weight
        theta = start_theta(init, weight, mask, settings.epsilon, settings.theta_dtype)
        quantized = quantize(weight, settings.bits, settings.qscheme, mask.mask)
        codes = pack_codes(gather_active(quantized.codes, mask), settings.bits)
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
                f"{call}() with other settings than the present ones ({now}) is illegal in mode "
                f"{self.mode.name}; exit the mode first, or pass the same settings to keep θ"
            )
        self._settings = settings
        return True

    # -- leaving --------------------------------------------------------------------------------------
    def resu_step(self, grad_matrix: Tensor | None = None) -> dict[str, float]:
        """One update of θ by the layer itself (RESU mode), with the ``lr`` given at entry.

        With ``use_selective`` only selected coordinates move (``resu.core.selective``); otherwise it is
        ``θ <- θ - lr·g``.

        Args:
            grad_matrix: Gradient of the effective weight, of the weight's shape. By default ``weight.grad``,
                which is used up: it is None afterwards, so that an optimizer does not apply it again.

        Returns:
            ``mean_consistency``, ``selection_ratio``, ``n_selected``, ``n_pruned`` and ``skipped`` (1.0 if
            the gradient held NaN or infinities and nothing was changed).

        Raises:
            ModeError: Unless in RESU mode.
            ValueError: If there is no gradient, or it has another shape.
        """
        self._require("resu_step", RESUMode.RESU)
        return self_update.resu_step(self, grad_matrix)

    def exit_resu_mode(self, commit: bool = True, *, verify: bool = True) -> None:
        """Leave RESU mode.

        Args:
            commit: True: W = M⊙W + Φ(θ), the mask is dropped, mode DENSE (``set_mask`` to prune again).
                False: pruned positions are 0 again, mode SPARSE with the same mask.
            verify: Whether to compare the active weights with their checksum from entry.

        Raises:
            ModeError: Unless in RESU mode.
            FrozenWeightError: If active weights have changed; the layer stays as it is.
        """
        self._require("exit_resu_mode", RESUMode.RESU)
        mask, weight = self._known_mask(), self.weight
        if verify and active_checksum(weight, mask) != self._checksum:
            raise FrozenWeightError(
                "active weights have changed since enter_resu_mode() although they were frozen: they were "
                "written directly, or by an optimizer that is not a torch.optim.Optimizer, or by a gradient that "
                "was changed after backward (noise, SAM). Train through a torch.optim.Optimizer (subclass it) with "
                "the gradient as backward left it, or call resu_step(); exit_resu_mode(verify=False) accepts the "
                "changed values"
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

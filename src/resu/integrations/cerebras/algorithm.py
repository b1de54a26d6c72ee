"""Dormant resurrection as a sparsity algorithm of ``cerebras.pytorch``, in tensor operations only."""

# Without `from __future__ import annotations`: ModelZoo makes the YAML's schema of the annotations of `__init__`.

from typing import Any

import torch
from torch import Tensor, nn

try:
    from cerebras.pytorch.sparse import DynamicSparsityAlgorithm
    from cerebras.pytorch.sparse.utils import make_mask_topk_sparsity
except ImportError:  # the class can be read about, and says what it needs when it is made
    DynamicSparsityAlgorithm = object

__all__ = ["RESU"]


class RESU(DynamicSparsityAlgorithm):  # type: ignore[misc]
    """Values θ at pruned positions learn from the dense gradient and compete to come back.

    θ takes no part in the forward pass. At each step it moves against the gradient of the masked forward,
    ``θ -= theta_lr · g / rms(g)`` at pruned positions with the root mean square over the tensor, so that its steps have
    the size of those of Adam, whatever the loss scale; a gradient that is not finite moves nothing. At an update step
    the largest of |W| (active) and |θ| (pruned) are kept: a position that comes back brings its θ as weight, one that
    is dropped leaves its weight as θ.

    It differs from :class:`resu.training.RESU` in what moves θ (there, the loop's own optimizer), since here gradients
    and optimizer state are masked before the optimizer sees them; and counts are those of ``cerebras.pytorch``,
    ``int((1 - sparsity) * numel)`` in float32. Of results on the wafer nothing is known.

    In YAML, once this module has been imported::

        sparsity:
          algorithm: resu
          sparsity: 0.9
          init_method: topk
          theta_lr: 0.001
          update: {freq: 16, stop: 8000}

    θ is a buffer ``<parameter>_theta`` beside ``<parameter>_mask``, in the model's checkpoint; a checkpoint without it
    begins with θ = 0.

    Args:
        theta_lr: Step of θ; about the learning rate of the weights. Positive.
        **kwargs: ``sparsity`` (a number or a schedule), ``update`` (``{freq, start, stop}`` or ``{steps}``) and
            ``init_method``, of ``cerebras.pytorch.sparse.DynamicSparsityAlgorithm``.

    Raises:
        ImportError: If ``cerebras.pytorch`` is not installed.
        ValueError: If ``theta_lr`` is not positive.
    """

    def __init__(self, theta_lr: float = 1e-3, **kwargs: Any) -> None:
        if DynamicSparsityAlgorithm is object:
            raise ImportError("this needs cerebras-pytorch (Python 3.11): pip install cerebras-pytorch")
        if not 0 < theta_lr < float("inf"):
            raise ValueError(f"theta_lr must be positive and finite, got {theta_lr!r}")
        super().__init__(**kwargs)
        self.theta_lr = float(theta_lr)

    def sparsify_parameter(self, module: nn.Module, name: str, param: Tensor) -> None:
        """Give a parameter its mask, and θ beside it."""
        super().sparsify_parameter(module, name, param)
        held = None if param is None else self.get_sparse_params(param)
        if held is None:  # Cerebras' own rules leave it dense
            return
        attribute = f"{held.param_name}_theta"
        if not hasattr(held.module, attribute):  # a weight of several names has one θ
            held.module.register_buffer(attribute, torch.zeros_like(param), persistent=True)
            held.module._register_load_state_dict_pre_hook(_Absent(attribute), with_module=True)

    def theta(self, p: Tensor) -> Tensor:
        """θ of a parameter: of its shape, 0 at active positions."""
        held = self.get_sparse_params(p)
        value: Tensor = getattr(held.module, f"{held.param_name}_theta")
        return value

    def _grad_hook(self, p: Tensor, grad: Tensor) -> Tensor:
        """Let θ learn of the dense gradient before it is masked."""
        with torch.no_grad():
            mask, theta = self.get_sparse_params(p).mask, self.theta(p)
            square = grad.float().square().mean()
            step = grad.float() * (self.theta_lr / square.clamp(min=1e-30).sqrt())
            learns = torch.logical_and(torch.isfinite(square), torch.logical_not(mask))
            theta.copy_(torch.where(learns, theta - step.to(theta.dtype), theta))
        masked: Tensor = super()._grad_hook(p, grad)
        return masked

    @torch.no_grad()
    def update_mask(self, p: Tensor, mask: Tensor, sparsity: Tensor) -> Tensor:
        """The tournament; weights and θ change places only where the step is an update step.

        Args:
            p: The parameter, 0 at pruned positions.
            mask: Bool of its shape.
            sparsity: Scalar.

        Returns:
            The new mask.
        """
        theta = self.theta(p)
        value = torch.where(mask, p, theta)
        kept: Tensor = make_mask_topk_sparsity(value.abs(), sparsity)
        now = torch.where(self.is_update_step, kept, mask)
        zero = torch.zeros_like(value)
        p.copy_(torch.where(now, value, zero))
        theta.copy_(torch.where(now, zero, value))
        return kept


class _Absent:
    """Puts a θ of zeros into a state that has none."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state.setdefault(prefix + self.attribute, torch.zeros_like(getattr(module, self.attribute)))

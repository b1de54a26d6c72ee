"""The Hessian of a layer's squared output error, damped and factorised: what second-order methods share.

For a layer ``y = W x`` the squared error that a change of the weights makes on the calibration inputs is, row by row,
``½ δ H δᵀ`` with ``H = (2/n) Σ x xᵀ``; one ``[in, in]`` matrix for all rows.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.counting import check_finite

__all__ = ["Factor", "factorise", "saliency"]

DAMPING = 0.01  # of the mean diagonal, as in the paper
_MOST_DAMPING = 1e3  # beyond it every positive semidefinite matrix has a factor, whatever the rounding


@dataclass(frozen=True)
class Factor:
    """``H + d·mean(diag H)·I = R Rᵀ`` of one or several layers.

    ``R`` is upper triangular, so that ``U = R⁻¹`` is the upper Cholesky factor of ``H⁻¹``. Where only blocks of ``U``
    on the diagonal are looked at, they are inverses of blocks of ``R``, and ``H`` is never inverted.

    Attributes:
        upper: R, ``[stacks, in, in]``, float32 or float64.
        dead: Inputs that were always 0, bool ``[stacks, in]``; their diagonal counts as 1.
        damping: d, the largest over the stacks: a fraction of the mean diagonal.
    """

    upper: Tensor
    dead: Tensor
    damping: float

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse of the damped H, ``[stacks, in]``. O(in³) for each stack."""
        result = torch.empty(self.upper.shape[:2], dtype=self.upper.dtype, device=self.upper.device)
        for upper, row in zip(self.upper, result, strict=True):
            inverse = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
            torch.sum(inverse.square_(), dim=0, out=row)  # H⁻¹ = Uᵀ U
        return result


def factorise(
    hessian: Tensor,
    *,
    damping: float = DAMPING,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Factor:
    """The damped Hessian as a triangular factor.

    An input that was always 0 (``H_jj = 0``) gets ``H_jj = 1``; then ``damping`` times the mean diagonal is added
    to it, as in the authors' code (github.com/IST-DASLab/sparsegpt). Where the matrix still has no Cholesky factor, the
    damping grows tenfold until it has one, with a warning that says so. A Hessian that is 0 everywhere (a layer or an
    expert that saw no input) counts as the identity, with a warning.

    Args:
        hessian: ``[in, in]``, or ``[stacks, in, in]`` for several layers of equal width. It is not changed.
        damping: Fraction of the mean diagonal, 0 or more.
        dtype: To compute in, float32 or float64; None: as wide as the Hessian, float32 at least.
        device: Where to compute; None: where the Hessian is.

    Raises:
        ValueError: On a Hessian of another shape, with NaN or infinite values, a negative diagonal, not symmetric or
            not positive semidefinite; on a negative damping.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> factor = factorise(2 / 2 * x.T @ x, damping=0.0)
        >>> factor.upper[0] @ factor.upper[0].T
        tensor([[2., 2.],
                [2., 4.]])
    """
    if hessian.ndim not in (2, 3) or hessian.shape[-1] != hessian.shape[-2] or hessian.numel() == 0:
        raise ValueError(
            f"a Hessian has shape [in, in] (or [experts, in, in]), none of them 0; got {tuple(hessian.shape)}"
        )
    if not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be a number of 0 or more, a fraction of the mean diagonal; got {damping!r}")
    stack = hessian.detach().reshape(-1, *hessian.shape[-2:])
    check_finite(stack, "the Hessian")
    device, dtype = device or hessian.device, dtype or compute_dtype(hessian, hessian)
    upper = torch.empty(stack.shape, dtype=dtype, device=device)
    dead = torch.empty(stack.shape[:2], dtype=torch.bool, device=device)
    used = [
        _factorise(one.to(device=device, dtype=dtype), float(damping), upper[k], dead[k]) for k, one in enumerate(stack)
    ]
    return Factor(upper, dead, max(used))


def _factorise(hessian: Tensor, damping: float, upper: Tensor, dead: Tensor) -> float:
    """Fill ``upper`` and ``dead`` for one matrix; the damping that it took."""
    diagonal = hessian.diagonal()
    largest = float(diagonal.amax())
    if bool((diagonal < 0).any()):
        raise ValueError(
            f"the diagonal of a Hessian is a sum of squares; got {float(diagonal.amin()):g} at "
            f"{int(diagonal.argmin())}: collect it again"
        )
    if float((hessian - hessian.T).abs().amax()) > 1e-3 * largest:
        raise ValueError("the Hessian is not symmetric; it is (2/n) Σ x xᵀ over the layer's inputs: collect it again")
    torch.eq(diagonal, 0, out=dead)
    if largest == 0:
        warnings.warn(
            "a Hessian is 0 everywhere (the layer, or an expert, saw no input); it counts as the identity", stacklevel=4
        )
        upper.zero_().diagonal().fill_(1)
        dead.fill_(False)
        return damping
    # The lower factor of the matrix read backwards, read backwards: one factorisation, and no inverse.
    backwards = hessian.flip(0, 1)
    original = torch.where(dead, 1, diagonal)
    step = original.mean()
    used = damping
    while True:
        backwards.diagonal().copy_((original + used * step).flip(0))
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            break
        if used >= _MOST_DAMPING:
            raise ValueError(
                f"the Hessian has no Cholesky factor even with {used:g} times its mean diagonal as damping: it is not "
                "positive semidefinite, so it is no sum of x xᵀ; collect it again"
            )
        used = max(used * 10, 1e-4)
    upper.copy_(lower.flip(0, 1))
    if used != damping:
        warnings.warn(
            f"Cholesky factorisation of the Hessian failed at damping {damping:g}; raised to {used:g} of the mean "
            "diagonal (more, or more varied, calibration data avoids it)",
            stacklevel=4,
        )
    return used


def stacked(weight: Tensor, hessian: Tensor) -> Tensor:
    """``weight [out, in…]`` as ``[stacks, out / stacks, in]``, each stack with a Hessian of its own.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"expected a weight of shape [out, in…] with no 0 in it, got {tuple(weight.shape)}")
    flat = weight.flatten(1)
    stacks = hessian.shape[0] if hessian.ndim == 3 else 1
    if hessian.shape[-1] != flat.shape[1] or not stacks or flat.shape[0] % stacks:
        raise ValueError(
            f"a Hessian of shape {tuple(hessian.shape)} does not fit a weight of shape {tuple(weight.shape)}: it needs "
            f"[{flat.shape[1]}, {flat.shape[1]}], or [experts, {flat.shape[1]}, {flat.shape[1]}] where the experts "
            f"divide the {flat.shape[0]} rows"
        )
    return flat.view(stacks, -1, flat.shape[1])


def compute_dtype(weight: Tensor, hessian: Tensor) -> torch.dtype:
    """The wider of both, float32 at least: half precision has no Cholesky factors.

    Raises:
        ValueError: If one of them is not floating.
    """
    if not (weight.is_floating_point() and hessian.is_floating_point()):
        raise ValueError(f"expected a floating weight and Hessian, got {weight.dtype} and {hessian.dtype}")
    return torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)


def saliency(weight: Tensor, hessian: Tensor, *, damping: float = DAMPING) -> Tensor:
    """``w² / [H⁻¹]_jj``: twice the error of removing one weight when all others may adapt (arXiv 2301.00774, eq. 3).

    Args:
        weight: ``[out, in…]``, floating; stacked experts as ``[experts * out, in]``.
        hessian: ``[n, n]`` with n the product of ``in…``, or ``[experts, n, n]``.
        damping: As in :func:`factorise`.

    Returns:
        Scores of the weight's shape, float32 or wider; 0 where an input was always 0. O(n³) for each Hessian.

    Raises:
        ValueError: On shapes that do not fit, NaN or infinite values, or what :func:`factorise` refuses.

    Example:
        >>> saliency(torch.tensor([[3.0, 1.0]]), torch.diag(torch.tensor([1.0, 16.0])), damping=0.0)
        tensor([[ 9., 16.]])
    """
    check_finite(weight, "weight")
    stack = stacked(weight, hessian)
    factor = factorise(hessian, damping=damping, dtype=compute_dtype(weight, hessian), device=weight.device)
    scores = stack.detach().to(factor.upper.dtype).square() / factor.inverse_diagonal()[:, None]
    return scores.masked_fill_(factor.dead[:, None], 0).view(weight.shape)

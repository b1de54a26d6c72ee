"""SparseGPT: which weights go, and how those that stay make up for them (Frantar & Alistarh, arXiv 2301.00774).

Going through the columns from left to right, each pruned weight's error is spread over the columns to its right in the
way that least changes the layer's output on the calibration inputs. With U the upper Cholesky factor of ``H⁻¹``
(``H⁻¹ = Uᵀ U``), removing weight j costs ``w_j² / U_jj²`` and moves the row by ``-(w_j / U_jj) · U_j``.

Here ``R = U⁻¹`` is computed instead (``H = R Rᵀ``, :mod:`resu.pruning.hessian`): within a block of columns U is the
inverse of the block of R, and what earlier columns D did to later ones L is ``(W - Ŵ)_D R_DL`` brought through that
block. It is the same update, with one factorisation of H in place of two factorisations and an inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.counting import check_finite
from resu.core.pattern import NM, Pattern, Unstructured
from resu.pruning.choices import (
    Blocks,
    Choose,
    Span,
    as_given,
    best_of_all,
    best_of_groups,
    best_of_rows,
    channels_last,
    of_columns,
    of_groups,
)
from resu.pruning.hessian import DAMPING, compute_dtype, factorise, saliency, stacked

__all__ = ["Solved", "reconstruct", "sparsegpt"]


@dataclass(frozen=True)
class Solved:
    """A pruned layer.

    Attributes:
        weight: Shape and dtype of the weight that was given; pruned positions are exactly +0.
        mask: Bool, of the weight's shape, True = kept. A kept weight may be 0.
        damping: The fraction of the mean diagonal that was added to the Hessian; more than what was asked for
            where the factorisation needed it.
    """

    weight: Tensor
    mask: Tensor
    damping: float


@torch.no_grad()
def sparsegpt(
    weight: Tensor, hessian: Tensor, *, pattern: Pattern, keep: int, block: int = 128, damping: float = DAMPING
) -> Solved:
    """Choose a mask by SparseGPT and update the weights that stay.

    How the mask is chosen depends on the pattern:

    - ``Unstructured("tensor")``: at the start of each block of columns the best of the block over all rows, by the
      weights as updated so far. The blocks share ``keep`` by their size (largest remainder), so the total is exact.
    - ``Unstructured("row")``: the same within each row; rows keep equal counts, or one more in the first ones.
    - ``NM``: the n best of each group when the sweep comes to it. Blocks end where groups end.
    - ``Block``, ``Channel`` and patterns of your own: what crosses columns cannot be judged within the sweep, so the
      mask is chosen up front by ``w² / [H⁻¹]_jj`` (the mean over a block or channel), and the sweep updates the rest.

    Ties keep the lower index.

    Args:
        weight: ``[out, in]``, or ``[out, in, kh, kw]`` in its own shape (so that N:M counts input channels). Experts
            stacked as ``[experts * out, in]`` compete with each other under tensor scope. Any floating dtype; computed
            in float32, or float64 where weight or Hessian is; not changed.
        hessian: ``(2/n) Σ x xᵀ`` over the layer's inputs, ``[n, n]`` with n the product of ``in…`` (for a convolution
            of the unfolded input, ``in`` slowest), or ``[experts, n, n]``, one for each equal share of the rows
            (experts, groups of a convolution). Not changed. May lie on another device.
        pattern: Which positions compete.
        keep: How many positions stay, from any allocation; N:M has its own count, Block and Channel round to whole
            units.
        block: Columns between two choices of the mask; 128 in the paper.
        damping: Fraction of the mean diagonal of H that is added to it; see :func:`resu.pruning.hessian.factorise`.

    Returns:
        :class:`Solved`. Weights of an input that was always 0 become 0 also where they are kept, as in the authors'
        code.

    Raises:
        ValueError: On shapes that do not fit, NaN or infinite values, an impossible ``keep`` or ``block``, or a Hessian
            that :func:`resu.pruning.hessian.factorise` refuses.

    O(in³/3 + out·in²) operations; beside the arguments four matrices of the weight's size and three of the Hessian's.

    Differs from the authors' code: counts are exact (there a threshold prunes all ties, and one weight too many per
    block); N:M works where M does not divide the block; the factor is R, not U. Known to fail where calibration data is
    scarce: with fewer tokens than inputs the update fits noise.

    Example:
        >>> x = torch.randn(64, 8) @ torch.randn(8, 8)
        >>> w = torch.randn(4, 8)
        >>> solved = sparsegpt(w, 2 / 64 * x.T @ x, pattern=Unstructured(), keep=16)
        >>> int(solved.mask.sum()), bool((solved.weight[~solved.mask] == 0).all())
        (16, True)
        >>> plain = torch.where(solved.mask, w, 0)
        >>> bool(((solved.weight - w) @ x.T).norm() < ((plain - w) @ x.T).norm())
        True
    """
    stacked(weight, hessian)  # do they fit?
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= weight.numel():
        raise ValueError(f"keep must be a count from 0 to {weight.numel()}, the weights of the layer; got {keep!r}")
    if isinstance(pattern, NM):
        order = channels_last(weight)
        return _solve(weight, hessian, damping, of_groups(weight, pattern.m, block), best_of_groups(pattern.n), order)
    blocks = of_columns(weight, block)
    if isinstance(pattern, Unstructured):
        choose = best_of_rows if pattern.scope == "row" else best_of_all
        return _solve(weight, hessian, damping, blocks, choose(weight, blocks, keep))
    mask = pattern.select(saliency(weight, hessian, damping=damping), keep)
    return _solve(weight, hessian, damping, blocks, as_given(stacked(mask, hessian)))


@torch.no_grad()
def reconstruct(weight: Tensor, hessian: Tensor, mask: Tensor, *, block: int = 128, damping: float = DAMPING) -> Solved:
    """Update the weights that a given mask keeps, by SparseGPT's sweep; the mask may come from any score and pattern.

    A row whose output on the calibration inputs the sweep would leave worse than plain masking does is plainly masked
    instead. (The sweep spreads errors also over columns that go later; on rows with few kept columns that can lose.) So
    ``‖(W - Ŵ) X‖`` is never above that of the plain mask, up to rounding.

    Args:
        weight: As for :func:`sparsegpt`.
        hessian: As for :func:`sparsegpt`.
        mask: Bool, of the weight's shape, True = kept.
        block: Columns updated together; the result does not depend on it but for rounding.
        damping: As for :func:`sparsegpt`.

    Returns:
        :class:`Solved` with that mask.

    Raises:
        ValueError: As :func:`sparsegpt`, and on a mask of another shape or dtype.

    O(in³/3 + 2·out·in²) time.

    Example:
        >>> solved = reconstruct(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0], [2.0, 2.0]]),
        ...     torch.tensor([[False, True]]), damping=1e-6)
        >>> solved.weight.round(decimals=3)  # the inputs are equal, so the kept weight takes over
        tensor([[0., 2.]])
    """
    stacked(weight, hessian)  # do they fit?
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"expected a bool mask of the weight's shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    given = stacked(mask.to(weight.device), hessian)
    return _solve(weight, hessian, damping, of_columns(weight, block), as_given(given), never_worse=True)


def _solve(
    weight: Tensor,
    hessian: Tensor,
    damping: float,
    blocks: Blocks,
    choose: Choose,
    order: Tensor | None = None,
    *,
    never_worse: bool = False,
) -> Solved:
    check_finite(weight, "weight")
    stack = stacked(weight.detach(), hessian)
    if order is not None:
        stack = stack[..., order]
        hessian = hessian[..., order.to(hessian.device), :][..., order.to(hessian.device)]
    factor = factorise(hessian, damping=damping, dtype=compute_dtype(weight, hessian), device=weight.device)
    # Columns first: a column is contiguous, and the sweep works on columns.
    before = stack.to(factor.upper.dtype).transpose(1, 2).contiguous().masked_fill_(factor.dead[..., None], 0)
    after, mask = _sweep(before, factor.upper, blocks, choose)
    if never_worse:
        _mask_plainly_where_better(before, after, mask, hessian)
    check_finite(after, "the updated weight (raise the damping); it")
    after, mask = after.transpose(1, 2), mask.transpose(1, 2)
    if order is not None:
        back = order.argsort()
        after, mask = after[..., back], mask[..., back]
    kept = mask.reshape(weight.shape).contiguous()
    return Solved(after.reshape(weight.shape).to(weight.dtype).contiguous(), kept, factor.damping)


def _sweep(before: Tensor, upper: Tensor, blocks: Blocks, choose: Choose) -> tuple[Tensor, Tensor]:
    """Weights after the sweep and what is kept, both ``[stacks, columns, rows]``."""
    after = torch.empty_like(before)
    mask = torch.empty_like(before, dtype=torch.bool)
    # (W - Ŵ)ᵀ of the columns so far, times R: what they did to the columns to come.
    pending = torch.zeros_like(before)
    for spans in blocks:
        start, stop = spans[0][0], spans[-1][1]
        here = slice(start, stop)
        inside = _inverse(upper[:, here, here])
        current = torch.baddbmm(before[:, here], inside.mT, pending[:, here])
        after[:, here] = current  # the sweep goes on in place
        _within(after[:, here], mask[:, here], inside, spans, choose)
        if stop < before.shape[1]:
            change = before[:, here] - after[:, here]
            pending[:, stop:].baddbmm_(upper[:, here, stop:].mT, change)
    return after, mask


def _inverse(upper: Tensor) -> Tensor:
    one = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    inverse: Tensor = torch.linalg.solve_triangular(upper, one, upper=True)
    return inverse


def _within(current: Tensor, mask: Tensor, inside: Tensor, spans: Sequence[Span], choose: Choose) -> None:
    """The sweep over one block, column by column, in place; ``inside`` is U's block, ``[stacks, columns, columns]``."""
    first = spans[0][0]
    diagonal = inside.diagonal(dim1=1, dim2=2)
    for start, stop in spans:
        a, b = start - first, stop - first
        # |w| / U_jj ranks as its square does, and neither over- nor underflows.
        mask[:, a:b] = choose(current[:, a:b].abs() / diagonal[:, a:b, None], start)
        for j in range(a, b):
            kept, column = mask[:, j], current[:, j]
            error = (column / diagonal[:, j, None]).masked_fill_(kept, 0)
            column.masked_fill_(~kept, 0)
            current[:, j + 1 :].addcmul_(inside[:, j, j + 1 :, None], error[:, None], value=-1)


def _mask_plainly_where_better(before: Tensor, after: Tensor, mask: Tensor, hessian: Tensor) -> None:
    """Take back the update of rows (in place) whose output error it raises."""
    plain = before.masked_fill(~mask, 0)
    stack = hessian.detach().to(device=before.device, dtype=before.dtype).reshape(-1, *hessian.shape[-2:])
    # d H d - e H e = (d - e) H (d + e), with d the change by plain masking and e that by the sweep.
    both = torch.matmul(stack, 2 * before - plain - after)
    gain = both.mul_(after - plain).sum(dim=1, keepdim=True)
    torch.where(gain < 0, plain, after, out=after)

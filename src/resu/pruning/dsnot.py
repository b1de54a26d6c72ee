"""DSnoT: better masks by swaps, without training and without touching a weight (Zhang et al., arXiv 2310.08915).

What pruning takes from an output, on average over the calibration inputs, is one number per row: the residual
``e = Σ_pruned w_j E[x_j]``. A swap grows a pruned weight that cancels part of it and prunes the least important kept
weight that cancels part of it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.counting import check_finite, top_k_rows
from resu.core.pattern import NM, Pattern, Unstructured

__all__ = ["dsnot"]


@torch.no_grad()
def dsnot(
    weight: Tensor,
    mask: Tensor,
    *,
    input_mean: Tensor,
    input_norm: Tensor,
    input_variance: Tensor | None = None,
    pattern: Pattern | None = None,
    rounds: int = 50,
    threshold: float = 0.1,
) -> Tensor:
    """Refine a mask, row by row, until the mean output is as before pruning (about), or nothing helps.

    In each round a row with residual e, where ``c_j = w_j E[x_j]`` is what weight j brings to the output on average,

    - grows the pruned weight with the largest ``sign(e) c_j`` (divided by ``input_variance``, where given);
    - prunes the kept weight with the smallest Wanda score ``|w_j| ‖x_j‖`` among those with ``sign(e) c_j < 0``.

    A row stops when ``|e| <= threshold``, when no such pair is left, or when the swap would not make ``|e|`` smaller.
    Under N:M the pair lies in one group: the grown weight is the best of those whose group has one to give. Ties keep
    the lower index. The count of each row, and of each group, stays.

    Args:
        weight: ``[out, in…]``, floating; not changed. Stacked experts as ``[experts * out, in]``.
        mask: Bool, of the weight's shape, True = kept; not changed.
        input_mean: ``E[x]`` over the calibration tokens, ``[in…]``, or of the weight's shape where rows see different
            inputs.
        input_norm: ``‖x‖₂`` over them, as for Wanda; likewise.
        input_variance: ``Var[x]``, likewise, which the paper divides by; None: not divided.
        pattern: None, ``Unstructured`` or ``NM``.
        rounds: Swaps of each row at most.
        threshold: Residual at which a row is left alone, in units of the layer's output.

    Returns:
        The refined mask, bool, of the weight's shape.

    Raises:
        ValueError: On shapes that do not fit, NaN or infinite values, a pattern that swaps of single weights break, a
            mask that breaks the pattern, negative ``rounds`` or ``threshold``.

    O(out·in) to find which weights can take part (at most 4 · rounds in a row, or 2 · rounds groups), and
    O(out · rounds²) for the swaps.

    Follows the paper (eq. 4 and 5, algorithm 1; 50 rounds and threshold 0.1 are its settings) but for two things: a
    swap that would make the residual larger is not done, so that a row cannot swing to and fro until the rounds are
    over; and dividing by the variance is up to you. The authors' code (github.com/zyxxmu/DSnoT) differs further: a
    weight moves once at most, the residual is summed over the tokens of a sequence (so that 0.1 stops hardly anything),
    and under N:M any weight of the group may be given up, whatever its sign.

    Known to fail: only means are looked at, so that on layers whose inputs have mean 0 nothing happens, and the squared
    error can rise.

    Example:
        >>> w, mean = torch.tensor([[2.0, -0.5, 1.0, 3.0]]), torch.ones(4)
        >>> mask = torch.tensor([[False, True, False, True]])  # 3 is missing from the mean output
        >>> dsnot(w, mask, input_mean=mean, input_norm=mean)  # 2 for -0.5: 0.5 is
        tensor([[ True, False, False,  True]])
    """
    _check(weight, mask, pattern, rounds, threshold)
    mask = mask.to(weight.device, copy=True)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    mean = _like(input_mean, wide, "input_mean")
    brings = wide * mean
    ranks = brings
    if input_variance is not None:
        variance = _like(input_variance, wide, "input_variance", least=0.0)
        # A constant input cancels with certainty: its variance counts as next to nothing, not as nothing.
        ranks = brings / variance.clamp_min(torch.finfo(wide.dtype).eps * float(variance.amax()) or 1.0)
    wanda = wide.abs() * _like(input_norm, wide, "input_norm", least=0.0)
    if isinstance(pattern, NM):
        shape = (len(weight), -1, pattern.m)
        # Padding of short groups is neither kept nor pruned.
        rows = _Rows(*(pattern._groups(x, 0).view(shape) for x in (brings, ranks, wanda, mask, ~mask)))
    else:
        rows = _Rows(*(x.reshape(len(weight), 1, -1) for x in (brings, ranks, wanda, mask, ~mask)))
    if rounds:
        _swap(rows, rounds, threshold)
    if isinstance(pattern, NM):
        return pattern._ungroup(rows.kept.view(-1, pattern.m), mask.shape)
    return rows.kept.view(mask.shape)


@dataclass(frozen=True)
class _Rows:
    """Everything ``[rows, groups, members]``: a group is where swaps may happen, one per row without N:M."""

    brings: Tensor
    ranks: Tensor
    wanda: Tensor
    kept: Tensor
    pruned: Tensor

    def gather(self, dim: int, index: Tensor) -> _Rows:
        return self._each(lambda x: x.gather(dim, index))

    def of(self, rows: Tensor) -> _Rows:
        return self._each(lambda x: x[rows])

    def _each(self, what: Callable[[Tensor], Tensor]) -> _Rows:
        return _Rows(what(self.brings), what(self.ranks), what(self.wanda), what(self.kept), what(self.pruned))

    def choices(self, sign: Tensor) -> tuple[Tensor, Tensor]:
        """What may be grown and what may be given up against a residual of this sign ``[rows, 1, 1]``."""
        toward = self.brings * sign
        gives = self.kept & (toward < 0)
        return self.pruned & (toward > 0) & gives.any(dim=2, keepdim=True), gives


def _swap(rows: _Rows, rounds: int, threshold: float) -> None:
    """Swap in place: ``rows.kept`` changes."""
    residual = rows.brings.masked_fill(~rows.pruned, 0).sum(dim=(1, 2))
    dim, index = _who_can_take_part(rows, rounds)
    few = rows if index is None else rows.gather(dim, index)
    members = few.kept.shape[2]
    left = (residual.abs() > threshold).nonzero().view(-1)
    for _ in range(rounds):
        if not len(left):
            break
        now, error = few.of(left), residual[left]
        each = torch.arange(len(left), device=left.device)
        sign = error.sign()[:, None, None]
        grows, gives = now.choices(sign)
        best = (now.ranks * sign).masked_fill_(~grows, -math.inf).flatten(1).argmax(dim=1)
        group, member = best // members, best % members
        given = now.wanda[each, group].masked_fill_(~gives[each, group], math.inf).argmin(dim=1)
        after = error + now.brings[each, group, given] - now.brings[each, group, member]
        good = grows[each, group, member] & (after.abs() < error.abs())
        left, group, member, given, after = (x[good] for x in (left, group, member, given, after))
        few.kept[left, group, member] = True
        few.kept[left, group, given] = False
        few.pruned[left, group, member] = False
        few.pruned[left, group, given] = True
        residual[left] = after
        left = left[after.abs() > threshold]
    if index is not None:
        rows.kept.scatter_(dim, index, few.kept)


def _who_can_take_part(rows: _Rows, rounds: int) -> tuple[int, Tensor | None]:
    """A dimension and indices along it outside of which ``rounds`` swaps never look; None: take everything.

    A row grows and gives up at most ``rounds`` weights, so of each kind, with either sign, the first ``rounds`` are
    enough; what a swap adds to a kind is of another kind and among them. With N:M the same holds for groups.
    """
    _, groups, members = rows.kept.shape
    places, kinds = (members, 4) if groups == 1 else (groups, 2)
    if places <= kinds * rounds:
        return 0, None
    wanted = torch.zeros(len(rows.kept), places, dtype=torch.float32, device=rows.kept.device)
    for sign in (1.0, -1.0):
        grows, gives = rows.choices(torch.full((1, 1, 1), sign, dtype=rows.ranks.dtype, device=rows.ranks.device))
        best = (rows.ranks * sign).masked_fill_(~grows, -math.inf)
        lists = [best.amax(dim=2)] if groups > 1 else [best[:, 0], (-rows.wanda).masked_fill_(~gives, -math.inf)[:, 0]]
        for keys in lists:
            wanted += top_k_rows(keys, rounds)
    # All that are wanted, and any others to fill up; in order, so that ties stay with the lower index.
    index = wanted.topk(kinds * rounds, dim=1, sorted=False).indices.sort(dim=1).values
    if groups == 1:
        return 2, index[:, None]
    return 1, index[..., None].expand(-1, -1, members)


def _like(x: Tensor, weight: Tensor, what: str, *, least: float | None = None) -> Tensor:
    """A statistic of the inputs as the weight sees it."""
    check_finite(x, what)
    given = tuple(x.shape)
    if x.ndim == 1 and weight.ndim > 2:  # per input channel of a convolution
        x = x.view(-1, *[1] * (weight.ndim - 2))
    try:
        x = x.to(device=weight.device, dtype=weight.dtype).expand_as(weight)
    except RuntimeError:
        raise ValueError(f"{what} of shape {given} does not fit a weight of shape {tuple(weight.shape)}") from None
    if least is not None and bool((x < least).any()):
        raise ValueError(f"{what} must be {least:g} or more everywhere, got {float(x.amin()):g}")
    return x


def _check(weight: Tensor, mask: Tensor, pattern: Pattern | None, rounds: int, threshold: float) -> None:
    if weight.ndim < 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"expected floating weights of shape [out, in…] with no 0 in it, got {weight.dtype} {tuple(weight.shape)}"
        )
    check_finite(weight, "weight")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"expected a bool mask of the weight's shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if pattern is not None and not isinstance(pattern, (Unstructured, NM)):
        raise ValueError(
            f"DSnoT swaps single weights, which breaks {pattern}; it refines unstructured and N:M masks only"
        )
    if isinstance(pattern, NM) and (broken := pattern.violations(mask)):
        raise ValueError(
            f"the mask breaks {pattern.n}:{pattern.m} in {broken} groups; choose it under that pattern first"
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be a count, 0 or more (50 in the paper); got {rounds!r}")
    if not (isinstance(threshold, (int, float)) and 0 <= threshold < math.inf):
        raise ValueError(f"threshold must be a number of 0 or more (0.1 in the paper), got {threshold!r}")

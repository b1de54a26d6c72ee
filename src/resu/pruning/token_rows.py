"""Follows which tokens the rows of a tensor are, through routers that pick, sort and cut them.

Padding is known for ``[batch, tokens, …]``. What a router gives an expert are rows in an order of their own, so which
tokens they are is written on the tensors as they are made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["follow_rows", "rows_between", "token_rows"]

_ROWS = "_resu_token_rows"  # a tensor's rows as indices into the flat list of tokens
_MOVES = ("index", "index_select", "transpose")  # where the rows go is known
_SHUFFLES = {"flip": 1, "roll": 2, "sort": 1, "gather": 1, "topk": 2}  # it is not; which argument is the dimension


def token_rows(x: Tensor, mask: Tensor) -> Tensor | None:
    """Which tokens of ``mask`` ``[batch, tokens]`` the leading dimensions of ``x`` are, as flat indices.

    Returns:
        Indices ``[batch, tokens]`` or ``[rows]``, -1 where rows were shuffled; None where nothing is known.
    """
    known = getattr(x, _ROWS, None)
    if isinstance(known, Tensor):
        return known
    if x.ndim >= 3 and x.shape[:2] == mask.shape:
        return torch.arange(mask.numel(), device=x.device).view(mask.shape)
    if x.ndim == 2 and x.shape[0] == mask.numel():
        return torch.arange(mask.numel(), device=x.device)
    return None


def follow_rows(name: str, args: tuple[Any, ...], out: Any, mask: Tensor, left: int | None = None) -> None:
    """Write on the results of an operation which tokens their rows are, where its arguments say so.

    Args:
        name: Of the operation, as torch dispatches it.
        args: Its arguments.
        out: Its result.
        mask: ``[batch, tokens]``.
        left: For products: which argument holds the rows.
    """
    source = args[0] if args and isinstance(args[0], Tensor) else None
    if source is not None and name in _MOVES:
        rows = _moved(name, token_rows(source, mask), args)
    elif source is not None and name in _SHUFFLES:
        rows = _shuffled(name, token_rows(source, mask), args)
    elif left is not None:
        rows = getattr(args[left], _ROWS, None)
    else:
        rows = next((r for a in args if isinstance(a, Tensor) and (r := getattr(a, _ROWS, None)) is not None), None)
    if rows is None:
        return
    parts = [one for one in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(one, Tensor)]
    along = _split(name, rows, args, parts)
    for one, own in zip(parts, along or [rows] * len(parts), strict=True):
        if one is not source:
            _tag(one, own)


def _moved(name: str, rows: Tensor | None, args: tuple[Any, ...]) -> Tensor | None:
    if rows is None:
        return None
    if name == "index":
        indices = args[1]
        if len(indices) <= rows.ndim and all(i is not None for i in indices):
            return rows[tuple(i.to(rows.device) for i in indices)]
        return None
    if name == "index_select":
        return rows[args[2].to(rows.device)] if args[1] == 0 and rows.ndim == 1 else None
    swapped = {args[1] % args[0].ndim, args[2] % args[0].ndim}
    if swapped == {0, 1}:
        return rows.t() if rows.ndim == 2 else None
    return rows if min(swapped) >= rows.ndim else None


def _split(name: str, rows: Tensor, args: tuple[Any, ...], parts: list[Tensor]) -> list[Tensor] | None:
    """The rows of each part, where a tensor is cut along its first dimension."""
    dim = args[1] if name == "slice" and len(args) > 1 else args[2] if len(args) > 2 else 0
    if rows.ndim != 1 or name not in ("slice", "split", "split_with_sizes") or dim % args[0].ndim:
        return None
    if name == "slice":
        start, end, step = [*args[2:], *[None] * 3][:3]
        return [rows[slice(start, end, step)]]
    return list(rows.split([part.shape[0] for part in parts]))


def rows_between(x: Tensor, start: int, end: int) -> Tensor:
    """``x[start:end]``, with what is known of its rows."""
    rows, some = getattr(x, _ROWS, None), x[start:end]
    if isinstance(rows, Tensor):
        _tag(some, rows[start:end])
    return some


def _shuffled(name: str, rows: Tensor | None, args: tuple[Any, ...]) -> Tensor | None:
    if rows is None:
        return None
    place = _SHUFFLES[name]
    dims = args[place] if len(args) > place else -1
    dims = [dims] if isinstance(dims, int) else dims
    inside = bool(dims) and all(d % args[0].ndim >= rows.ndim for d in dims)
    return rows if inside else torch.full_like(rows, -1)


def _tag(x: Tensor, rows: Tensor) -> None:
    if x.shape[: rows.ndim] == rows.shape:
        setattr(x, _ROWS, rows)
    elif x.ndim and x.shape[0] == rows.numel():
        setattr(x, _ROWS, rows.reshape(-1))

"""What the inputs of layers look like while batches run through a model: hooks, padding, experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from resu.core.counting import check_finite
from resu.core.layers import Layer, is_conv1d_of_transformers
from resu.pruning.moments import CONVOLUTIONS, Moments, outer_product
from resu.pruning.multiplications import Multiplications, Operand
from resu.pruning.token_rows import token_rows

__all__ = ["Inputs", "input_parts", "padding_masks"]

_UNKNOWN = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
)


def input_parts(layer: Layer) -> int:
    """How many parts of equally many rows of ``layer.matrix(weight)`` see inputs of their own.

    Experts of a stack, groups of a convolution, queries, keys and values of ``nn.MultiheadAttention``; else 1.
    """
    if layer.stacked:
        return int(layer.weight.shape[0])
    if isinstance(layer.module, CONVOLUTIONS):
        return layer.module.groups
    return 3 if isinstance(layer.module, nn.MultiheadAttention) and layer.attribute == "in_proj_weight" else 1


def padding_masks(batch: Any) -> dict[str, Tensor]:
    """``{name: bool [batch, tokens]}``, True = a real token, of every attention mask in a batch that marks padding.

    Of a 4-D mask ``[batch, 1, queries, keys]`` (bool or integer: nonzero = may look; float: added to the logits),
    a token is real where it may look at itself.
    """
    found = {}
    for key, mask in batch.items() if isinstance(batch, Mapping) else ():
        if not (isinstance(key, str) and key.endswith("attention_mask") and isinstance(mask, Tensor)):
            continue
        if mask.ndim == 4 and mask.shape[-1] == mask.shape[-2]:
            own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            mask = own > torch.finfo(own.dtype).min / 2 if own.is_floating_point() else own != 0
        if mask.ndim == 2 and not bool((real := mask != 0).all()):
            found[key] = real
    return found


class Inputs:
    """Collects the inputs of ``layers`` while the body of :meth:`watching` runs the model.

    Layers that are called themselves (linear, convolution, Hugging Face ``Conv1D``) are hooked; what other modules
    multiply with their weights (fused experts, attention projections) is seen at the multiplication.

    Args:
        layers: ``{name: Layer}``.
        needs: Of ``"inputs"`` (norms and means) and ``"hessian"``.

    Raises:
        ValueError: On a layer type whose inputs are not known column by column.
    """

    def __init__(self, layers: Mapping[str, Layer], needs: Collection[str]) -> None:
        self.layers = layers
        self.has_inputs, self.has_hessian = "inputs" in needs, "hessian" in needs
        self.moments: dict[str, Moments] = {}
        self._operands: list[Operand] = []
        self._called: set[str] = set()
        self._blurred: set[str] = set()
        self._padding: dict[str, Tensor] = {}
        self._mode: Multiplications | None = None
        self._product: tuple[Tensor, int, Tensor] | None = None
        for name, layer in layers.items():
            if isinstance(layer.module, _UNKNOWN):
                raise ValueError(
                    f"inputs of {name!r} ({type(layer.module).__name__}) are not known column by column; exclude the "
                    "layer or use a score without input norms"
                )
            self.moments[name] = Moments(input_parts(layer), "inputs" in needs, "hessian" in needs)
            if not _is_called(layer):
                self._operands.append(Operand(layer, input_parts(layer), partial(self._multiplied, name)))

    @contextmanager
    def watching(self, padding: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Run one batch in here; ``padding`` are its masks (:func:`padding_masks`)."""
        self._padding = dict(padding or {})
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                see: Callable[..., None] = self._see if _is_called(layer) else self._note
                handle = layer.module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
                stack.callback(handle.remove)
            if self._operands or self._padding:
                # The fused attention of torch shows no multiplication.
                fast = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
                mask = next(iter(self._padding.values()), None)
                self._mode = stack.enter_context(Multiplications(self._operands, mask))
            try:
                yield
            finally:
                self._mode, self._product, self._padding = None, None, {}

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        with ExitStack() as stack:
            if self._mode is not None:
                stack.enter_context(self._mode.quiet())
            self._called.add(name)
            if isinstance(module, CONVOLUTIONS):
                self.moments[name].add_images(module, x.detach())
            else:
                self._add(name, 0, x)

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._called.add(name)

    @torch.no_grad()
    def _multiplied(self, name: str, part: int, x: Tensor) -> None:
        self._called.add(name)
        self._add(name, part, x)

    def _add(self, name: str, part: int, x: Tensor) -> None:
        # Detached only now: what a router wrote on the tensor would be lost.
        rows = self._tokens(name, x).detach().reshape(-1, x.shape[-1])
        moments = self.moments[name]
        if not moments.outer:
            moments.add_rows(part, rows)
            return
        # Queries, keys and values see one tensor; its product is computed once.
        known, version = self._product, -1 if x.is_inference() else x._version
        if known is None or known[0] is not x or known[1] != version:
            known = self._product = (x, version, outer_product(rows))
        moments.add_rows(part, rows, known[2])

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        """Without padding rows, where it is known which tokens the rows are."""
        if not self._padding:
            return x
        # Of several masks (encoder and decoder), the one whose prefix is in the layer's name goes first.
        by_name = sorted(
            self._padding, key=lambda key: key.removesuffix("attention_mask").strip("_") not in name.split(".")
        )
        for mask in (self._padding[key] for key in by_name):
            rows = token_rows(x, mask)
            if _in_attention(self.layers[name]):  # always tokens first, whatever batch_first says
                tokens = torch.arange(mask.numel(), device=x.device).view(mask.shape).t().flatten()
                rows = tokens if x.shape[0] == mask.numel() else None
            if rows is not None and x.shape[: rows.ndim] == rows.shape and not bool((rows < 0).any()):
                return x[mask.reshape(-1).to(x.device)[rows.to(x.device)]]
        one_per_text = x.ndim <= 2 and x.shape[0] == next(iter(self._padding.values())).shape[0]
        if x.ndim <= 2 and not one_per_text:
            self._blurred.add(name)
        return x

    def check(self) -> list[str]:
        """Texts of what is worth a warning; to be called after the last batch.

        Raises:
            ValueError: Where a layer ran and its inputs could not be seen, or are not finite.
        """
        told = []
        for name, moments in self.moments.items():
            if name in self._called and not any(moments.counts) and any(o.layer.name == name for o in self._operands):
                raise ValueError(
                    f"{name!r} ran, but what it is multiplied with could not be seen (a fused kernel, or a copy of the "
                    "weight); use an eager implementation, exclude it or use a score without inputs"
                )
            for sums in (moments.squares, moments.products):
                if sums is not None:
                    check_finite(sums, f"inputs of {name!r}")
            idle = [i for i, n in enumerate(moments.counts) if not n]
            if idle and moments.parts == 1:
                told.append(f"{name!r} saw no input; its norms are taken as 1, so that magnitude decides")
            elif idle:
                told.append(
                    f"{name!r}: {_listed(idle)} of {moments.parts} saw no input; norms are taken as 1 there, so that "
                    "magnitude decides"
                )
        if self._blurred:
            names = ", ".join(map(repr, sorted(self._blurred)[:8]))
            told.append(f"padding could not be told from tokens in the inputs of {names}; it counts there")
        return told

    def warn(self) -> list[str]:
        """:meth:`check`, with each text as a warning too."""
        told = self.check()
        for text in told:
            warnings.warn(text, stacklevel=3)
        return told

    # -- results, in the shapes of Stats

    def norm(self, name: str) -> Tensor:
        """L2 norms; 1 where nothing was seen."""
        return self._shaped(name, _per_part(self.moments[name], self.layers[name], "norm"))

    def mean(self, name: str) -> Tensor:
        """Means; 0 where nothing was seen."""
        return self._shaped(name, _per_part(self.moments[name], self.layers[name], "mean"))

    def hessian(self, name: str) -> Tensor:
        """``(2/n) Σ x xᵀ``, ``[in, in]`` or ``[parts, in, in]``; the identity where nothing was seen."""
        moments, layer = self.moments[name], self.layers[name]
        n = _columns(layer)
        products = moments.products
        if products is None:
            products = torch.zeros(moments.parts, n, n, dtype=moments.wide, device=layer.weight.device)
        result = torch.empty_like(products)
        for part, count in enumerate(moments.counts):
            if count:
                torch.mul(products[part], 2 / count, out=result[part])
            else:
                torch.eye(n, out=result[part])
        return result[0] if moments.parts == 1 else result

    def forget(self, name: str) -> None:
        """Free the sums of one layer."""
        self.moments[name] = Moments(self.moments[name].parts, False, False)

    def _shaped(self, name: str, each: Tensor) -> Tensor:
        """``[parts, in…]`` as ``[in…]``, or with one row per row of the weight."""
        if each.shape[0] == 1:
            return each[0]
        layer = self.layers[name]
        rows = layer.matrix(layer.weight).shape[0] // each.shape[0]
        return each.repeat_interleave(rows, dim=0)


def _in_attention(layer: Layer) -> bool:
    """Whether it is a projection of ``nn.MultiheadAttention``, whose output projection is never called."""
    return isinstance(layer.module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear))


def _is_called(layer: Layer) -> bool:
    """Whether the layer's own forward sees what the weight is multiplied with."""
    module = layer.module
    if _in_attention(layer):
        return False
    known = isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_conv1d_of_transformers(module)
    return layer.attribute == "weight" and known


def _columns(layer: Layer) -> int:
    shape = layer.matrix(layer.weight).shape
    return int(shape[1:].numel())


def _per_part(moments: Moments, layer: Layer, what: str) -> Tensor:
    shape = layer.matrix(layer.weight).shape[1:]
    source = moments.squares if what == "norm" else moments.sums
    if source is None:
        fill = 1.0 if what == "norm" else 0.0
        return torch.full((moments.parts, *shape), fill, dtype=moments.wide, device=layer.weight.device)
    counts = torch.tensor(
        moments.counts,
        dtype=torch.float64,
    ).view(-1, *[1] * len(shape))
    each = source.sqrt() if what == "norm" else source / counts.clamp(min=1)
    each = torch.where(counts > 0, each, 1.0 if what == "norm" else 0.0)
    return each.to(device=layer.weight.device, dtype=moments.wide)


def _listed(parts: list[int]) -> str:
    shown = ", ".join(map(str, parts[:16])) + (f" and {len(parts) - 16} more" if len(parts) > 16 else "")
    return f"expert{'s' if len(parts) > 1 else ''} {shown}"

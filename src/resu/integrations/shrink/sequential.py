"""What a smaller model does wrong, taken back layer by layer: each sees what the layers before it, fitted, give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resu.integrations.shrink.activity import evaluating
from resu.integrations.shrink.families import Site, sites_of
from resu.integrations.shrink.refit import put_weights
from resu.integrations.shrink.ridge import Sums
from resu.integrations.shrink.weights import weight_of

__all__ = ["check_batches", "fit_in_sequence"]

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean second moment
_JUDGES = 4  # one text in so many judges the penalty


def fit_in_sequence(
    model: Any,
    dense: Any,
    batches: Sequence[Batch],
    blocks: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> None:
    """Fit the layers that write to the residual stream, in place and in order, to the stream of the model as it was.

    For each such layer (what mixes the heads, what leads out of the feed-forward width), with ``ã`` its input in the
    smaller model, ``y`` its output in the model as it was, and ``x``, ``x̃`` the stream that the output is added to in
    both: ``W'`` minimises ``E‖(y + x − x̃) − W'ã‖² + λ‖W' − W‖²``, with a bias where the layer has one. So it makes up
    for what the layers before it changed, blocks that were taken out among them; targets are not those of the layer
    alone, as in ThiNet (Luo et al. 2017, arXiv 1707.06342, eq. 6), and inputs are those that the layer will have, as in
    layer-wise reconstruction since Channel Pruning (He et al. 2017, arXiv 1707.06168, sec. 3.2). Where a norm stands
    between the layer and the sum (Gemma 2) the target is ``y``. ``λ`` is the one whose fit on three of four texts errs
    least on the fourth ones; where every fit errs more than the weights that are there, these stay. Each layer takes a
    pass of both models up to that layer.

    Args:
        model: The smaller model, changed in place.
        dense: The model as it was.
        batches: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``; two texts in all at least.
        blocks: Which blocks of ``dense`` stayed; None: all.
        progress: Called with (done, total, what).

    Raises:
        ValueError: With fewer than two texts.
    """
    check_batches(batches)
    small, whole = sites_of(model), sites_of(dense)
    stay = range(len(small)) if blocks is None else blocks
    by_place = {(site.block, site.kind): site for site in whole}
    judges = _judges(batches)
    with torch.no_grad(), evaluating(model), evaluating(dense):
        for done, site in enumerate(small):
            pair = by_place[stay[site.block], site.kind]
            fitting, judging = Sums(), Sums()
            for batch, judge in zip(batches, judges, strict=True):
                inputs, wanted = _seen(model, site, dense, pair, batch)
                real = batch["attention_mask"].bool()
                for sums, rows in ((fitting, ~judge), (judging, judge)):
                    tokens = (real & rows[:, None].to(real.device)).to(inputs.device)
                    sums.add(inputs[tokens], wanted[tokens])
            found = _fitted(model.base_model.get_submodule(site.outer), fitting, judging)
            if found is not None:
                put_weights(model, {site.outer: found})
            if progress is not None:
                progress(done + 1, len(small), "fitting layer by layer")


def check_batches(batches: Sequence[Batch]) -> None:
    """Refuse fewer than two texts.

    Raises:
        ValueError: If there are fewer.
    """
    texts = sum(len(batch["input_ids"]) for batch in batches)
    if texts < 2:
        raise ValueError(f"a sequential update judges its fit on texts of their own: give two at least, got {texts}")


def _judges(batches: Sequence[Batch]) -> list[Tensor]:
    """Per batch which rows judge: every fourth of all, and the last, so that there is one."""
    sizes = [len(batch["input_ids"]) for batch in batches]
    judge = torch.arange(1, sum(sizes) + 1) % _JUDGES == 0
    judge[-1] = True
    return list(judge.split(sizes))


class _ReachedError(Exception):
    """Ends a pass at the layer that is looked at."""


def _seen(model: Any, site: Site, dense: Any, pair: Site, batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs of the layer in the smaller model, and what its outputs should be, ``[batch, tokens, …]`` each."""
    inputs, stream = _pass(model, site, batch, outputs=False)
    wanted, before = _pass(dense, pair, batch, outputs=True)
    if stream is not None and before is not None:
        wanted = wanted + (before - stream)
    return inputs, wanted


def _pass(model: Any, site: Site, batch: Batch, *, outputs: bool) -> tuple[Tensor, Tensor | None]:
    """The input of a site's outer layer, or its output; and the stream beside it."""
    found: dict[str, Tensor] = {}

    def stream(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["stream"] = (args[0] if args else kwargs["hidden_states"]).float()

    def inputs(module: nn.Module, args: tuple[Any, ...]) -> None:
        found["layer"] = args[0].float()
        raise _ReachedError

    def output(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found["layer"] = out.float()
        raise _ReachedError

    base = model.base_model
    outer = base.get_submodule(site.outer)
    hooks = [outer.register_forward_hook(output) if outputs else outer.register_forward_pre_hook(inputs)]
    if site.stream is not None:
        hooks.append(base.get_submodule(site.stream).register_forward_pre_hook(stream, with_kwargs=True))
    device = next(model.parameters()).device
    try:
        base(**{key: value.to(device) for key, value in batch.items()})
    except _ReachedError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found["layer"], found.get("stream")


def _fitted(layer: nn.Module, fitting: Sums, judging: Sums) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of least error; None: those that are there."""
    weight, bias = weight_of(layer).double(), getattr(layer, "bias", None)
    centred = bias is not None
    now = weight.new_zeros(len(weight)) if bias is None else bias.double()
    errors = {p: judging.error(*fitting.fit(weight, p, centred)) for p in _PENALTIES}
    best = min(errors, key=lambda p: errors[p])
    if not errors[best] < judging.error(weight, now):
        return None
    fitted, offset = (fitting + judging).fit(weight, best, centred)
    return fitted, offset if centred else None

"""What a smaller model does wrong, taken back layer by layer: each sees what the layers before it, fitted, give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import every_weight, is_conv1d_of_transformers
from resu.integrations.shrink.activity import run_batches
from resu.integrations.shrink.families import Site, blocks_of, family_of, sites_of
from resu.integrations.shrink.refit import Fitted
from resu.integrations.shrink.removal import handing_on
from resu.integrations.shrink.ridge import Sums
from resu.integrations.shrink.weights import weight_of
from resu.pruning.importance.base import wide
from resu.pruning.layerwise import Activations, Walk

__all__ = ["check_batches", "sequential_weights"]

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean second moment
_JUDGES = 4  # one text in so many judges the penalty
_FAINT = 0.1  # of a norm's mean squared gain: channels of less do not have to make up for all that they miss


def sequential_weights(
    model: Any,
    units: Mapping[str, Tensor],
    batches: Sequence[Batch],
    blocks: Sequence[int] | None = None,
    start: Mapping[str, Fitted] | None = None,
    progress: Progress | None = None,
) -> dict[str, Fitted]:
    """Weights and biases for the layers that write to the residual stream, to be put there after the removal.

    They are fitted in order, to the stream of the model as it is. For each such layer (what mixes the heads, what leads
    out of the feed-forward width), with ``ã`` its input in the smaller model, ``y`` its output in the model as it is,
    and ``x``, ``x̃`` the stream that the output is added to in both: ``W'`` minimises
    ``E‖(y + x − x̃) − W'ã‖² + λ‖W' − W‖²``, with a bias where the layer has one. So it makes up for what the layers
    before it changed, blocks that go among them; targets are not those of the layer alone, as in ThiNet (Luo et al.
    2017, arXiv 1707.06342, eq. 6), and inputs are those that the layer will have, as in layer-wise reconstruction since
    Channel Pruning (He et al. 2017, arXiv 1707.06168, sec. 3.2). ``λ`` is the one whose fit on three of four texts errs
    least on the fourth ones; where every fit errs more than the weights that are there, these stay.

    Behind the last block that stays, ``x`` is taken to hold all that blocks behind it add, if they go; not where a norm
    follows the last sum of a block (BERT and its kin), as there it would not be a sum. Where a norm of gain ``g``
    stands between a layer and the sum (Gemma 2), ``x − x̃`` is multiplied by ``r g / (g² + E[g²] / 10)``, with ``r`` the
    root mean square of ``y``: by the norm's slope at ``y``, but for the tenth, which keeps channels of little gain
    from growing without bound.

    The smaller model is this one with layers that read only the units that stay, so that there is no second one. All
    batches run through both models block by block, about four times through each block. Held meanwhile, in main memory,
    are both streams: of each ``tokens · hidden`` numbers of the model's dtype, padding included, and twice that where a
    block hands them on; beside them masks and positions, as a block is given them; of one layer about five times
    ``in · (in + out)`` float64 numbers; and what was fitted, in the model's dtype.

    Args:
        model: Before the removal; it stays as it is.
        units: Kept units by site; sites not named keep all.
        batches: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``; two texts in all at least.
        blocks: Which blocks stay, ascending; None: all.
        start: Weights to begin with, as :func:`resu.integrations.shrink.refit.fitted_weights` gives them; where there
            are none, the columns that stay.
        progress: Called with (done, total, what).

    Returns:
        ``{name of the layer: (weight [out, kept columns], bias [out] or None)}`` in the layer's dtype, of all such
        layers of blocks that stay.

    Raises:
        ValueError: With fewer than two texts.
    """
    check_batches(batches)
    base, depth = model.base_model, len(blocks_of(model))
    stay = range(depth) if blocks is None else blocks
    sites = [site for site in sites_of(model) if site.block in stay]
    names = {f"{site.outer}.weight" for site in sites}
    layers = {name: layer for name, layer in every_weight(base).items() if name in names}
    judges, found = _judges(batches), dict[str, Fitted]()
    # Behind the last block that stays no layer comes that could make up for the ones that go.
    ends = _ends(model, batches) if family_of(model).sums and max(stay) < depth - 1 else None
    before: Activations = [{} for _ in batches]
    now: Activations = [{} for _ in batches]
    with Walk(base, layers, batches, blocks=f"{family_of(model).blocks}.*") as walk:
        for unit in walk.units:
            here = [_Narrow(base, site, units, start or {}) for site in sites if site.block == unit.index]
            weights = {name: x for layer in here for name, x in layer.parameters(unit.name).items()}
            with walk.at(unit, before) as whole, walk.at(unit, now) as small:
                for layer in here:
                    fitting, judging = Sums(), Sums()
                    for i, (batch, judge) in enumerate(zip(batches, judges, strict=True)):
                        dense, output = _seen(base, layer.site, partial(whole.run, i))
                        if output is not None:
                            whole.keep(i, output)
                        if ends is not None and layer.site is sites[-1]:
                            dense["stream"] = ends[i].to(dense["stream"]) - dense["written"]
                        ours, _ = _seen(base, layer.site, partial(small.run, i, weights))
                        inputs, wanted = layer.regression(dense, ours)
                        real = batch["attention_mask"].bool()
                        for sums, rows in ((fitting, ~judge), (judging, judge)):
                            tokens = (real & rows[:, None].to(real.device)).to(inputs.device)
                            sums.add(inputs[tokens], wanted[tokens])
                    layer.fit(fitting, judging)
                    found[layer.site.outer] = layer.kept
                    if progress is not None:
                        progress(len(found), len(sites), "fitting layer by layer")
                with nullcontext() if here else handing_on(small.block):
                    for i in range(len(batches)):
                        small.keep(i, small.run(i, weights))
    return found


def _ends(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """What the last block gives, for each batch, in main memory."""
    found: list[Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(lambda module, args, output: found.append(output.cpu()))
    try:
        with torch.no_grad():
            run_batches(model, batches, lambda batch: None)
    finally:
        hook.remove()
    return found


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


class _Narrow:
    """A layer that reads only the columns that stay: its parameters, with zeros in the others."""

    def __init__(self, base: nn.Module, site: Site, units: Mapping[str, Tensor], start: Mapping[str, Fitted]) -> None:
        self.site, layer = site, base.get_submodule(site.outer)
        weight, bias = weight_of(layer), getattr(layer, "bias", None)
        stay = units.get(site.name, torch.arange(site.count))
        self.columns = site.columns.of(stay).to(weight.device)
        self._weight = torch.zeros_like(layer.get_parameter("weight"), requires_grad=False)
        self._bias = None if bias is None else bias.detach().clone()
        self._turned = is_conv1d_of_transformers(layer)
        self._through: tuple[Tensor, Tensor] | None = None
        if site.norm is not None:
            gain = base.get_submodule(site.norm)(torch.ones_like(weight[:, 0]))
            self._through = gain, gain / (gain.square() + _FAINT * gain.square().mean())
        self._put(start.get(site.outer, (weight[:, self.columns], self._bias)))

    def _put(self, fitted: Fitted) -> None:
        weight, bias = fitted
        lying = self._weight.T if self._turned else self._weight
        lying[:, self.columns] = weight.to(lying.dtype)
        if self._bias is not None and bias is not None:
            self._bias.copy_(bias)

    @property
    def kept(self) -> Fitted:
        """The columns that stay, and the bias."""
        return (self._weight.T if self._turned else self._weight)[:, self.columns], self._bias

    def parameters(self, block: str) -> dict[str, Tensor]:
        """By their names in the block; they change with the fit."""
        name = self.site.outer.removeprefix(f"{block}.")
        return {f"{name}.weight": self._weight} | ({} if self._bias is None else {f"{name}.bias": self._bias})

    def regression(self, dense: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is read, and what should be given, ``[batch, tokens, …]`` each, by what was seen of both models."""
        missing = dense["stream"] - ours["stream"]
        if self._through is not None:
            gain, through = self._through
            plain = gain * dense["output"]  # what the norm makes of it, but for the scale of each token
            scale = plain.square().sum(-1) / (plain * dense["written"]).sum(-1).clamp(min=1e-30)
            missing = scale[..., None] * through * missing
        return ours["input"].index_select(-1, self.columns), dense["output"] + missing

    def fit(self, fitting: Sums, judging: Sums) -> None:
        """Take the weights of least error, which may be those that are there."""
        weight, bias = (None if x is None else x.double() for x in self.kept)
        assert weight is not None
        centred, now = bias is not None, weight.new_zeros(len(weight)) if bias is None else bias
        errors = [judging.error(*one) for one in fitting.fits(weight, _PENALTIES, centred)]
        if min(errors) < judging.error(weight, now):
            penalty = _PENALTIES[errors.index(min(errors))]
            self._put((fitting + judging).fit(weight, penalty, centred))


class _ReachedError(Exception):
    """Ends a run of a block behind the layer that is looked at."""


def _seen(base: nn.Module, site: Site, run: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """The stream, a site's layer's input and output, and what is added to the stream, while a block runs; and what the
    block gives.

    Behind the heads a block has most of its work still before it, so it ends there, and gives None.
    """
    found: dict[str, Tensor] = {}

    def stream(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["stream"] = wide(args[0] if args else kwargs["hidden_states"])

    def layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found["input"], found["output"] = wide(args[0]), wide(output)

    def written(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found["written"] = wide(output)

    def end(*args: Any) -> None:
        raise _ReachedError

    writer = base.get_submodule(site.norm or site.outer)
    hooks = [
        base.get_submodule(site.stream).register_forward_pre_hook(stream, with_kwargs=True),
        base.get_submodule(site.outer).register_forward_hook(layer),
        writer.register_forward_hook(written),
    ]
    if site.kind == "heads":
        hooks.append(writer.register_forward_hook(end))
    try:
        return found, run()
    except _ReachedError:
        return found, None
    finally:
        for hook in hooks:
            hook.remove()

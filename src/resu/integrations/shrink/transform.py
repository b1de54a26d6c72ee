"""A transformer made smaller in place: what goes is chosen, removed, verified, and what stays is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from resu.integrations.shrink.activity import block_influences
from resu.integrations.shrink.families import blocks_of, sites_of
from resu.integrations.shrink.plan import Fractions, choose_blocks, choose_units, kept_counts
from resu.integrations.shrink.refit import fitted_weights, put_weights
from resu.integrations.shrink.removal import remove
from resu.integrations.shrink.scores import Calibration, score_units
from resu.integrations.shrink.sequential import check_batches, sequential_weights

__all__ = ["UPDATES", "Shrunk", "check_update", "shrink_transformer"]

Progress = Callable[[int, int, str], None]
#: How the weights that stay may be adjusted.
UPDATES = ("least-squares", "sequential")


@dataclass(frozen=True)
class Shrunk:
    """What was done.

    Attributes:
        units: Units that stayed, int64 ascending, by the site's name before the removal; only of blocks that stayed.
        blocks: Blocks that stayed; None: all.
        verified: Largest difference from the masked model (before any update), relative, in float64.
    """

    units: dict[str, Tensor]
    blocks: list[int] | None
    verified: float


def check_update(update: str | None, batches: object) -> None:
    """Refuse an update that is not known, or without data.

    Raises:
        ValueError: If it is.
    """
    if update is not None and update not in UPDATES:
        raise ValueError(f"unknown update {update!r}; known: {', '.join(UPDATES)}")
    if update is not None and not batches:
        raise ValueError(f"{update!r} looks at data: give a calibration text")


def shrink_transformer(
    model: Any,
    heads: float | Fraction = 0.0,
    ffn: float | Fraction = 0.0,
    depth: int = 0,
    *,
    method: str = "l2",
    batches: Iterable[Mapping[str, Tensor]] = (),
    update: str | None = None,
    round_to: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shrunk:
    """Remove attention heads, feed-forward neurons and blocks of a model of transformers, physically and in place.

    The same number of heads and neurons goes from every block. The result is compared with the masked model in float64
    before any update; if it differs, everything is put back. ``model.save_pretrained`` writes what ``from_pretrained``
    or, where the architecture has no place for the sizes,
    :func:`resu.integrations.shrink.loading.load_shrunk_transformer` loads.
    Make an optimizer afterwards: one that was made before holds parameters that are no longer in the model.

    Args:
        model: A ``PreTrainedModel`` of a known family (:data:`resu.integrations.shrink.families.FAMILIES`).
        heads: Fraction of the heads removed; with grouped queries of the key/value heads, each with its query heads.
        ffn: Fraction of the feed-forward width removed.
        depth: How many blocks are removed, those of least influence (needs batches).
        method: A name in :data:`resu.integrations.shrink.scores.unit_scores`.
        batches: Mappings with ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``; kept in memory.
        update: None; or ``"least-squares"``: fit the layers that read what is left
            (:func:`resu.integrations.shrink.refit.fitted_weights`; needs batches); or ``"sequential"``: after that all
            layers that write to the residual stream, one after another, to what the stream was
            (:func:`resu.integrations.shrink.sequential.sequential_weights`; needs two texts at least, and holds what
            passes between two blocks meanwhile).
        round_to: The width that stays is a multiple of it, or whole.
        seed: Of random numbers.
        progress: Called with (done, total, what).

    Raises:
        RemovalError: If the smaller model is not the masked one; it was undone.
        ValueError: On impossible settings or an architecture that is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
        ...                      num_attention_heads=8, num_key_value_heads=4)
        >>> model = LlamaForCausalLM(config)
        >>> shrunk = shrink_transformer(model, heads=0.5, ffn=0.5)
        >>> model.config.num_attention_heads, model.config.num_key_value_heads, model.config.intermediate_size
        (4, 2, 88)
        >>> model.model.layers[0].mlp.down_proj
        Linear(in_features=88, out_features=64, bias=False)
    """
    fractions = Fractions(heads, ffn, depth, round_to)
    batches = _checked(batches)
    check_update(update, batches)
    influences = block_influences(model, batches, progress) if depth and batches else None
    blocks = choose_blocks(model, influences, depth)
    return shrink_to(model, kept_counts(sites_of(model), fractions), blocks, method, batches, update, seed, progress)


def _checked(batches: Iterable[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """Batches as a list: they are gone through several times."""
    found = list(batches)
    for batch in found:
        given = dict(batch) if isinstance(batch, Mapping) else {}
        if not all(getattr(given.get(key), "ndim", 0) == 2 for key in ("input_ids", "attention_mask")):
            raise ValueError(
                "batches must be mappings with tensors input_ids and attention_mask, [batch, tokens] each; got "
                f"{'one with ' + ', '.join(map(str, given)) if given else type(batch).__name__}"
            )
    return found


def shrink_to(
    model: Any,
    counts: Mapping[str, int],
    blocks: list[int] | None,
    method: str,
    batches: Sequence[Mapping[str, Tensor]] = (),
    update: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shrunk:
    """:func:`shrink_transformer` with the number of units of each site, and the blocks that stay."""
    if update == "sequential":
        check_batches(batches)
    sites = sites_of(model)
    stay = range(len(blocks_of(model))) if blocks is None else blocks
    place = {block: index for index, block in enumerate(stay)}  # blocks move up where others go
    scores = score_units(model, method, Calibration(batches, seed, progress))
    units = choose_units(scores, {site.name: counts[site.name] for site in sites if site.block in place})
    fitted = {} if update is None else fitted_weights(model, units, batches, progress)
    if update == "sequential":
        fitted = sequential_weights(model, units, batches, blocks, fitted, progress)
    moved = {site.outer: _moved(site.outer, site.block, place.get(site.block, site.block)) for site in sites}
    verified = remove(model, units, blocks)
    put_weights(model, {moved[name]: value for name, value in fitted.items()})
    return Shrunk(units, blocks, verified)


def _moved(name: str, block: int, place: int) -> str:
    """The name of a layer of a block that has another place now.

    Example:
        >>> _moved("encoder.layer.3.output.dense", 3, 2)
        'encoder.layer.2.output.dense'
    """
    return name.replace(f".{block}.", f".{place}.", 1)

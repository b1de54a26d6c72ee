"""A Hugging Face directory made smaller from one folder into another: what ``resu shrink`` does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resu.integrations.folders import check_apart, check_free
from resu.integrations.hf import check_directory, load_model
from resu.integrations.hf_prune import model_batches
from resu.integrations.hf_text import default_length, read_texts
from resu.integrations.shrink.activity import block_influences
from resu.integrations.shrink.exactness import classifies, longest_input
from resu.integrations.shrink.families import family_named
from resu.integrations.shrink.measure import Costs, measured_latency, sample_inputs, smaller_copy
from resu.integrations.shrink.plan import choose_blocks, kept_counts, without_effect
from resu.integrations.shrink.quality import BatchJudge, FileJudge
from resu.integrations.shrink.saving import save_shrunk
from resu.integrations.shrink.scores import Calibration, score_units
from resu.integrations.shrink.sensitivity import sensitivity
from resu.integrations.shrink.settings import ShrinkConfig
from resu.integrations.shrink.sizes import KEY, sizes_of
from resu.integrations.shrink.targets import Target, solve_target
from resu.integrations.shrink.transform import shrink_to
from resu.pruning.structured.sizes import Latency

__all__ = ["sensitivity_of_directory", "shrink_directory"]

Progress = Callable[[int, int, str], None]
_ROUNDS = 25
_WITHIN = 0.05  # of a latency that was asked for; further off is worth a word
_TOKENS = 128  # of the inputs that a model is counted and timed on


def shrink_directory(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: ShrinkConfig,
    *,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a model directory smaller: heads, feed-forward width and whole blocks are removed for real.

    Args:
        source: A Hugging Face directory of a known family (:data:`resu.integrations.shrink.families.FAMILIES`).
        out: The folder to write; the one above it must exist.
        config: How.
        overwrite: Whether an earlier result in ``out`` may be replaced.
        device: Where to look at data and to measure; None: the CPU.
        progress: Called with (done, total, what).

    Returns:
        The report, also written as ``pruning.json``: ``method``, ``sizes``, ``blocks``, ``parameters``, ``macs`` and
        ``latency`` before and after, ``verified`` (the largest difference from the masked model, in float64),
        ``evaluation`` where there is a text, ``loads_with``, ``units`` kept.

    Raises:
        FileNotFoundError: If the source or a text is missing.
        FileExistsError: If ``out`` holds something that may not be replaced.
        ValueError: On impossible settings, an architecture that is not known, or a target out of reach.
    """
    began = time.perf_counter()
    if config.target is None and not (config.heads or config.ffn or config.depth):
        raise ValueError("say what to remove: a fraction of heads or ffn, a depth, or a target")
    check_apart(out, source, config.data, config.evaluate)
    check_free(out, overwrite=overwrite)
    for text in (config.data, config.evaluate):
        if text is not None:
            read_texts(text)  # that it can be read is better known before a large model is
    model, tokenizer = _load(source, config, device)
    stated, sizes = model.config.to_dict(), sizes_of(model)
    inputs = _inputs(model, config)
    costs = Costs.of(model, inputs)
    batches = _batches(model, tokenizer, config)
    text = config.evaluate or config.data
    judge = None if text is None else FileJudge(model, tokenizer, text, progress)
    influences = block_influences(model, batches, progress) if config.depth else None
    blocks = choose_blocks(model, influences, config.depth)
    fractions = config.fractions
    if config.target is not None:
        tell = None if progress is None else (lambda what: progress(0, 1, what))
        fractions = solve_target(model, costs, inputs, config.target, fractions, config.free, blocks, tell)
    counts, idle = kept_counts(costs.sites, fractions), without_effect(costs.sites, config.fractions)
    if blocks is None and costs.after(counts) == (costs.parameters, costs.macs):
        raise ValueError(f"nothing would be removed: {'; '.join(idle)}; ask for more")
    quality = None if judge is None else (1.0 if judge.metric == "cosine" else judge(model))
    # Which units go makes no difference to the time, and now there is still the model as it was to compare with.
    latency = measured_latency([model, smaller_copy(model, counts, blocks)], inputs, _ROUNDS)
    shrunk = shrink_to(model, counts, blocks, config.score, batches, config.update, config.seed, progress)
    after = Costs.of(model, inputs)
    target = None if config.target is None else _reached(config.target, costs, after, latency)
    report: dict[str, Any] = {
        "source": str(source),
        "method": config.score,
        "update": config.update,
        "sizes": {"before": sizes, "after": sizes_of(model)},
        "blocks": list(range(len(sizes["ffn"]))) if blocks is None else blocks,
        "parameters": {"before": costs.parameters, "after": after.parameters},
        "macs": {"before": costs.macs, "after": after.macs},
        "latency": {"before": latency.seconds[0], "after": latency.seconds[1], "ratio": latency.ratios[1]},
        "inputs": list(inputs["input_ids"].shape),
        "verified": shrunk.verified,
        "loads_with": "resu.load_shrunk_transformer" if hasattr(model.config, KEY) else "from_pretrained",
        "target": target,
        "round_to": config.round_to,
        "seed": config.seed,
        "units": {name: kept.tolist() for name, kept in shrunk.units.items()},
        "warnings": [*(f"{line}; all stay" for line in idle), *_missed(target)],
    }
    if judge is not None:
        report["evaluation"] = {
            "file": str(text),
            "metric": judge.metric,
            "before": quality,
            "after": judge(model),
        }
    report["seconds"] = time.perf_counter() - began
    model.to("cpu")
    return save_shrunk(model, source, out, report, stated, overwrite=overwrite)


def sensitivity_of_directory(
    source: str | os.PathLike[str],
    config: ShrinkConfig,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What each part of a model costs when some of it is taken away; nothing is written.

    Args:
        source: A Hugging Face directory of a known family.
        config: Which score, and the text to look at.
        device: Where to look at data; None: the CPU.
        progress: Called with (done, total, what).

    Returns:
        ``metric``, its value for the model as it is under ``dense``, ``rows`` of
        :func:`resu.integrations.shrink.sensitivity.sensitivity` and ``method``.

    Raises:
        ValueError: Without a text, or as :func:`shrink_directory`.
    """
    if config.data is None:
        raise ValueError("what parts of a model cost is measured on data: give a calibration text")
    model, tokenizer = _load(source, config, device)
    batches = _batches(model, tokenizer, config)
    scores = score_units(model, config.score, Calibration(batches, config.seed, progress))
    judge = BatchJudge(model, batches)
    dense = judge(model)
    rows = sensitivity(model, scores, judge, progress=progress)
    return {"source": str(source), "method": config.score, "metric": judge.metric, "dense": dense, "rows": rows}


def _load(source: str | os.PathLike[str], config: ShrinkConfig, device: torch.device | str | None) -> tuple[Any, Any]:
    family_named(check_directory(source).get("model_type"))  # better known before large weights are read
    model: Any
    model, tokenizer = load_model(source, device=device)
    if (config.data or config.evaluate) and classifies(model) and model.config.pad_token_id is None:
        raise ValueError(
            f"{source} classifies texts and its config.json does not say which token pads them (pad_token_id), so they "
            f"cannot be read in batches; add it (its tokenizer has {getattr(tokenizer, 'pad_token_id', None)})"
        )
    return model, tokenizer


def _inputs(model: Any, config: ShrinkConfig) -> dict[str, Tensor]:
    tokens = config.tokens or min(_TOKENS, longest_input(model) or _TOKENS)
    return sample_inputs(model, config.batch, tokens)


def _batches(model: Any, tokenizer: Any, config: ShrinkConfig) -> list[dict[str, Tensor]]:
    if config.data is None:
        return []
    longest, length = longest_input(model), config.length
    if longest is not None:
        if length is not None and length > longest:
            raise ValueError(
                f"a length of {length} tokens is more than the {longest} that {type(model).__name__} was made for"
            )
        length = length or min(longest, default_length(tokenizer, model))
    return model_batches(model, tokenizer, config.data, config.samples, length, config.seed, most=32)


def _reached(target: Target, before: Costs, after: Costs, latency: Latency) -> dict[str, Any]:
    ratio = {
        "params": after.parameters / before.parameters,
        "macs": after.macs / before.macs,
        "latency": latency.ratios[1],
    }[target.metric]
    return {"metric": target.metric, "wanted": target.value, "reached": ratio}


def _missed(target: dict[str, Any] | None) -> list[str]:
    if target is None or target["metric"] != "latency" or abs(target["reached"] / target["wanted"] - 1) <= _WITHIN:
        return []
    return [
        f"the latency is {target['reached']:.3f}x where {target['wanted']:g}x was asked for: the times of this machine "
        "vary, or no step of the width lies closer; run it again when nothing else runs, or with a smaller round_to"
    ]

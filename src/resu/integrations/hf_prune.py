"""A Hugging Face directory pruned from one folder into another: what ``resu prune`` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.pattern import NM, Pattern, Unstructured, get_pattern
from resu.core.shards import Shards
from resu.integrations.carried import brought_masks
from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.folders import check_apart, check_free
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import Perplexity, embedding_cosine, perplexity, sentence_embeddings
from resu.integrations.hf_save import LAYOUTS, save_pruned
from resu.integrations.hf_text import calibration_batches, default_length, read_texts
from resu.pruning.allocation import allocations
from resu.pruning.decisions import Recipe
from resu.pruning.importance import importances
from resu.pruning.one_shot import prune_model

__all__ = ["causal_loss", "model_batches", "prune_directory", "settle_sparsity"]

Progress = Callable[[int, int, str], None]
_TOKENS_PER_BATCH = 4096


def settle_sparsity(
    sparsity: float | Mapping[str, float] | None, pattern: Pattern | str | None
) -> float | Mapping[str, float]:
    """The sparsity that is meant: that of an N:M pattern where none is given.

    Raises:
        ValueError: If there is neither, or an N:M pattern has another sparsity than the one given.

    Example:
        >>> settle_sparsity(None, "2:4"), settle_sparsity(0.3, None)
        (0.5, 0.3)
    """
    shape = get_pattern(pattern)
    if isinstance(shape, NM):
        if sparsity is None:
            return shape.sparsity
        levels = sparsity.values() if isinstance(sparsity, Mapping) else (sparsity,)
        for level in levels:
            shape.keep_for((1, shape.m), level)  # raises where it is not the pattern's own
    if sparsity is None:
        raise ValueError("give a sparsity in [0, 1), the fraction of the weights to remove, or an N:M pattern")
    return sparsity


def causal_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the next token over a batch; padding does not count."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    assert isinstance(loss, Tensor)
    return loss


def prune_directory(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sparsity: float | Mapping[str, float] | None = None,
    method: str = "magnitude",
    *,
    pattern: Pattern | str | None = None,
    distribution: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    samples: int = 128,
    length: int | None = None,
    refine: str | None = None,
    update: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    evaluate: str | os.PathLike[str] | None = None,
    layout: str = "dense",
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune a model directory into a new one that ``from_pretrained`` loads.

    Methods without data (magnitude, random, lamp) never build the model: tensors are streamed from the source to the
    output (:func:`resu.integrations.checkpoint.prune_checkpoint`), whatever the architecture and the size. Methods with
    data load it and prune it block by block (:func:`resu.pruning.one_shot.prune_model`). Embeddings, norms and the
    output head stay dense unless ``include`` names them.

    Args:
        source: A Hugging Face directory; without data also any folder of safetensors, or one such file.
        out: The folder to write; the one above it must exist.
        sparsity: In [0, 1), or ``{glob: sparsity}``; None: that of the N:M pattern.
        method: A registered score, or ``"sparsegpt"`` (mask and weights by the solver).
        pattern: As in :func:`resu.core.pattern.get_pattern`.
        distribution: How the budget is divided over the layers; None: every layer alike.
        calibration: Text file (:func:`resu.integrations.hf_text.read_texts`); needed by methods with data.
        samples: Calibration samples.
        length: Tokens per sample; None: what the model was made for, at most 2048. The evaluation's windows have that
            length in any case.
        refine: None or ``"dsnot"``.
        update: None or ``"sparsegpt"``: adjust the weights that are kept.
        include: Globs of what to prune.
        exclude: Globs of what to leave dense.
        evaluate: Text file: perplexity of a causal language model, or mean cosine similarity of an encoder's
            sentence embeddings (one text per line), before and after.
        layout: ``"dense"`` or ``"bitmask"``.
        workers: Threads, for methods without data.
        resume: Go on with a run that was interrupted, or begin one. Methods without data can always be gone on with;
            with data, what is done is only kept for it where ``resume`` was given from the start (beside ``out``; as
            large as the activations of the calibration text at one place of the model).
        overwrite: Whether an earlier result in ``out`` may be replaced.
        dtype: Of the written weights, for methods with data; None: as stored.
        device: Where blocks are pruned and the model is evaluated; None: the CPU.
        seed: Of the calibration samples and of random scores.
        progress: Called with (done, total, what).

    Returns:
        The report: see :class:`resu.pruning.one_shot.PruneResult`; with ``source``, ``bytes``, and ``evaluation`` where
        it was asked for.

    Raises:
        FileNotFoundError: If the source or a text file is missing.
        FileExistsError: If ``out`` holds something that may not be replaced.
        ValueError: On impossible settings, pickles, or a text that is too short.
    """
    sparsity = settle_sparsity(sparsity, pattern)
    scope = importances[method].scope
    recipe = Recipe(method, Unstructured(scope) if pattern is None else get_pattern(pattern), refine, update, seed)
    if distribution is not None:
        allocations[distribution]
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; known: {', '.join(LAYOUTS)}")
    check_apart(out, source, calibration, evaluate)
    check_free(out, overwrite=overwrite or resume)
    quality = None if evaluate is None else _Quality(Path(evaluate), device, progress)
    common: dict[str, Any] = {
        "pattern": pattern,
        "distribution": distribution,
        "include": include,
        "exclude": exclude,
        "seed": seed,
        "progress": progress,
    }
    if not recipe.needs:
        for name, given in (("calibration text", calibration), ("dtype", dtype)):
            if given is not None:
                raise ValueError(f"{method!r} looks at no data and takes no {name}; leave it out")
        if quality is not None and layout != "dense":
            raise ValueError("to evaluate, transformers has to load the result: use the dense layout, then convert it")
        before = quality and quality.of_directory(source)
        report = prune_checkpoint(
            source, out, sparsity, method, layout=layout, workers=workers, resume=resume, overwrite=overwrite, **common
        )
        after = quality and quality.of_directory(out)
        written = Shards.open(out)
        report |= {"source": str(source), "bytes": sum(written.nbytes(name) for name in written.names)}
    else:
        if calibration is None:
            what = method if importances[method].needs else refine or update
            raise ValueError(f"{what!r} looks at data: give a calibration text, a .txt or .jsonl file")
        if workers != 1:
            raise ValueError(f"workers are for methods without data, not for {method!r}; leave them out")
        brought_masks(source)
        read_texts(calibration)  # that it can be read is better known before a large model is
        model, tokenizer = load_model(source, dtype)
        grads = "grads" in recipe.needs
        most = 1 if grads else 32  # singly: the mean of squares is meant over samples, not over means of samples
        batches = model_batches(model, tokenizer, calibration, samples, length, seed, most=most)
        notes = Path(os.path.realpath(out))
        notes = notes.with_name(f".{notes.name}.calibrating")
        before = quality and quality.of_model(model, tokenizer)
        with _without_cache(model):
            result = prune_model(
                model,
                sparsity,
                method,
                calibration=batches,
                loss_fn=_loss_of(model) if grads else None,
                refine=refine,
                update=update,
                device=device,
                checkpoint=notes if resume else None,
                **common,
            )
        after = quality and quality.of_model(model, tokenizer)
        report = save_pruned(model, tokenizer, result, source, out, dtype=dtype, layout=layout, overwrite=overwrite)
        if resume:
            shutil.rmtree(notes, ignore_errors=True)
    return report if quality is None else {**report, "evaluation": quality.compare(before, after)}


def _loss_of(model: Any) -> Callable[[nn.Module, Any], Tensor]:
    if not model.can_generate():
        raise ValueError(
            f"scores from gradients need a loss, and {type(model).__name__} has none for plain text; use a score of "
            "the inputs (wanda, ria, sparsegpt), or call resu.pruning.prune_model with a loss_fn of your own"
        )
    return causal_loss


def _refuse_pairs(model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which reads pairs of texts; call resu.pruning.prune_model "
            "with batches of your own, or use a method without data and without an evaluation"
        )


def model_batches(
    model: Any,
    tokenizer: Any,
    file: str | os.PathLike[str],
    samples: int,
    length: int | None,
    seed: int,
    *,
    most: int,
) -> list[dict[str, Tensor]]:
    """Calibration batches as a model of Hugging Face takes them: pieces of text for a decoder, lines for an encoder.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None where it has none.
        file: A text (:func:`resu.integrations.hf_text.read_texts`).
        samples: How many.
        length: Tokens per sample; None: what the model was made for, at most 2048.
        seed: Of the draw.
        most: Samples per batch, fewer where they are long.

    Raises:
        ValueError: Without a tokenizer, for an encoder-decoder, on a length that is too large or a text too short.
    """
    if tokenizer is None:
        raise ValueError("the directory has no tokenizer, so no calibration text can be read; copy its files there")
    _refuse_pairs(model)
    longest = default_length(tokenizer, model)
    limit = getattr(model.config, "max_position_embeddings", None)
    if length is not None and isinstance(limit, int) and length > limit:
        raise ValueError(
            f"a length of {length} tokens is more than the {limit} that {type(model).__name__} was made for"
        )
    length = longest if length is None else length
    size = max(1, min(most, _TOKENS_PER_BATCH // length))
    return calibration_batches(tokenizer, file, samples, length, seed, lines=not model.can_generate(), batch_size=size)


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Without the keys and values that decoders keep for generation: nothing reads them here."""
    before = getattr(model.config, "use_cache", None)
    try:
        if before is not None:
            model.config.use_cache = False
        yield
    finally:
        if before is not None:
            model.config.use_cache = before


@dataclass(frozen=True)
class _Quality:
    """How good a model is on a text: perplexity for what generates, else the embeddings of its lines."""

    file: Path
    device: torch.device | str | None
    progress: Progress | None

    def __post_init__(self) -> None:
        read_texts(self.file)

    def of_directory(self, directory: str | os.PathLike[str]) -> Perplexity | Tensor:
        return self.of_model(*load_model(directory))

    def of_model(self, model: Any, tokenizer: Any) -> Perplexity | Tensor:
        if tokenizer is None:
            raise ValueError("the directory has no tokenizer, so no text can be evaluated; leave that out")
        _refuse_pairs(model)
        if self.device is not None:
            model.to(self.device)
        try:
            if model.can_generate():
                return perplexity(model, tokenizer, self.file, progress=self.progress)
            length = min(256, default_length(tokenizer, model))
            return sentence_embeddings(model, tokenizer, read_texts(self.file, lines=True), length=length)
        finally:
            if self.device is not None:
                model.to("cpu")

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"file": str(self.file)}
        if isinstance(before, Perplexity) and isinstance(after, Perplexity):
            return found | {
                "metric": "perplexity",
                "before": before.perplexity,
                "after": after.perplexity,
                "tokens": before.tokens,
            }
        cosine = embedding_cosine(before, after)
        return found | {"metric": "cosine", "before": 1.0, "after": cosine, "sentences": len(before)}

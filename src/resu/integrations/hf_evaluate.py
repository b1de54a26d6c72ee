"""How good a Hugging Face model still is: perplexity, and sentence embeddings before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.integrations.hf_text import cut_text, default_length, padded_batch, read_texts, token_ids

__all__ = ["Perplexity", "embedding_cosine", "perplexity", "sentence_embeddings"]


@dataclass(frozen=True)
class Perplexity:
    """How well a language model predicts a text.

    Attributes:
        nll: Mean negative log-likelihood per token, in nats.
        tokens: How many tokens were predicted.
    """

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinity where that is beyond a float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def _windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """``(start, stop, first token that is scored)``: every token but the first of a window without overlap, once."""
    done = 0
    for start in range(0, max(count - 1, 1), stride):
        stop = min(start + length, count)
        first = max(done, start + 1)
        if first < stop:
            yield start, stop, first
        done = stop
        if stop == count:
            return


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    file: str | os.PathLike[str],
    length: int | None = None,
    stride: int | None = None,
    *,
    batch_size: int = 4,
    progress: Callable[[int, int, str], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a text file.

    Each text (:func:`read_texts`) is cut into windows of ``length`` tokens; every token that has at least one token
    before it in its window counts once, with equal weight. With ``stride == length``, the default and the usual
    protocol of the pruning papers, windows do not overlap; a smaller stride gives each token of a later window at least
    ``length - stride`` tokens of context.

    Args:
        model: A causal language model: its output has ``logits`` ``[batch, tokens, vocabulary]``.
        tokenizer: Its tokenizer.
        file: See :func:`read_texts`.
        length: Tokens per window; None: :func:`default_length`.
        stride: Tokens from one window to the next; None: ``length``.
        batch_size: Windows per call.
        progress: Called with (done, total, what).

    Raises:
        ValueError: If no text has two tokens, on an impossible stride, or if the model's loss is not finite.
    """
    length = default_length(tokenizer, model) if length is None else length
    stride = length if stride is None else stride
    if length < 2 or not 1 <= stride <= length:
        raise ValueError(f"length must be 2 or more and stride between 1 and length, got {length} and {stride}")
    jobs = [
        (ids[start:stop], first - start)
        for ids in token_ids(tokenizer, read_texts(file))
        for start, stop, first in _windows(len(ids), length, stride)
    ]
    if not jobs:
        raise ValueError(f"{file} is too short: no text has two tokens")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(jobs), batch_size):
            chunk = jobs[at : at + batch_size]
            batch = {key: value.to(device) for key, value in padded_batch(tokenizer, [ids for ids, _ in chunk]).items()}
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            targets = batch["input_ids"][:, 1:].clone()
            for row, (ids, first) in enumerate(chunk):
                targets[row, : first - 1] = -100
                targets[row, len(ids) - 1 :] = -100
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
            total += float(losses.double().sum())
            count += int((targets != -100).sum())
            if progress is not None:
                progress(min(at + batch_size, len(jobs)), len(jobs), "evaluating")
    if not math.isfinite(total):
        raise ValueError(f"the loss of the model on {file} is not finite: its weights or activations overflow")
    return Perplexity(total / count, count)


def sentence_embeddings(
    model: Any, tokenizer: Any, sentences: Sequence[str], *, length: int = 256, batch_size: int = 32
) -> Tensor:
    """Mean-pooled last hidden states of an encoder, of length one: what all-MiniLM and its kin call an embedding.

    Args:
        model: An encoder: its base model's output has ``last_hidden_state``.
        tokenizer: Its tokenizer.
        sentences: Any number.
        length: Tokens at which a sentence is cut.
        batch_size: Sentences per call; similar lengths go together.

    Returns:
        float32 ``[sentences, hidden]`` on the CPU; padding counts for nothing.

    Raises:
        ValueError: Without sentences.
    """
    if not sentences:
        raise ValueError("there are no sentences to embed")
    body = getattr(model, "base_model", model)
    device = next(body.parameters()).device
    pieces = [cut_text(tokenizer, ids, length) for ids in token_ids(tokenizer, sentences)]
    order = sorted(range(len(pieces)), key=lambda index: len(pieces[index]))
    found: list[Tensor] = [torch.empty(0)] * len(pieces)
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            batch = {
                key: value.to(device) for key, value in padded_batch(tokenizer, [pieces[row] for row in rows]).items()
            }
            states = body(**batch).last_hidden_state.float()
            weights = batch["attention_mask"].unsqueeze(-1).float()
            pooled = F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)
            for row, vector in zip(rows, pooled.cpu(), strict=True):
                found[row] = vector
    return torch.stack(found)


def embedding_cosine(before: Tensor, after: Tensor) -> float:
    """Mean cosine similarity, row by row, of embeddings before and after.

    Args:
        before: ``[sentences, hidden]``.
        after: Of the same shape.

    Example:
        >>> embedding_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        0.5
    """
    return float(F.cosine_similarity(before.double(), after.double(), dim=-1).mean())

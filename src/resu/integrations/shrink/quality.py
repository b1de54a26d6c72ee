"""How good a transformer still is: perplexity, accuracy, or how far its embeddings moved."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resu.integrations.finetune.batches import Collator
from resu.integrations.finetune.data import has_labels, label_names, read_examples, rows_of
from resu.integrations.finetune.evaluate import evaluate
from resu.integrations.hf_evaluate import embedding_cosine, perplexity, sentence_embeddings
from resu.integrations.hf_text import default_length, kind_of, read_texts
from resu.integrations.shrink.activity import evaluating
from resu.integrations.shrink.exactness import classifies, longest_input

__all__ = ["BatchJudge", "FileJudge", "causal_losses", "pooled"]

Progress = Callable[[int, int, str], None]
_LONGEST = 256  # tokens of a sentence


class FileJudge:
    """The quality of models on a text file: ``judge(model)`` is a number, ``judge.metric`` says which.

    Decoders have a perplexity. A classifier has an accuracy if the file has labels (``.csv``, ``.tsv``, ``.jsonl``).
    Other encoders have the mean cosine similarity of the embeddings of the file's lines to those of the model that the
    judge was made with.

    Args:
        model: As it was, before anything is removed.
        tokenizer: Its tokenizer.
        file: The text.
        progress: Called with (done, total, what).

    Raises:
        ValueError: Without a tokenizer, or if the file cannot be used: an empty one, or a table (``.csv``, ``.tsv``)
            for a model that is no classifier.
    """

    def __init__(
        self, model: Any, tokenizer: Any, file: str | os.PathLike[str], progress: Progress | None = None
    ) -> None:
        if tokenizer is None:
            raise ValueError("the directory has no tokenizer, so no text can be evaluated; copy its files there")
        self.tokenizer, self.file, self.progress = tokenizer, Path(file), progress
        whole = default_length(tokenizer, model)
        self.length = min(whole, longest_input(model) or whole)
        if kind_of(self.file) in (".csv", ".tsv") and not classifies(model):
            raise ValueError(
                f"{self.file} is a table, whose labels {type(model).__name__} cannot tell; give a text, .txt or .jsonl"
            )
        if model.can_generate():
            self.metric = "perplexity"
        elif classifies(model) and has_labels(self.file):
            self.metric = "accuracy"
            examples = read_examples(self.file, labelled=True)
            assert examples.labels is not None
            names = label_names(examples.labels, model.config.label2id, self.file)
            self._rows = rows_of(tokenizer, examples, min(_LONGEST, self.length), names=names, strung=False)
        else:
            self.metric = "cosine"
            self._texts = read_texts(self.file, lines=True)
            self._dense = self._embeddings(model)

    def __call__(self, model: Any) -> float:
        if self.metric == "perplexity":
            return perplexity(model, self.tokenizer, self.file, self.length, progress=self.progress).perplexity
        if self.metric == "accuracy":
            collator = Collator(self.tokenizer, "classification")
            return evaluate(model, self._rows, collator, 32, self.progress)["accuracy"]
        return embedding_cosine(self._dense, self._embeddings(model))

    def _embeddings(self, model: Any) -> Tensor:
        return sentence_embeddings(model, self.tokenizer, self._texts, length=min(_LONGEST, self.length))


class BatchJudge:
    """The quality of models on batches, as fast as many evaluations need it: perplexity, or cosine of embeddings.

    Args:
        model: As it was, before anything is removed.
        batches: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]`` each.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = batches
        self.metric = "perplexity" if model.can_generate() else "cosine"
        self._dense = None if model.can_generate() else self._embeddings(model)

    def __call__(self, model: Any) -> float:
        if self._dense is not None:
            return embedding_cosine(self._dense, self._embeddings(model))
        total, count = 0.0, 0
        device = next(model.parameters()).device
        with torch.inference_mode(), evaluating(model):
            for batch in self.batches:
                losses, counted = causal_losses(model, {key: value.to(device) for key, value in batch.items()})
                total += float((losses * counted).double().sum())
                count += int(counted.sum())
        mean = total / max(count, 1)
        return math.exp(mean) if mean < 700 else math.inf

    def _embeddings(self, model: Any) -> Tensor:
        device = next(model.parameters()).device
        found = []
        with torch.inference_mode(), evaluating(model):
            for batch in self.batches:
                moved = {key: value.to(device) for key, value in batch.items()}
                found.append(pooled(model.base_model(**moved).last_hidden_state, moved["attention_mask"]).cpu())
        return torch.cat(found)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings: the mean over tokens that are not padding, of length one. float32 ``[batch, hidden]``."""
    weights = mask.unsqueeze(-1).float()
    return F.normalize((states.float() * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def causal_losses(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each next token and whether it counts, float32 ``[batch, tokens - 1]`` each."""
    logits = model(**batch).logits[:, :-1].float()
    labels = batch["input_ids"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return losses, batch["attention_mask"][:, 1:].float()

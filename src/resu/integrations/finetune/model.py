"""A local Hugging Face model with the head of a task, and what of it the source has no weights for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu.integrations.hf import check_directory, load_tokenizer, read_model, refuse_random
from resu.integrations.hf_text import default_length
from resu.integrations.shrink.loading import loadable_class

__all__ = ["MASK_FILE", "LoadedModel", "head_names", "load_for_task", "settle_task", "usual_length"]

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}
#: Masks beside the weights of a directory.
MASK_FILE = "masks.safetensors"
_LONGEST = 512  # tokens; what is usual in fine-tuning


@dataclass(frozen=True)
class LoadedModel:
    """A model to fine-tune.

    Attributes:
        model: A ``PreTrainedModel`` in evaluation mode, on the CPU.
        tokenizer: With a padding token if it has any special token at all.
        new: Names of parameters that the source has no weights for; they are random.
    """

    model: Any
    tokenizer: Any
    new: tuple[str, ...]


def settle_task(task: str, directory: Path, labelled: bool) -> str:
    """The task that is meant by ``auto``: classification of labelled texts, else what the model was made for.

    Raises:
        ValueError: If the model is of another kind, such as an encoder-decoder, or classifies and there are no labels.
    """
    config = check_directory(directory)
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{directory} is an encoder-decoder, which reads pairs of texts; it cannot be fine-tuned here")
    if task != "auto":
        return task
    if labelled:
        return "classification"
    named = " ".join(config.get("architectures") or [])
    if "Classification" in named or "QuestionAnswering" in named or "MultipleChoice" in named:
        raise ValueError(
            f"{directory} is a {named}, and the text has no labels; of labelled lines (in a .txt: label, space, text) "
            "say the task classification, or give the task causal-lm or masked-lm, which leaves its head behind"
        )
    if "ForCausalLM" in named or "LMHead" in named:
        return "causal-lm"
    if "ForMaskedLM" in named or "Bert" in named or "PreTraining" in named:
        return "masked-lm"
    raise ValueError(
        f"what {directory} ({named or 'no architecture'}) shall learn is not clear from unlabelled text; give a task: "
        "causal-lm, masked-lm, or classification of labelled lines"
    )


def load_for_task(
    directory: Path, task: str, *, names: Sequence[str] = (), dtype: torch.dtype | None = None, seed: int = 0
) -> LoadedModel:
    """Load a directory with the head of a task.

    Args:
        directory: Holds ``config.json`` and safetensors, in one file or in shards, and a tokenizer.
        task: ``causal-lm``, ``masked-lm`` or ``classification``.
        names: Of the classes, in order; written into the configuration.
        dtype: Of the weights; None: as stored (the widest, where a checkpoint mixes several).
        seed: Of weights that the source does not have.

    Raises:
        FileNotFoundError: If a part of the directory is missing.
        FileFormatError: If a weight is missing that is not of the task's head.
        ValueError: If weights are pickles or quantized, or the architecture has no such head.
    """
    import transformers

    check_directory(directory)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise FileNotFoundError(f"{directory} has no tokenizer, so no text can be read; copy its files there")
    options: dict[str, Any] = {}
    if task == "classification":
        options = {"num_labels": len(names), "id2label": dict(enumerate(names))}
        options["label2id"] = {name: i for i, name in enumerate(names)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            kind = loadable_class(getattr(transformers, _CLASSES[task]), directory)
            model, missing, other = read_model(kind, directory, dtype, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error) and "trust_remote_code" not in str(error):
                raise
            raise ValueError(f"{directory} is of an architecture that has no head for {task}") from None
    new = sorted({*missing, *other})
    may_be_new = set(head_names(model)) if task != "causal-lm" else set()
    lost = [name for name in new if name not in may_be_new and ".pooler." not in f".{name}"]
    refuse_random(model, directory, [other.get(name, name) for name in lost])
    _settle_padding(model, tokenizer, task)
    parameters = {name for name, _ in model.named_parameters()}
    return LoadedModel(model, tokenizer, tuple(name for name in new if name in parameters))


def _settle_padding(model: Any, tokenizer: Any, task: str) -> None:
    """Have model and tokenizer agree on what fills a batch: decoders classify by the last token that is none."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if task != "classification":
        return
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no token to pad with, so texts of different lengths cannot be classified")
    model.config.pad_token_id = tokenizer.pad_token_id


def head_names(model: Any) -> list[str]:
    """Names of the parameters outside the model's body: of its head, of tied ones every name."""
    prefix = f"{model.base_model_prefix}."
    inside = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n.startswith(prefix)}
    return [
        n for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(prefix) and id(p) not in inside
    ]


def usual_length(tokenizer: Any, model: nn.Module, asked: int | None) -> int:
    """Tokens per sample: as asked, or what the model was made for, at most 512.

    Raises:
        ValueError: If more is asked for than the model was made for.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if asked is not None and isinstance(limit, int) and asked > limit:
        raise ValueError(
            f"a length of {asked} tokens is more than the {limit} that {type(model).__name__} was made for"
        )
    return min(_LONGEST, default_length(tokenizer, model)) if asked is None else asked

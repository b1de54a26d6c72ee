"""Tiny Hugging Face directories with a tokenizer of a few words, and texts in these words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "poor", "awful", "dull"]
OTHERS = ["the", "a", "film", "story", "is", "was", "and", "very", "it", "of"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(encoder: bool) -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *GOOD, *BAD, *OTHERS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if not encoder:
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]")
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{f"{k}_token": v for k, v in names.items()})


def directory(folder: Path, kind: str, **changes: Any) -> Path:
    """``bert`` (masked language model), ``bert-body``, ``llama`` or ``gpt2``; the same weights each time."""
    size = {"vocab_size": len(SPECIAL + GOOD + BAD + OTHERS)}
    if kind == "gpt2":
        kinds: Any = GPT2LMHeadModel
        config: Any = GPT2Config(**size, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=3, bos_token_id=3)
    else:
        size |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        size |= {"max_position_embeddings": 32, **changes}
        if kind == "llama":
            kinds, config = LlamaForCausalLM, LlamaConfig(**size, bos_token_id=2, eos_token_id=3)
        else:
            kinds = BertForMaskedLM if kind == "bert" else BertModel
            config = BertConfig(**size, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kinds(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    tokenizer(encoder=kind.startswith("bert")).save_pretrained(folder)
    return folder


def sentences(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """``(text, label)``: one word decides."""
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        label = draw.choice(["pos", "neg"])
        words = draw.choices(OTHERS, k=draw.randint(3, 8))
        words.insert(draw.randrange(len(words) + 1), draw.choice(GOOD if label == "pos" else BAD))
        found.append((" ".join(words), label))
    return found


def labelled_file(path: Path, n: int = 96, seed: int = 0) -> Path:
    path.write_text("".join(f"{label} {text}\n" for text, label in sentences(n, seed)), encoding="utf-8")
    return path


def text_file(path: Path, n: int = 120, seed: int = 0) -> Path:
    path.write_text("".join(f"{text}\n" for text, _ in sentences(n, seed)), encoding="utf-8")
    return path

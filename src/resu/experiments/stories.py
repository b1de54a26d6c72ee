"""Texts for stories260K, which it tells itself: to calibrate on, and to evaluate on.

``python -m resu.experiments.stories small`` writes ``small/model``, and texts as ``small/calibration.jsonl``
and ``small/evaluation.jsonl``: what the guide on pruning Hugging Face models begins with.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resu.experiments.llama2c import write_hf_directory

__all__ = ["main", "write_stories"]


def write_stories(
    model: Any,
    tokenizer: Any,
    file: str | os.PathLike[str],
    *,
    count: int = 64,
    tokens: int = 256,
    sampled: int | None = None,
    seed: int = 0,
) -> Path:
    """Stories that the model tells itself, one ``{"text": …}`` per line: there is no other text it was trained on here.

    Args:
        model: The language model of :func:`write_hf_directory`, loaded.
        tokenizer: Its tokenizer.
        file: The jsonl to write.
        count: How many stories.
        tokens: Longest story; a story may end earlier.
        sampled: How many tokens at the beginning are drawn by their probability; the rest is greedy. None: all.
        seed: Of what is drawn.

    Returns:
        ``file``.
    """
    start = torch.full((count, 1), tokenizer.bos_token_id)
    ends = {"eos_token_id": [tokenizer.bos_token_id, tokenizer.eos_token_id], "pad_token_id": tokenizer.eos_token_id}
    sampled = tokens if sampled is None else sampled
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        mask = torch.ones_like(start)
        ids = model.generate(start, attention_mask=mask, max_new_tokens=sampled, do_sample=True, top_k=0, **ends)
        if sampled < tokens:
            mask = torch.ones_like(ids)
            ids = model.generate(ids, attention_mask=mask, max_new_tokens=tokens - sampled, do_sample=False, **ends)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model and its texts."""
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.stories")
    parser.add_argument("out", type=Path, help="a new folder for model, calibration.jsonl and evaluation.jsonl")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    given = parser.parse_args(arguments)
    folder = given.data / "model_stories260K"
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        directory = write_hf_directory(folder if folder.is_dir() else given.data, given.out / "model")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    from resu.integrations.hf import load_model

    model, tokenizer = load_model(directory)
    write_stories(model, tokenizer, given.out / "calibration.jsonl", count=64, tokens=180, seed=0)
    write_stories(model, tokenizer, given.out / "evaluation.jsonl", count=24, tokens=128, sampled=8, seed=1)
    print(f"{directory}, {given.out / 'calibration.jsonl'}, {given.out / 'evaluation.jsonl'}")


if __name__ == "__main__":
    main()

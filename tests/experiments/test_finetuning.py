"""Accuracy against measured memory: the front, the choice of rates, what a run measures."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resu.experiments.finetuning.__main__ import main
from resu.experiments.finetuning.front import Point, draw_front, front, points, rate, table
from resu.experiments.finetuning.run import Row, held_bytes, measure, run
from resu.experiments.finetuning.tasks import Task, load_task
from resu.experiments.finetuning.ways import KINDS, Way, prepare
from resu.experiments.plots import to_png
from resu.experiments.rows import append, read
from resu.modules.dry_run import dry_run

DATA = Path(os.environ.get("RESU_DATA") or "../shared/data")
pytest.importorskip("transformers")
pytest.importorskip("peft")


def row(**changes: Any) -> Row:
    made = Row(
        "trec", "lora", 8.0, 3, 10, 1e-3, "test", "accuracy", 80.0, 5, 100, 200, 150, 1.0, "2", "0"
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def point(kind: str, value: float, lean: int, metric: str = "accuracy") -> Point:
    return Point("trec", Way(kind), metric, (value,), 1, lean, lean, lean)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12),
    st.sampled_from(["accuracy", "loss"]),
)
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]], metric: str) -> None:
    found = [point("lora", float(value), memory, metric) for value, memory in pairs]
    better = (lambda a, b: a >= b) if metric == "accuracy" else (lambda a, b: a <= b)

    def beaten(one: Point) -> bool:
        return any(
            other.lean <= one.lean
            and better(other.mean, one.mean)
            and (other.lean < one.lean or other.mean != one.mean)
            for other in found
        )

    line = front(found)
    assert not any(beaten(one) for one in line)
    assert {(p.mean, p.lean) for p in line} == {(p.mean, p.lean) for p in found if not beaten(p)}
    assert [p.lean for p in line] == sorted({p.lean for p in line})


def test_points_join_seeds_and_leave_out_what_was_for_choices() -> None:
    rows = [row(value=70.0), row(seed=4, value=74.0, state_bytes=0, peak_bytes=0, lean_bytes=0), row(part="dev")]
    (made,) = points(rows)
    assert made.values == (70.0, 74.0)
    assert (made.mean, made.state, made.peak, made.lean) == (72.0, 100, 200, 150)
    assert made.spread == pytest.approx(8**0.5)
    (made,) = points([*rows, row(part="memory", value=math.nan, state_bytes=7, peak_bytes=9, lean_bytes=8)])
    assert (made.mean, made.state, made.peak, made.lean) == (72.0, 7, 9, 8)


def test_a_rate_is_the_best_on_held_out_data_at_its_size_or_on_average() -> None:
    rows = [
        row(part="dev", size=2.0, lr=1e-3, value=50.0),
        row(part="dev", size=2.0, lr=3e-3, value=60.0),
        row(part="dev", size=32.0, lr=1e-3, value=65.0),
        row(part="test", size=2.0, lr=9.0, value=99.0),
    ]
    assert rate(rows, "trec", Way("lora", 2.0)) == 3e-3
    assert rate(rows, "trec", Way("lora", 32.0)) == 1e-3
    rows.append(row(part="dev", size=32.0, lr=3e-3, value=5.0))
    assert rate(rows, "trec", Way("lora", 8.0)) == 1e-3  # on average of both ends
    assert rate(rows, "sst2", Way("lora", 2.0)) == 3e-3  # what another task found
    rows.append(row(task="stories", part="dev", size=2.0, metric="loss", lr=1e-2, value=1.0))
    assert rate(rows, "sst2", Way("lora", 2.0)) == 3e-3  # the first other, not all together
    assert rate(rows, "trec", Way("full")) is None
    four = [row(kind="qresu4", part="dev", size=0.5, lr=3e-4)]
    assert rate(four, "trec", Way("qresu8", 0.5)) == 3e-4
    losses = [row(part="dev", metric="loss", lr=lr, value=value) for lr, value in ((1.0, 2.0), (2.0, 1.5))]
    assert rate(losses, "trec", Way("lora", 8.0)) == 2.0


def test_the_table_marks_the_front_and_the_plot_is_a_picture() -> None:
    found = [point("lora", 80.0, 10), point("full", 90.0, 30), point("head", 70.0, 20)]
    text = table(found)
    assert text.count("**LoRA**") == text.count("**full fine-tuning**") == 1
    assert "**head alone**" not in text
    assert to_png(draw_front(found))[:4] == b"\x89PNG"
    assert table([]) == ""


def test_held_bytes_counts_storages_once() -> None:
    with dry_run():  # tensors without data hold nothing
        fake = torch.empty(100_000_000)
    near = 1_000_000  # what earlier tests left may go meanwhile
    before = held_bytes()
    x = torch.zeros(10_000_000)
    view = x.view(10, -1)
    assert held_bytes() - before == pytest.approx(40_000_000, abs=near)
    del x
    assert held_bytes() - before == pytest.approx(40_000_000, abs=near)
    del view
    assert held_bytes() - before == pytest.approx(0, abs=near)
    del fake


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Task:
    if not (DATA / "model_stories260K").is_dir():
        pytest.skip(f"{DATA} holds no model_stories260K; set RESU_DATA")
    return load_task("stories", DATA, tmp_path_factory.mktemp("stories"))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # SHiRA's
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "head"])
def test_every_way_learns_and_changes_only_what_it_may(stories: Task, kind: str) -> None:
    sizes = KINDS[kind].sizes_for("stories")
    way = Way(kind, sizes[len(sizes) // 2])
    lr = KINDS[kind].rates[1]
    before = stories.evaluate(stories.model(0), "dev")
    made = run(stories, way, 0, 8, lr, "dev", measured=False)
    assert made.value < before
    assert made.trained > 0
    prepared = prepare(stories.model(0), stories, way, lr)
    allowed = {id(p) for p in (*prepared.adapter, *prepared.head)}
    trains = {id(p) for p in prepared.model.parameters() if p.requires_grad}
    assert trains == allowed or kind == "selective"  # its θ is the layers' own affair


def test_what_full_fine_tuning_holds_is_three_floats_per_weight(stories: Task) -> None:
    held, peak = measure(stories, Way("full"), 0, 1e-4, lean=False)
    weights = sum(p.numel() for p in stories.model(0).parameters())
    batch = stories.example()["input_ids"].nbytes  # its labels are the same tensor
    # Besides: a counter of steps per parameter, the tables of rotary embeddings, the batch.
    assert 0 <= held - 12 * weights - batch < 20_000
    assert peak > held + 4 * weights
    lean_held, lean = measure(stories, Way("full"), 0, 1e-4, lean=True)
    assert lean_held == pytest.approx(held, abs=20_000)
    assert lean < peak


def test_the_command_goes_on_where_it_stopped(stories: Task, tmp_path: Path) -> None:
    tuning, rows = tmp_path / "tuning.csv", tmp_path / "rows.csv"
    common = ["--data", str(DATA), "--tasks", "stories", "--kinds", "lora", "--steps", "2"]
    main([*common, "--tune", "--csv", str(tuning), "--sizes", "2"])
    assert [one.lr for one in read(tuning, Row)] == list(KINDS["lora"].rates)
    append(rows, row(task="stories", size=2.0, seed=3, metric="loss"))
    main([*common, "--memory", "--csv", str(rows), "--sizes", "2"])
    assert read(rows, Row)[-1].peak_bytes > 0
    given = f"--csv {rows} --rates {tuning} --seeds 3 4 --sizes 2 --jobs 2 --out {tmp_path}"
    # As a person runs it: processes of its own find the work by the name of its module.
    subprocess.run([sys.executable, "-m", "resu.experiments.finetuning", *common, *given.split()], check=True)
    assert [one.seed for one in read(rows, Row) if one.part == "test"] == [3, 4]
    assert "stories260K" in (tmp_path / "finetuning_front.md").read_text()
    assert (tmp_path / "finetuning_front.png").read_bytes()[:4] == b"\x89PNG"

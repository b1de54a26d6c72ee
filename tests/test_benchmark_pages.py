"""What pages show is what the committed results say: every table that a script writes is written anew and compared."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from resu.experiments.render import fill
from resu.experiments.rows import read

REPO = Path(__file__).parents[1]
RESULTS = REPO / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("export", "export"),
        ("finetune_shard", "finetune"),
        ("latency_targets", "structured"),
        ("peft", "peft"),
        ("shrink_resnet", "structured"),
        ("shrink_transformers", "shrink"),
        ("sparse_lora", "sparse_lora"),
    ],
)
def test_tables_of_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, page: str) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    tables = importlib.import_module(f"bench_{name}").tables(RESULTS / f"{name}.csv")
    original = REPO / "docs" / f"{page}.md"
    copy = Path(shutil.copy(original, tmp_path))
    assert fill(copy, tables.get) == list(tables)
    assert copy.read_text() == original.read_text()


def test_method_pages(tmp_path: Path) -> None:
    from resu.experiments.hf_tables import Run, render_pages

    pages = REPO / "docs" / "methods"
    shutil.copytree(pages, tmp_path / "methods")
    written = render_pages(read(RESULTS / "hf_pruning.csv", Run), tmp_path / "methods")
    assert {"results.md", "wanda.md", "sparsegpt.md"} <= set(written)
    for name in written:
        assert (tmp_path / "methods" / name).read_text() == (pages / name).read_text()


def test_page_of_reconstruction() -> None:
    from resu.experiments.reconstruction import Row, markdown

    assert markdown(read(RESULTS / "reconstruction.csv", Row)) in (REPO / "docs" / "reconstruction.md").read_text()


def test_page_of_pruners() -> None:
    from resu.experiments.toolbox import Result
    from resu.experiments.toolbox_page import markdown

    assert markdown(read(RESULTS / "resnet20_pruning.csv", Result)) in (REPO / "docs" / "pruners.md").read_text()


def test_page_of_fine_tuning() -> None:
    pytest.importorskip("peft")
    from resu.experiments.finetuning.front import guide, page
    from resu.experiments.finetuning.run import Row

    rows = read(RESULTS / "finetuning_front.csv", Row)
    assert page(rows) == (REPO / "docs" / "finetuning_front.md").read_text()
    assert guide(rows) in (REPO / "docs" / "finetune.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/honest.md"])
def test_pages_of_the_honest_question(page: str, tmp_path: Path) -> None:
    from resu.experiments.render import render, summarize

    copy = Path(shutil.copy(REPO / page, tmp_path))
    (summarize if page == "README.md" else render)(RESULTS, copy)
    assert copy.read_text() == (REPO / page).read_text()

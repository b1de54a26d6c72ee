"""Tables of one-shot pruning: what stands in the CSV stands on the pages, and the rest of a page stays."""

import pytest

from resu.experiments.hf_tables import METHODS, Run, Setting, render_pages, table
from resu.experiments.render import fill
from resu.experiments.rows import append, read

STORIES = "stories260K"


def run(setting, value, sparsity=0.5, pattern="", seed=0, model=STORIES, metric="perplexity", dense=1.5):
    return Run(
        model=model,
        method=setting.method,
        refine=setting.refine,
        update=setting.update,
        distribution=setting.distribution,
        pattern=pattern,
        sparsity=sparsity,
        actual=sparsity,
        seed=seed,
        metric=metric,
        dense=dense,
        value=value,
        seconds=1.0,
        torch="2",
    )


RUNS = [
    *(run(Setting("wanda"), value, seed=seed) for seed, value in enumerate((9.0, 10.0, 11.0))),
    run(Setting("magnitude"), 14.25),
    run(Setting("magnitude"), 88.0, pattern="2:4"),
    run(Setting("wanda", refine="dsnot"), 8.5),
    run(Setting("magnitude", distribution="lamp"), 12.0),
    run(Setting("random"), 4321.0),
]


def test_rows_come_in_order_with_mean_and_spread():
    lines = table(RUNS, STORIES, lambda setting: True).splitlines()
    assert lines[0] == "| stories260K: perplexity (lower is better), dense 1.5 | 50 % | 2:4 |"
    assert lines[2:] == [
        "| random | 4,320 | – |",
        "| magnitude | 14.25 | 88.00 |",
        "| wanda | 10.00 ± 1.00 | – |",
        "| wanda + dsnot | 8.50 | – |",
        "| magnitude (lamp) | 12.00 | – |",
    ]


def test_a_page_is_filled_in_and_keeps_its_text(tmp_path):
    page = tmp_path / "wanda.md"
    page.write_text("# Wanda\n\n<!-- results: wanda -->\nold\n<!-- results: end -->\n\nAfter.\n")
    (tmp_path / "plain.md").write_text("nothing to fill in\n")
    for _ in range(2):
        assert render_pages(RUNS, tmp_path) == ["wanda.md"]
    text = page.read_text()
    assert text.startswith("# Wanda\n\n<!-- results: wanda -->\n| stories260K")
    assert text.endswith("|\n<!-- results: end -->\n\nAfter.\n")
    assert "old" not in text
    assert "dsnot" not in text
    page.write_text("<!-- results: dsnot -->\n<!-- results: end -->")
    render_pages(RUNS, tmp_path)
    assert "wanda + dsnot" in page.read_text()
    page.write_text("<!-- results: wanda -->\n")
    with pytest.raises(ValueError, match="without its end"):
        render_pages(RUNS, tmp_path)


def test_a_page_may_have_several_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- results: one -->\n<!-- results: end -->\n\n<!-- results: two -->\nold\n<!-- results: end -->\n"
    )
    assert fill(page, {"one": "1 \\1"}.get) == ["one"]
    assert page.read_text() == (
        "<!-- results: one -->\n1 \\1\n<!-- results: end -->\n\n<!-- results: two -->\nold\n<!-- results: end -->\n"
    )
    assert fill(page, {}.get) == []
    for marks in (["end", "one"], ["one", "two", "end"], ["one", "end", "two"]):
        page.write_text("\n".join(f"<!-- results: {mark} -->" for mark in marks))
        with pytest.raises(ValueError, match="without its end"):
            fill(page, {"one": "1", "two": "2"}.get)


def test_rows_come_back_from_the_csv(tmp_path):
    for one in RUNS:
        append(tmp_path / "a.csv", one)
    assert read(tmp_path / "a.csv", Run) == RUNS
    assert len({one.key for one in RUNS}) == len(RUNS)


def test_settings_have_names_of_their_own():
    assert len({setting.label for setting in METHODS}) == len(METHODS)
    assert Setting("wanda", "dsnot", "sparsegpt", "owl").label == "wanda + dsnot + sparsegpt update (owl)"

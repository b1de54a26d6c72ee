import dataclasses
import sys

import pytest

from resu.experiments import honest
from resu.experiments.leaderboard import append_row, markdown, plot, read_rows, tables
from resu.experiments.methods import methods
from resu.experiments.recipes import Row
from resu.experiments.render import ORDER, render


def row(method="gradual", sparsity=0.9, seed=0, test=80.0, **more):
    values = {
        "task": "mlp",
        "regime": "finetune",
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "steps": 10,
        "metric": "accuracy",
        "val": test,
        "test": test,
        "actual_sparsity": sparsity,
        "zeros_exact": True,
        "held_bytes": 100,
        "seconds": 1.5,
        "settings": "a, b=1",
        "recipe": "r",
        "torch": "2",
    }
    return Row(**(values | more))


def test_rows_come_back_as_they_were(tmp_path):
    rows = [row(seed=i, test=80.123 + i, zeros_exact=bool(i)) for i in range(3)]
    assert read_rows(tmp_path / "a.csv") == []
    for each in rows:
        append_row(tmp_path / "new" / "a.csv", each)
    assert read_rows(tmp_path / "new" / "a.csv") == rows


def test_a_line_that_was_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path):
    file = tmp_path / "a.csv"
    for i in range(2):
        append_row(file, row(seed=i))
    file.write_bytes(file.read_bytes()[:-12])
    assert read_rows(file) == [row(seed=0)]
    append_row(file, row(seed=2))
    assert read_rows(file) == [row(seed=0), row(seed=2)]


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="has the columns x, y"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="has the columns x, y"):
        append_row(tmp_path / "a.csv", row())


def test_the_table_has_mean_spread_and_the_best_in_bold():
    rows = [row(seed=i, test=80.0 + i) for i in range(3)]
    rows += [row("resu", seed=i, test=85.0) for i in range(2)] + [row("dense", 0.0, test=90.0)]
    (table,) = tables(rows)
    assert markdown(table, ORDER).splitlines() == [
        "| method | 0.9 | seeds |",
        "| --- | --- | --- |",
        "| dense | 90.00 ± 0.00 | 1 |",
        "| gradual | 81.00 ± 1.00 | 3 |",
        "| resu | **85.00 ± 0.00** | 2 |",
    ]


def test_lower_is_better_for_a_loss():
    (table,) = tables([row(metric="loss", test=1.5), row("resu", metric="loss", test=1.6)])
    assert table.best(0.9) == "gradual"


def test_only_rows_that_ran_alike_are_compared():
    old = [row(seed=0, test=1.0, settings="old"), row("resu", seed=0, test=2.0, steps=5)]
    new = [row(seed=0, test=80.0), row("resu", seed=0, test=70.0), row("resu", seed=0, test=71.0)]
    (table,) = tables([*old, *new])
    assert table.cells["gradual"][0.9].values == (80.0,)
    assert table.cells["resu"][0.9].values == (71.0,)  # a row again: the last one counts


def test_every_method_has_its_place_in_the_tables():
    assert set(ORDER) == set(methods)


def test_a_page_keeps_its_text_around_the_tables(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no result"):
        render(tmp_path, tmp_path / "page.md")
    for i in range(2):
        append_row(tmp_path / "honest_mlp_finetune.csv", row(seed=i))
        append_row(tmp_path / "honest_mlp_finetune.csv", row("dense", 0.0, seed=i))
    render(tmp_path, tmp_path / "page.md")
    page = tmp_path / "page.md"
    assert "| gradual | **80.00 ± 0.00** | 2 |" in page.read_text()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    page.write_text(page.read_text().replace("# Which", "My own words.\n\n# Which") + "\nThe end.\n")
    append_row(tmp_path / "honest_mlp_finetune.csv", row("resu", test=81.0))
    render(tmp_path, page)
    assert page.read_text().startswith("My own words.")
    assert page.read_text().endswith("\nThe end.\n")
    assert "| resu | **81.00 ± 0.00** | 1 |" in page.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no marks"):
        render(tmp_path, page)


def test_drawing_needs_no_display_and_touches_no_global_state(tmp_path):
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules  # another library's tests may have loaded it
    plot(tables([row(), row("dense", 0.0)]), tmp_path / "a.png", ORDER)
    assert ("matplotlib.pyplot" in sys.modules) == before


# -- the command --------------------------------------------------------------------------------------

QUICK = ["--task", "digits", "--quick", "--methods", "dense", "gradual", "resu", "--seeds", "0", "1"]


def test_the_command_runs_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    arguments = [*QUICK, "--sparsities", "0.8", "--out", str(tmp_path)]
    assert honest.main(arguments) == 0
    file = tmp_path / "honest_digits_finetune.csv"
    before = read_rows(file)
    assert len(before) == 6
    assert len(list((tmp_path / "dense").iterdir())) == 2
    assert all(each.zeros_exact for each in before)
    assert honest.main(arguments) == 0
    assert read_rows(file) == before
    assert honest.main([*arguments, "--sparsities", "0.8", "0.9"]) == 0
    after = read_rows(file)
    assert after[:6] == before
    assert [(each.method, each.sparsity) for each in after[6:]] == [("gradual", 0.9), ("resu", 0.9)] * 2
    monkeypatch.setattr(honest, "_data", {})
    file.unlink()
    assert honest.main(arguments) == 0
    again = [dataclasses.replace(each, seconds=0.0) for each in read_rows(file)]
    assert again == [dataclasses.replace(each, seconds=0.0) for each in before]


def test_workers_give_the_same_rows(tmp_path):
    pytest.importorskip("sklearn")
    arguments = [
        "--task",
        "digits",
        "--quick",
        "--methods",
        "gradual",
        "--sparsities",
        "0.8",
        "--seeds",
        "0",
        "1",
    ]
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        assert honest.main([*arguments, "--out", str(out), "--jobs", jobs]) == 0
        rows = read_rows(out / "honest_digits_finetune.csv")
        found.append(sorted((each.seed, each.val, each.test) for each in rows))
    assert found[0] == found[1]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    run = honest.run

    def failing(task, method, *arguments, **options):
        if method == "resu":
            raise RuntimeError("on purpose")
        return run(task, method, *arguments, **options)

    monkeypatch.setattr(honest, "run", failing)
    assert honest.main([*QUICK, "--sparsities", "0.8", "--out", str(tmp_path)]) == 1
    assert len(read_rows(tmp_path / "honest_digits_finetune.csv")) == 4
    assert "FAILED resu 0.8 0: RuntimeError: on purpose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--sparsities", "1.5"], "sparsity"),
        (["--task", "mlp", "--data-dir", "/no/such/folder"], "is not a folder"),
        (["--render", "page.md"], "no result in"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert honest.main([*arguments, "--quick", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error

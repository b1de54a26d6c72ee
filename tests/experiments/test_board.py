"""The leaderboard: rows gathered by what may be compared, with their mean, spread and cost."""

import dataclasses
import statistics

import pytest

from resu.experiments.board import boards, collect, lines, unfinished
from resu.experiments.board_page import HEAD, cells, markdown, plot_flops, plot_sparsity
from resu.experiments.rows import as_csv, read
from resu.experiments.train import ConfigError, Result
from resu.experiments.train.result import write_json

ROW = Result(
    data="digits",
    model="mlp",
    method="rigl",
    sparsity=0.9,
    seed=0,
    regime="scratch",
    steps=100,
    metric="accuracy",
    val=90.0,
    test=91.0,
    actual_sparsity=0.9,
    exact=True,
    explored=0.3,
    training_flops=0.12,
    inference_flops=0.1,
    seconds=1.5,
    settings="rigl erk interval=10",
    recipe="batch_size=64 optimizer.lr=0.1, model.hidden=[8, 4]",
    torch="2.13.0",
    resu="0.1.0",
)


def row(**changes):
    return dataclasses.replace(ROW, **changes)


DENSE = [
    row(method="dense", settings="dense", sparsity=0.0, seed=s, test=95.0 + s, training_flops=1.0, inference_flops=1.0)
    for s in (0, 1)
]


def test_seeds_make_a_mean_and_a_spread_and_lines_go_from_the_best_down():
    tests = [91.0, 93.5, 92.2]
    rigl = [row(seed=s, test=t, val=t - 1, training_flops=0.1 + s / 100) for s, t in enumerate(tests)]
    others = [row(method="set", settings="set erk", seed=s, test=94.0) for s in (0, 1)]
    (board,) = boards([*rigl, *others, *DENSE])
    assert board.sparsities == [0.9]
    assert board.best(0.9) == "set"
    listed = lines(board)
    assert [(line.sparsity, line.method, line.seeds, line.best) for line in listed] == [
        (0.0, "dense", 2, False),
        (0.9, "set", 2, True),
        (0.9, "rigl", 3, False),
    ]
    last = listed[-1]
    assert last.mean == pytest.approx(statistics.fmean(tests), abs=1e-6)
    assert last.std == pytest.approx(statistics.stdev(tests), abs=1e-6)
    assert last.val == pytest.approx(statistics.fmean(tests) - 1, abs=1e-6)
    assert last.training_flops == pytest.approx(0.11)


@pytest.mark.parametrize(
    "other",
    [{"steps": 200}, {"recipe": "batch_size=32"}, {"data": "cifar10"}, {"model": "lenet5"}, {"regime": "finetune"}],
)
def test_what_cannot_be_compared_is_not_in_one_table(other):
    found = boards([row(), row(seed=1), row(seed=2, **other)])
    assert [len(board.cells["rigl"][0.9].runs) for board in found] == [2, 1]


def test_of_a_run_that_was_done_twice_the_later_counts():
    (board,) = boards([row(test=50.0), row(seed=1), row(test=92.0)])
    assert board.cells["rigl"][0.9].values == (92.0, 91.0)


def test_settings_of_one_method_are_told_apart_where_there_are_several_at_once():
    slow = row(settings="rigl erk interval=50", test=80.0)
    (board,) = boards([row(), slow])
    assert {name: cell[0.9].values for name, cell in board.cells.items()} == {
        "rigl (interval=10)": (91.0,),
        "rigl (interval=50)": (80.0,),
    }
    # A method whose settings follow the sparsity is one method.
    (board,) = boards([row(), row(sparsity=0.8, settings="rigl erk interval=20")])
    assert set(board.cells) == {"rigl"}
    assert set(board.cells["rigl"]) == {0.8, 0.9}


def test_less_is_better_of_a_loss():
    (board,) = boards([row(metric="loss", test=1.5), row(metric="loss", test=1.4, method="set", settings="set")])
    assert board.best(0.9) == "set"
    assert [line.method for line in lines(board)] == ["set", "rigl"]


def test_rows_come_back_from_their_files(tmp_path):
    results = [row(), row(seed=1, training_flops=None, exact=False), *DENSE]
    (tmp_path / "rows.csv").write_text(as_csv(results))
    assert read(tmp_path / "rows.csv", Result) == results
    for i, result in enumerate(results[:2]):
        (tmp_path / "runs" / f"deep/{i}").mkdir(parents=True)
        write_json(tmp_path / "runs" / f"deep/{i}" / "result.json", {**dataclasses.asdict(result), "config": {}})
        write_json(tmp_path / "runs" / f"deep/{i}" / "config.json", {})
    (tmp_path / "runs" / "begun").mkdir()
    write_json(tmp_path / "runs" / "begun" / "config.json", {})
    assert collect([tmp_path / "runs", tmp_path / "rows.csv"]) == [*results[:2], *results]
    assert unfinished([tmp_path / "runs", tmp_path / "rows.csv"]) == 1


def test_what_is_no_result_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no result\.json in .*: runs write it"):
        collect([tmp_path])
    with pytest.raises(ConfigError, match=r"nowhere is neither a folder of runs nor a \.csv"):
        collect([tmp_path / "nowhere"])
    write_json(tmp_path / "result.json", {"data": "digits"})
    with pytest.raises(ConfigError, match=r"result\.json is not the result of a run: KeyError"):
        collect([tmp_path])
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="is not the result of a run"):
        collect([tmp_path])
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv has the columns a, b"):
        collect([tmp_path / "a.csv"])


def test_the_page_has_every_figure_and_marks_the_best():
    (board,) = boards(
        [row(seed=s, test=91.0 + s) for s in (0, 1)] + DENSE + [row(method="set", settings="set", test=90.0)]
    )
    text = markdown([board], ["a.png"])
    assert "![a.png](a.png)" in text
    assert "## mlp on digits, from scratch, 100 steps" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| " + " | ".join(HEAD) + " |"
    assert table[2:] == [
        "| 0 % | dense | 95.50 ± 0.71 | 90.00 | 2 | 1 | 1 | 0.3 | yes |",
        "| 90 % | **rigl** | **91.50 ± 0.71** | 90.00 | 2 | 0.12 | 0.1 | 0.3 | yes |",
        "| 90 % | set | 90.00 | 90.00 | 1 | 0.12 | 0.1 | 0.3 | yes |",
    ]
    assert "- rigl: `rigl erk interval=10`" in text
    (loss,) = boards([row(metric="loss", test=1.23456, training_flops=None, exact=False)])
    assert cells(lines(loss)[0])[2:] == ("1.2346", "90.0000", "1", "–", "0.1", "0.3", "NO")


def test_plots_hold_every_method_at_its_place():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from resu.experiments.board_page import draw_flops

    results = [
        row(method=m, settings=m, sparsity=s, seed=seed, test=90 + seed - 10 * s, training_flops=1.2 - s)
        for m in ("a", "b", "none")
        for s in (0.8, 0.9)
        for seed in (0, 1)
    ]
    results = [dataclasses.replace(r, training_flops=None) if r.method == "none" else r for r in results]
    (board,) = boards([*results, *DENSE])
    axes = Figure().subplots()
    draw_flops(axes, board, ["a", "b", "none"])
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn.keys() == {"a", "b", "dense"}
    assert drawn["a"] == [pytest.approx([0.4, 82.5]), pytest.approx([0.3, 81.5])]
    assert drawn["dense"] == [[1.0, 95.5]]
    several = [board, *boards([dataclasses.replace(r, steps=200, metric="perplexity") for r in results])]
    for draw in (plot_sparsity, plot_flops):
        assert draw(several).startswith(b"\x89PNG")

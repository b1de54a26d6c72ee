"""Tables from rows, by hand; and those of the page."""

from pathlib import Path

from resu.experiments.spinn.results import (
    FieldRow,
    KnownToolRow,
    LeftOutRow,
    NewToolRow,
    OriginRow,
    Results,
    TwinRow,
    add,
)
from resu.experiments.spinn.table import (
    field_table,
    main_table,
    new_tool_table,
    origins_table,
    physics_table,
    share_table,
    tables,
)

REPO = Path(__file__).parents[3]


def twin(quantity, way, *, physics=True, seed=0, test=0.5):
    return TwinRow(quantity, way, physics, seed, 0.7, 30, test, 0.4, "no law", 1.0)


def new_tool(group, seed, rest, before, mixed, equal, single, retrained):
    shares = (0.5, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0) if group == 4 else (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return NewToolRow(*("wear", group, seed, rest, before, mixed, equal, single, retrained, 0.05, 0.025, shares, 1.0))


def test_tables_of_every_study():
    found = Results(
        twins=[
            twin("wear", "ridge", physics=False),
            twin("wear", "dense", test=0.9),
            twin("thermal", "ridge", physics=False, test=0.7),
            twin("thermal", "dense", test=0.8),
            twin("thermal", "dense", seed=1, test=0.7),
        ],
        new_tools=[
            new_tool(10, 0, 10, 5, 3, 5, 5, 1),
            new_tool(10, 1, 10, 5, 4, 5, 0, 1),
            new_tool(4, 0, 20, 1, 1, 3, 1, 2),
        ],
        left_out=[
            LeftOutRow("wear", "dense", 4, 9, float("nan"), 1.0, 2, 0.0, 1.0, 1.0),
            LeftOutRow("wear", "dense", 10, 9, 0.6, 3.0, 2, 0.0, 1.0, 1.0),
        ],
        origins=[
            OriginRow("thermal", "dense", True, 0, (0.8, 0.9, 0.9, 1.0), (0.5, 0.6, 0.7), 1.0),
            OriginRow("thermal", "dense", True, 1, (0.6, 0.9, 0.9, 0.8), (0.7, 0.6, 0.9), 1.0),
        ],
        fields=[FieldRow("burgers", "sparse", 0, 0.7, 30, 0.0125, "", 1.0)],
    )
    text = tables(found, {"wear": [0.0, 2.0, 4.0, 6.0]}, {"wear": "mm"})
    assert "| ridge |  | 0.500 | 0.700 | 0.600 |" in text
    assert "| dense, with physics |  | 0.900 | 0.750 ± 0.071 | 0.850 |" in text  # overall of the seed that all have
    assert "| RMS error, mm | before | mixed |" in text
    # mean squares: 25, (9 + 16) / 2, 25, 25 / 2 and 1 → (25 − 12.5) / 24
    assert "| 10 | 5 | 3.54 | 5 | 3.54 | 1 | 52 % | 0 % | 52 % |" in text
    none = "no gain to recover"
    assert f"| 4 | 1 | 1 | 3 | 1 | 2 | {none} | {none} | {none} |" in text
    # over 40 rows: (500 + 20) / 40 = 13, (250 + 20) / 40, (500 + 180) / 40, (250 + 20) / 40, (20 + 80) / 40
    assert "| **all rows together** | 3.61 | 2.6 | 4.12 | 2.6 | 1.58 | 60 % | -38 % | 60 % |" in text
    assert "| median of squared error / before | 1.00 | 0.75 | 5.00 | 0.75 | 2.02 |  |  |  |" in text
    assert "| highest of squared error / before | 1.00 | 1.00 | 9.00 | 1.00 | 4.00 |  |  |  |" in text
    assert "gains something on 1 of 2. Adapting costs 5.0 % of its multiply-adds and 2.5 % of its time." in text
    # seed 0: (250 + 20) / 30 before, (90 + 20) / 30 mixed, (10 + 80) / 30 retrained; seed 1: 25, 16, 1
    assert "take away, seed by seed: 59 % and 67 %; 36 % and 96 %." in text
    assert "| turning wear | 0.17 | 0.67 | 0.00 | 0.08 | 0.08 | 0.00 | 0.00 |" in text
    assert "| dense, with physics | 0.700 | 0.900 | 0.900 | 0.900 | 0.850 ± 0.071 | 0.600 | 0.600 | 0.800 |" in text
    assert "| 4 | – |" in text
    assert "| **all rows together** | **0.800** |" in text  # 1 − (1 + 3) / (4 · 5)
    assert "| burgers | sparse | 70.0 % | 30 | 1.25e-02 | 1 |" in text


def test_a_page_of_some_quantities_leaves_the_others_out():
    rows = [new_tool(10, 0, 10, 5, 3, 5, 5, 1)]
    assert "A new tool, turning wear" in tables(Results(new_tools=rows), {"wear": []}, {"wear": "µm"})
    assert "A new tool, turning" not in tables(Results(new_tools=rows), {"thermal": []}, {"thermal": "µm"})


def test_a_median_of_two_lies_between_them():
    rows = [LeftOutRow("wear", "dense", g, 9, test, 1.0, 2, 0.0, 1.0, 1.0) for g, test in ((4, 0.2), (5, 0.6))]
    assert "| median | 0.40 |" in tables(Results(left_out=rows), {"wear": [0.0, 1.0, 2.0, 3.0]}, {"wear": "mm"})


def test_a_run_that_was_cut_off_between_two_rows_and_run_again_counts_once(tmp_path):
    run = [new_tool(4, seed, 20, 1 + seed, 1, 3, 1, 2) for seed in range(3)]
    pairs = [KnownToolRow("wear", a, b, (1.0,), 1.0) for a, b in ((3, 4), (4, 3), (3, 5))]
    ways = [twin("wear", way, physics=physics) for way in ("dense", "sparse") for physics in (False, True)]
    origins = [OriginRow("thermal", "dense", True, seed, (0.8,), (0.5,), 1.0) for seed in (0, 1)]
    for row in (*run[:2], *run, *pairs[:1], *pairs, *ways[:1], *ways, *origins[:1], *origins):
        add(tmp_path, row)
    found = Results.read(tmp_path)
    assert found == Results(twins=ways, origins=origins, known_tools=pairs, new_tools=run)


def test_the_page_shows_the_rows_that_are_there():
    """All tables but those of groups left out, which need the recordings."""
    found, text = Results.read(REPO / "benchmarks" / "results" / "spinn"), (REPO / "docs" / "spinn.md").read_text()
    shown = [main_table(found.twins), origins_table(found.origins), share_table(found.new_tools)]
    shown += [field_table(found.fields), physics_table(found.twins)]
    for name, unit in (("wear", "µm"), ("milling", "mm")):
        shown.append(new_tool_table([row for row in found.new_tools if row.quantity == name], unit))
    assert all(table in text for table in shown)

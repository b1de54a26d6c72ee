"""Tables from rows, by hand."""

from resu.experiments.spinn.runs import Row
from resu.experiments.spinn.table import tables


def row(study, quantity, way, *, physics=True, seed=0, group="", test=0.5, detail=""):
    return Row(study, quantity, way, physics, seed, group, 0.7, 30, test, 0.4, detail, 1.0)


def test_tables_of_every_study():
    told = "RMSE mm: before {}, adapted {} / {}, retrained {}, over {} rows; multiply-adds 0.05, processor time 0.025; "
    told += "weight · penalty 3 · 9 / 1 · 2"
    left = "squared error {} over 2 rows; mean error 0; mean absolute error 1 µm"
    rows = [
        row("twin", "wear", "ridge", physics=False),
        row("twin", "wear", "dense", test=0.9, detail="no law"),
        row("twin", "thermal", "ridge", physics=False, test=0.7),
        row("twin", "thermal", "dense", test=0.8),
        row("twin", "thermal", "dense", seed=1, test=0.7),
        row("adaptation", "wear", "sparse", group="10", detail=told.format(5, 3, 5, 1, 10)),
        row("adaptation", "wear", "sparse", group="10", seed=1, detail=told.format(5, 4, 5, 1, 10)),
        row("adaptation", "wear", "sparse", group="4", detail=told.format(1, 1, 3, 2, 20)),
        row("leave one out", "wear", "dense", group="4", test=float("nan"), detail=left.format(1)),
        row("leave one out", "wear", "dense", group="10", test=0.6, detail=left.format(3)),
        row("origins", "thermal", "dense", test=0.9, detail="near 0.8, 0.9, 0.9, 1.0; far 0.5, 0.6, 0.7"),
        row("origins", "thermal", "dense", seed=1, test=0.8, detail="near 0.6, 0.9, 0.9, 0.8; far 0.7, 0.6, 0.9"),
        row("field", "burgers", "sparse", test=0.0125),
    ]
    text = tables(rows, {"wear": [0.0, 2.0, 4.0, 6.0]})
    assert "| ridge |  | 0.500 | 0.700 | 0.600 |" in text
    assert "| dense, with physics |  | 0.900 | 0.750 ± 0.071 | 0.850 |" in text  # overall of the seed that all have
    # mean squares: 25, (9 + 16) / 2, 25 and 1 → (25 − 12.5) / 24
    assert "| 10 | 5 | 3.54 | 5 | 1 | 52 % | 0 % | 3 · 9 | 1 · 2 |" in text
    assert "| 4 | 1 | 1 | 3 | 2 | no gain to recover | no gain to recover | 3 · 9 | 1 · 2 |" in text
    # over 40 rows: (500 + 20) / 40 = 13, (250 + 20) / 40 = 6.75, (500 + 180) / 40 = 17, (20 + 80) / 40 = 2.5
    assert "| **all rows together** | 3.61 | 2.6 | 4.12 | 1.58 | 60 % | -38 % |  |  |" in text
    assert "| median of squared error / before | 1.00 | 0.75 | 5.00 | 2.02 |" in text
    assert "gains something on 1 of 2. Adapting costs 5.0 % of its multiply-adds and 2.5 % of its time." in text
    assert "| dense, with physics | 0.700 | 0.900 | 0.900 | 0.900 | 0.850 ± 0.071 | 0.600 | 0.600 | 0.800 |" in text
    assert "| 4 | – |" in text
    assert "| **all rows together** | **0.800** |" in text  # 1 − (1 + 3) / (4 · 5)
    assert "| burgers | sparse | 70.0 % | 30 | 1.25e-02 | 1 |" in text

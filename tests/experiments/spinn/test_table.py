"""Tables from rows, by hand."""

from resu.experiments.spinn.runs import Row
from resu.experiments.spinn.table import tables


def row(study, quantity, way, *, physics=True, seed=0, group="", test=0.5, detail=""):
    return Row(study, quantity, way, physics, seed, group, 0.7, 30, test, 0.4, detail, 1.0)


def test_tables_of_every_study():
    told = "RMSE mm: before {}, adapted {}, retrained {}, over {} rows; multiply-adds 0.05, processor time 0.025"
    told += "; weight 3, penalty 9"
    left = "squared error {} over 2 rows; mean error 0; mean absolute error 1 µm"
    rows = [
        row("twin", "wear", "ridge", physics=False),
        row("twin", "wear", "dense", test=0.9, detail="no law"),
        row("twin", "thermal", "ridge", physics=False, test=0.7),
        row("twin", "thermal", "dense", test=0.8),
        row("twin", "thermal", "dense", seed=1, test=0.7),
        row("adaptation", "wear", "sparse", group="10", detail=told.format(5, 3, 1, 10)),
        row("adaptation", "wear", "sparse", group="10", seed=1, detail=told.format(5, 4, 1, 10)),
        row("adaptation", "wear", "sparse", group="4", detail=told.format(1, 1, 2, 20)),
        row("leave one out", "wear", "dense", group="4", test=float("nan"), detail=left.format(1)),
        row("leave one out", "wear", "dense", group="10", test=0.6, detail=left.format(3)),
        row("field", "burgers", "sparse", test=0.0125),
    ]
    text = tables(rows, {"wear": [0.0, 2.0, 4.0, 6.0]})
    assert "| ridge |  | 0.500 | 0.700 | 0.600 |" in text
    assert "| dense, with physics |  | 0.900 | 0.750 ± 0.071 | 0.850 |" in text  # overall of the seed that all have
    assert "| RMS error, mm | before | adapted | retrained | gain recovered | weight · penalty |" in text
    # mean squares: 25, (9 + 16) / 2 and 1 → (25 − 12.5) / 24
    assert "| 10 | 5 | 3.54 | 1 | 52 % | 3 · 9 |" in text
    assert "| 4 | 1 | 1 | 2 | retraining gains nothing | 3 · 9 |" in text
    # over 40 rows: (500 + 20) / 40 = 13, (250 + 20) / 40 = 6.75, (20 + 80) / 40 = 2.5 → 6.25 / 10.5
    assert "| **all rows together** | 3.61 | 2.6 | 1.58 | 60 % |  |" in text
    # 9/25, 16/25 and 1; 1/25, 1/25 and 4
    assert "adapted 0.64, retrained 0.04. Retraining gains something on 1 of 2, where the median share" in text
    assert "recovered is 52 %. Adapting costs 5.0 % of retraining's multiply-adds and 2.5 % of its time." in text
    assert "| 4 | – |" in text
    assert "| **all rows together** | **0.800** |" in text  # 1 − (1 + 3) / (4 · 5)
    assert "| burgers | sparse | 70.0 % | 30 | 1.25e-02 | 1 |" in text

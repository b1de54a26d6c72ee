"""Tables from rows, by hand."""

from resu.experiments.spinn.runs import Row
from resu.experiments.spinn.table import tables


def row(study, quantity, way, *, physics=True, seed=0, group="", test=0.5, detail=""):
    return Row(study, quantity, way, physics, seed, group, 0.7, 30, test, 0.4, detail, 1.0)


def test_tables_of_every_study():
    told = "RMSE mm: before 0.4, adapted 0.22, retrained 0.2; multiply-adds 0.05, processor time 0.025"
    left = "squared error {} over 2 rows; mean error 0; mean absolute error 1 µm"
    rows = [
        row("twin", "wear", "ridge", physics=False),
        row("twin", "wear", "dense", test=0.9, detail="no law"),
        row("twin", "thermal", "ridge", physics=False, test=0.7),
        row("twin", "thermal", "dense", test=0.8),
        row("twin", "thermal", "dense", seed=1, test=0.7),
        row("adaptation", "wear", "sparse", group="10", detail=told),
        row("leave one out", "wear", "dense", group="4", test=float("nan"), detail=left.format(1)),
        row("leave one out", "wear", "dense", group="10", test=0.6, detail=left.format(3)),
        row("field", "burgers", "sparse", test=0.0125),
    ]
    text = tables(rows, {"wear": [0.0, 2.0, 4.0, 6.0]})
    assert "| ridge |  | 0.500 | 0.700 | 0.600 |" in text
    assert "| dense, with physics |  | 0.900 | 0.750 ± 0.071 | 0.850 |" in text  # overall of the seed that all have
    assert "| turning wear, sparse, 10 | 0.4 | 0.22 | 0.2 | mm | 90 % | 5.0 % | 2.5 % |" in text
    assert "| 4 | – |" in text
    assert "| **all rows together** | **0.800** |" in text  # 1 − (1 + 3) / (4 · 5)
    assert "| burgers | sparse | 70.0 % | 30 | 1.25e-02 | 1 |" in text

"""The application end to end on a made-up recording: files, resuming, refusals, the page."""

import dataclasses
import json
import time

import pytest
import torch

from resu.experiments.spinn import application
from resu.experiments.spinn.application import Settings, build
from resu.experiments.spinn.fields import FIELDS, Field, relative_error, train_field
from resu.experiments.spinn.fitting import Recipe
from resu.experiments.spinn.jobs import Job, jobs
from resu.experiments.spinn.latency import latencies, packed
from resu.experiments.spinn.results import Results, add
from resu.experiments.spinn.runs import WAYS, quantity_rows
from resu.experiments.spinn.table import main_table, pooled_r2, spread, tables
from resu.experiments.spinn.twin import dense_network
from tests.experiments.spinn.test_sparse import HIDDEN, RECIPE

pytest.importorskip("matplotlib")


@pytest.fixture
def made(recording, monkeypatch):
    monkeypatch.setattr(application, "load_recording", lambda name, folder: recording)
    monkeypatch.setattr(application, "QUICK_HIDDEN", HIDDEN)
    monkeypatch.setattr(application, "QUICK", Recipe(steps=20, tune=3, rate=1e-3, rows=32, pairs=8))
    return Settings("wear", quick=True)


FILES = {
    *("settings.json", "dense.safetensors", "dense.json", "stages", "sparse.safetensors", "structured.safetensors"),
    *("measured.png", "removed.png", "report.md", "report.json"),
}


def test_it_trains_prunes_and_reports(made, tmp_path):
    told = []
    report = build(made, "data", tmp_path / "out", progress=lambda *what: told.append(what))
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert told[0] == (0, 8, "dense network")
    assert told[-1] == (8, 8, "done")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [stage["accepted"] for stage in report["stages"]] == [True] * 4
    assert report["structured_difference"] < 1e-9
    assert report["networks"]["structured"]["removed"] >= 0.6
    page = (tmp_path / "out" / "report.md").read_text()
    assert "one network per quantity" in page
    assert "A quick run" in page
    assert "µm/s per (force × speed, N)" in page
    assert "network.2.weight" in page
    assert "## A new tool" in page
    assert "## A new" not in application.page({**report, "new_tools": []})
    (found,) = report["new_tools"]
    assert (found["group"], found["rest"]) == (5, 28)
    assert found["adapted"] != found["before"] != found["retrained"]
    assert f"| 5 | 28 | {found['before']:.3g} | {found['adapted']:.3g} | {found['retrained']:.3g} |" in page


def test_a_run_goes_on_and_ends_alike(made, tmp_path, monkeypatch):
    whole = build(made, "data", tmp_path / "whole")
    calls = []

    def stop(done, total, what):
        calls.append(what)
        if what == "stage 3: to 59.46 %":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(made, "data", tmp_path / "out", progress=stop)
    monkeypatch.setattr(application, "dense_twin", None)  # not trained again
    again = []
    found = build(made, "data", tmp_path / "out", progress=lambda *what: again.append(what[2]))
    assert again[1] == "resumed after stage 2"
    for name in ("dense", "sparse", "structured"):
        assert found["networks"][name]["r2"] == whole["networks"][name]["r2"]
        one, other = ((tmp_path / folder / f"{name}.safetensors").read_bytes() for folder in ("out", "whole"))
        assert one == other


def test_what_it_refuses(made, tmp_path):
    with pytest.raises(ValueError, match=r"reaches only 53\.8 %"):
        build(dataclasses.replace(made, stages=(0.2, 0.2, 0.15, 0.15)), "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build(made, "data", tmp_path / "out")
    with pytest.raises(ValueError, match=r"other settings \(seed, sparsity\)"):
        build(dataclasses.replace(made, sparsity=0.5, seed=1), "data", tmp_path / "out")


def test_without_physics_the_page_says_so(made, tmp_path):
    build(dataclasses.replace(made, physics=False, max_drop=0.5), "data", tmp_path / "out")
    assert "No law of physics" in (tmp_path / "out" / "report.md").read_text()


def test_rows_of_all_ways_and_their_table(data, tmp_path):
    rows = []
    for seed in (0, 1):
        for physics in (False, True):
            found, twins = quantity_rows(data, RECIPE, seed, physics=physics, hidden=HIDDEN)
            assert [row.way for row in found] == list(WAYS) == list(twins)
            assert all(0.55 < row.sparsity < 0.9 for row in found[1:])
            rows += found
    for row in rows:
        add(tmp_path, row)
    back = Results.read(tmp_path)
    assert back.twins == rows
    assert main_table(back.twins).count("±") == 2 * len(WAYS) * 2
    assert "sparse, with physics" in tables(back, {}, {})
    assert jobs(["wear"], [], 2, back)[0][0] == Job("known_tools", "wear", 3)
    assert Job("twins", "wear", 2) in jobs(["wear"], [], 3, back)[0]


def test_spread_and_pooled_r2():
    assert spread([]) == "–"
    # groups (0, 2) and (4): errors 1 and 1 + 0 → 1 − 2 / 8
    assert pooled_r2([1.0, 1.0], [2, 1], [0.0, 2.0, 4.0]) == pytest.approx(1 - 2 / 8)
    with pytest.raises(ValueError, match="each group"):
        pooled_r2([1.0], [2], [0.0])


def test_packed_rows_give_the_masked_result():
    network = dense_network(6, 2, (16, 8))
    with torch.no_grad():
        for layer in network[::2]:
            layer.weight[torch.rand_like(layer.weight) < 0.7] = 0
    x = torch.randn(5, 6)
    assert torch.allclose(packed(network)(x), network(x), atol=1e-6)


def test_latencies_are_medians_of_every_call():
    def call(seconds):
        time.sleep(seconds)

    found = latencies({"short": lambda: call(0.001), "long": lambda: call(0.02)}, rounds=3)
    assert 0.001 <= found["short"] < found["long"]
    assert found["long"] >= 0.02
    with pytest.raises(ValueError, match="at least one thing to time"):
        latencies({})


def test_a_field_learns(monkeypatch):
    """Heat u_t = 0.1 u_xx from sin πx: exp(−0.1 π² t) sin πx, a solution in closed form."""
    from resu.experiments.spinn.fields import derivative

    heat = dataclasses.replace(
        FIELDS["burgers"],
        residual=lambda u, t, x: derivative(u, t) - 0.1 * derivative(derivative(u, x), x),
        initial=lambda x: torch.sin(torch.pi * x),
    )
    field = Field(heat, (12, 12))
    t, x = torch.linspace(0, 1, 6, dtype=torch.float64), torch.linspace(-1, 1, 21, dtype=torch.float64)
    exact = torch.exp(-0.1 * torch.pi**2 * t)[:, None] * torch.sin(torch.pi * x)
    before = relative_error(field, (t, x, exact))
    train_field(field, adam=20, lbfgs=60, rows=128)
    after = relative_error(field, (t, x, exact))
    assert after < 0.02 < before

"""`resu spinn`: what it writes, how it goes on, and what it refuses."""

import json
import re

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from resu.experiments.spinn import application
from tests.experiments.spinn.conftest import made_up
from tests.experiments.spinn.test_sparse import HIDDEN


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(application, "load_recording", lambda name, folder: made_up())
    monkeypatch.setattr(application, "QUICK_HIDDEN", HIDDEN)


def test_it_writes_a_report_and_does_not_overwrite(resu, refused, made, tmp_path):
    out = tmp_path / "twin"
    command = ("spinn", "wear", "--data", tmp_path, "--out", out, "--quick")
    result = resu(*command)
    assert result.exit_code == 0, result.output
    assert "learned k:" in result.stdout
    # Counts are whole: a network this small cannot reach 70.0 % of each layer.
    assert re.search(r"stages: 2\d\.\d %, 4\d\.\d %, 59\.\d %, 69\.\d %", result.stdout)
    before = (out / "report.md").read_bytes()
    assert "holds results already; pass --resume to go on with a run; pass --force" in refused(*command)
    assert (out / "report.md").read_bytes() == before
    assert "other settings (seed)" in refused(*command, "--resume", "--seed", "1")
    again = resu(*command, "--resume", "--json")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["out"] == str(out)
    assert document["networks"]["sparse"]["widths"] == list(HIDDEN)
    fresh = resu(*command, "--force", "--seed", "1", "--json")
    assert json.loads(fresh.stdout)["settings"]["seed"] == 1


def test_bad_input_is_one_line(refused, tmp_path, monkeypatch):
    out = tmp_path / "twin"
    given = ("spinn", "wear", "--data", tmp_path, "--out", out)
    assert "QUANTITY must be one of wear, milling, thermal, got 'heat'" in refused("spinn", "heat", "--out", out)
    line = refused(*given, "--stages", "0.2,0.2,0.15,0.15")
    assert "reaches only 53.8 %, not 70 %" in line
    assert "--stages is a number" in refused(*given, "--stages", "four")
    assert "--sparsity must" in refused(*given, "--sparsity", "much")
    assert "tool_wear_vicomtech.npz is not there" in refused(*given)
    monkeypatch.delenv("RESU_DATA", raising=False)
    assert "where is the data? Pass --data, or set RESU_DATA" in refused("spinn", "wear", "--out", out)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refused("spinn", "wear", "--data", tmp_path, "--out", tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    assert "holds results already" in refused("spinn", "wear", "--data", tmp_path, "--out", tmp_path / "other")

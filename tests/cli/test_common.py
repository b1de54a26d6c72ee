"""Values, folders and files of the command line."""

import json
import math
import os

import pytest

pytest.importorskip("typer")
from resu.cli import _common
from resu.cli._common import CliError


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.5", 0.5), (".95", 0.95), ("1e-3", 0.001)])
def test_sparsity_is_read(text, value):
    assert _common.parse_sparsity(text) == value


@pytest.mark.parametrize("text", ["-0.1", "1.0", "1", "0.5abc", "nan", "inf", "", "80", "80%", "None"])
def test_what_is_no_sparsity_is_refused(text):
    with pytest.raises(CliError, match=r"--sparsity must .*\[0, 1\)"):
        _common.parse_sparsity(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("16GB", 16 * 10**9), ("16 gib", 16 * 2**30), ("512M", 512 * 10**6), ("1.5KiB", 1536), ("100", 100)],
)
def test_memory_is_read(text, value):
    assert _common.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "nan", "inf", "16XB", "16 G G", "1e400"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(CliError, match="--memory must be"):
        _common.parse_bytes(text)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_400, "999 kB"),
        (999_900, "1 MB"),
        (6_738_415_616, "6.74 GB"),
    ],
)
def test_bytes_are_written(n, text):
    assert _common.format_bytes(n) == text


def test_json_has_no_nan(capsys):
    _common.print_json({"a": math.nan, "b": [math.inf, 1.5], 0.5: (True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "0.5": [True, None]}


def test_a_folder_with_files_is_not_taken_without_force(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CliError, match="--force"):
        _common.output_folder(tmp_path, force=False)
    assert _common.output_folder(tmp_path, force=True) == tmp_path
    assert os.listdir(tmp_path) == ["mine"]


def test_an_empty_or_new_folder_is_taken(tmp_path):
    assert _common.output_folder(tmp_path, force=False) == tmp_path
    assert _common.output_folder(tmp_path / "a" / "b", force=False).is_dir()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CliError, match="--out"):
            _common.output_folder(path, force=True)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _common.write_whole(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]

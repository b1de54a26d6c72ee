"""The frame of the command line: help, version, usage errors, missing dependencies."""

import subprocess
import sys

import pytest

pytest.importorskip("typer")
from resu.cli._app import COMMANDS


def python(code, *args, **options):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, **options)


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)], ids=lambda args: " ".join(args))
def test_every_help_has_an_example(resu, args):
    result = resu(*args, "--help")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"Example: resu {' '.join(args)}".strip() in result.stdout


def test_without_arguments_there_is_help(resu):
    result = resu()
    assert result.exit_code == 0
    assert all(name in result.stdout for name in COMMANDS)


def test_version(resu):
    from resu import __version__

    assert resu("--version").stdout.strip() == f"resu {__version__}"


@pytest.mark.parametrize("args", [("quickstrat",), ("plan", "--nope"), ("inspect",), ("quickstart", "--seeds", "x")])
def test_usage_errors_are_one_line(refused, args):
    refused(*args)


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = """
import sys
from resu.cli.main import main
sys.argv = ["resu", "quickstart", "--help"]
try:
    main()
except SystemExit as done:
    assert done.code == 0, done.code
heavy = {"torch", "numpy", "matplotlib", "sklearn", "scipy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_dependencies_it_names_the_extra(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from resu.cli.main import main
main()
"""
    done = python(code)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert 'pip install "resu-torch[cli]"' in done.stderr


def test_as_a_process_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "resu.cli.main", "inspect", "absent.safetensors"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "absent.safetensors" in done.stderr


def test_the_traceback_is_there_for_those_who_ask(resu, monkeypatch):
    monkeypatch.setenv("RESU_TRACEBACK", "1")
    from resu.cli._common import CliError

    with pytest.raises(CliError):
        resu("plan", "--sparsity", "2", "--layers", "8x8")


def test_an_interrupt_is_one_line(resu, monkeypatch):
    from resu.cli import plan

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "parse_layers", stop)
    result = resu("plan", "--layers", "8x8")
    assert result.exit_code == 130
    assert result.stderr == "resu: interrupted\n"


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "resu.cli.main", "plan", "--layers", "8x8", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert error == ""

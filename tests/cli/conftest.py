"""The command line as a user meets it, in this process."""

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from resu.cli._app import build_app
from tests.integrations.conftest import stories, texts  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def resu():
    """`resu("plan", "--json")` gives exit code, stdout and stderr."""
    app, runner = build_app(), CliRunner()

    def call(*args):
        result = runner.invoke(app, [str(arg) for arg in args], prog_name="resu")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def refused(resu):
    """Runs a command that must be refused; returns the one line that says why."""

    def call(*args):
        result = resu(*args)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        line, end, rest = result.stderr.partition("\n")
        assert (end, rest) == ("\n", ""), f"not one line:\n{result.stderr}"
        assert line.startswith("resu: ")
        assert "Traceback" not in line
        return line

    return call

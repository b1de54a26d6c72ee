"""`import resu` is cheap, and no module but the command line and the experiments needs more than the core."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
OPTIONAL = {"matplotlib", "rich", "typer", "sklearn", "scipy", "PIL", "transformers", "peft"}
OPTIONAL |= {"accelerate", "lightning", "pytorch_lightning", "torchmetrics"}
USES_OPTIONAL = ("resu.cli", "resu.experiments", "resu.integrations")


def loaded_by(code: str) -> set[str]:
    """The modules a fresh interpreter holds after running the code."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def module_names() -> list[str]:
    """Every module of the package, found by its file."""
    names = []
    for file in sorted((SRC / "resu").rglob("*.py")):
        parts = file.relative_to(SRC).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.endswith("__main__")]


def top(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.fixture(scope="module")
def torch_modules() -> set[str]:
    return loaded_by("import torch, json")


def test_import_resu_loads_no_more_than_torch_and_itself(torch_modules):
    loaded = loaded_by("import resu")
    beyond = {m for m in loaded - torch_modules if m.partition(".")[0] not in sys.stdlib_module_names}
    assert {m for m in beyond if m.partition(".")[0] != "resu"} == set()
    own = {m for m in loaded if m.partition(".")[0] == "resu"}
    assert len(loaded - own) <= len(torch_modules) + 20, "import resu pulls in much of the standard library"


def test_import_resu_touches_no_optional_dependency():
    loaded = loaded_by("import resu")
    assert top(loaded) & OPTIONAL == set()
    assert "torch._dynamo" not in loaded


def test_modules_below_the_command_line_load_no_optional_dependency():
    names = [name for name in module_names() if not name.startswith(USES_OPTIONAL)]
    loaded = loaded_by("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert top(loaded) & OPTIONAL == set()


def test_the_other_modules_import_or_miss_only_an_optional_dependency():
    names = [name for name in module_names() if name.startswith(USES_OPTIONAL)]
    # An ImportError that names one of resu's own modules is a mistake, and so is any other error.
    loaded_by(
        "import importlib\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        if (error.name or 'resu').partition('.')[0] == 'resu': raise\n"
    )

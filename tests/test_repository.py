"""What the project says of itself agrees with itself: pins, commands, extras."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def project(repo):
    return tomllib.loads((repo / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repo):
    lines = (repo / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_pin_is_one_exact_version_and_nothing_else(pins):
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"not a plain pin: {line}"


def test_every_declared_dependency_is_pinned_to_a_version_it_allows(project, pins):
    versions = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in pins}
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    for requirement in map(Requirement, project["dependencies"] + extras):
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(project["name"]):
            assert name in versions, f"{name} is declared but not pinned in constraints.txt"
            assert versions[name] in requirement.specifier, f"{name} is pinned outside what is declared"


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_readme_has_each_command_once_and_pinned(repo, name):
    found = re.findall(rf"<!-- command: {name} -->\n```bash\n(.+)\n```", (repo / "README.md").read_text())
    assert len(found) == 1, f"README.md needs one command marked {name!r}, on one line"
    assert "-c constraints.txt" in found[0]

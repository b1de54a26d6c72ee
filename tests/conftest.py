"""What all tests share: real data, the GPU switch, threads, and the profile of property tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent

# Under pytest-xdist the workers share the cores, so each computes with one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A first call may compile or load something, so time says nothing about the code under test.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", **_common)
settings.register_profile("ci", derandomize=True, print_blob=True, **_common)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def default_data_dir() -> Path:
    """Where real data lies: `RESU_DATA`, or `shared/data` beside the repository."""
    return Path(os.environ.get("RESU_DATA") or REPO.parent / "shared" / "data")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("RESU_TEST_DEVICE"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    path = default_data_dir()
    if not path.is_dir():
        pytest.skip(f"no real data: {path} is no folder (set RESU_DATA)")
    return path


@pytest.fixture(scope="session")
def data_folder(data_dir):
    """`data_folder("fashion_mnist")`: one data set's folder; the test is skipped where it is absent."""

    def folder(name: str) -> Path:
        path = data_dir / name
        if not path.is_dir():
            pytest.skip(f"no data set {name!r} in {data_dir} (set RESU_DATA)")
        return path

    return folder


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO

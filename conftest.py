"""Runs the Python blocks of README.md and docs/*.md as tests, each page in one namespace.

A block that cannot run in a test is preceded by `<!--- skip: next -->`. Other languages are not run.
"""

import os
import random
import tempfile
from pathlib import Path

# Tests that run beside each other share the cores: one thread each, in the processes they start too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

collect_ignore = ["docs/conf.py", "docs/_ext", "docs/_build"]


def _in_scratch_folder(namespace):
    # A page may write files; its own namespace carries what the teardown needs.
    namespace["_home"] = os.getcwd()
    namespace["_scratch"] = tempfile.TemporaryDirectory(prefix="resu-page-")
    os.chdir(namespace["_scratch"].name)


def _back_home(namespace):
    os.chdir(namespace["_home"])
    namespace["_scratch"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/methods/*.md"],
    path=str(Path(__file__).parent),
    setup=_in_scratch_folder,
    teardown=_back_home,
).pytest()


@pytest.fixture(autouse=True)
def _deterministic():
    """Every test, doctest and page starts from one random state and leaves torch's defaults as found."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)

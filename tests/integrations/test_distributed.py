"""Two processes in the real libraries: ranks agree, and resume bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for library in ("transformers", "accelerate", "lightning"):
    pytest.importorskip(library)


@pytest.mark.slow
def test_ranks_agree_and_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.integrations.distributed_run", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.glob("*/done*"))) == 8

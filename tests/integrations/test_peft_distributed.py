"""The PEFT methods under DDP and FSDP2, in two processes: gradients are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for library in ("transformers", "peft"):
    pytest.importorskip(library)


@pytest.mark.slow
def test_gradients_are_those_of_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.integrations.peft_distributed_run", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.iterdir())) == 12

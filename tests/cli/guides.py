"""Runs the shell blocks of a guide as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run_guide(page, folder, data, timeout):
    """Every bash block of docs/PAGE that is marked, in one shell in `folder`; the blocks, and how it ended."""
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- runs in CI -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RESU_DATA": str(data),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return blocks, done

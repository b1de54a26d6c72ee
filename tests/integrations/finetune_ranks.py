"""What each of two processes does in `test_finetune_run.py`, under torchrun with gloo."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resu.integrations.finetune import run as run_file
from resu.integrations.finetune.callbacks import Interrupts
from resu.integrations.finetune.run import Interrupted, finetune
from tests.integrations.test_finetune_run import settings


class OneHears(Interrupts):
    """The second process hears an interrupt; both stop after the same step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)


def main(place: Path, folder: Path, method: str) -> None:
    config = settings(place, method, "bert", steps=10)
    report = finetune(config, folder / "whole")
    every: list[Any] = [None, None]
    dist.all_gather_object(every, report["evaluation"])
    assert every[0] == every[1], every
    run_file.Interrupts = OneHears  # type: ignore[misc]
    try:
        finetune(config, folder / "parts")
    except Interrupted as stop:
        assert "after step 8 of 10" in str(stop)  # noqa: PT017
    else:
        raise AssertionError("it was not stopped")
    run_file.Interrupts = Interrupts  # type: ignore[misc]
    torch.manual_seed(dist.get_rank())
    dist.barrier()
    finetune(config, folder / "parts", resume=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(250, exit=True)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    dist.barrier()
    dist.destroy_process_group()

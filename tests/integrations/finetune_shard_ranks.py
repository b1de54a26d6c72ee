"""What each of two processes does in `test_finetune_shard.py`, under torchrun with gloo."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from resu.core.sharding import is_sharded, local
from resu.integrations.finetune import run as run_file
from resu.integrations.finetune.callbacks import Interrupts
from resu.integrations.finetune.run import Interrupted, finetune
from resu.training.wrappers import plain_optimizer
from tests.integrations.finetune_shard_settings import settings

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Watches(Interrupts):
    """Notes how much of what trains, and of the optimizer's state, lies here; and stops where it is told to."""

    stop = -1
    held: dict[str, int]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        optimizer = plain_optimizer(kwargs["optimizer"])
        moments = [v for s in optimizer.state.values() for k, v in s.items() if k in MOMENTS]
        assert all(p.grad is None for p in trained)
        Watches.held = {
            "here": sum(local(p).numel() for p in trained if is_sharded(p)),
            "all": sum(p.numel() for p in trained if is_sharded(p)),
            "whole": sum(p.numel() for p in trained if not is_sharded(p)),
            "moments": sum(local(v).numel() for v in moments),
        }
        if state.global_step == self.stop:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step


def main(place: Path, folder: Path, names: list[str]) -> None:
    run_file.Interrupts = Watches  # type: ignore[misc]
    for name in names:
        Watches.stop = -1
        report = finetune(settings(place, name, shard=True), folder / name)
        held = {**Watches.held, "evaluation": report["evaluation"]}
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(held))
        Watches.stop = 3
        try:
            finetune(settings(place, name, shard=True), folder / f"{name}-parts")
        except Interrupted as stop:
            assert "after step" in str(stop)  # noqa: PT017
        else:
            raise AssertionError("it was not stopped")
        Watches.stop = -1
        finetune(settings(place, name, shard=True), folder / f"{name}-parts", resume=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(250, exit=True)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
    dist.barrier()
    dist.destroy_process_group()

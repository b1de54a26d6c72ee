"""How the processes of a run were started, and what of it is done here instead of in accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from resu.integrations.finetune.config import FinetuneConfig

__all__ = ["as_launched", "own_sharding", "processes"]

_FSDP = "ACCELERATE_USE_FSDP"


def processes() -> int:
    """How many processes torchrun or ``accelerate launch`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def as_launched(config: FinetuneConfig) -> FinetuneConfig:
    """The settings, with ``shard`` where ``accelerate launch --use_fsdp --fsdp_version 2`` asks for it.

    Raises:
        ValueError: Under DeepSpeed or FSDP1, and where there is one process only, or several that update in backward.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "fine-tuning under DeepSpeed is not supported: it steps by itself, and masks are held around the steps of "
            "an optimizer of torch. Use torchrun, with --shard to divide the model (FSDP2)"
        )
    if _is_set(_FSDP):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(
                f"fine-tuning under FSDP{version} is not supported: its flat parameters have no place for masks. Use "
                "accelerate launch with --fsdp_version 2, or torchrun and --shard"
            )
        config = replace(config, shard=True)
    if config.shard and processes() < 2:
        raise ValueError(
            "shard divides the model over processes, and there is one: start several with torchrun --nproc-per-node N, "
            "or leave it out"
        )
    if config.in_backward and processes() > 1 and not config.shard:
        raise ValueError(
            "in-backward would use the gradient of each process alone, before the others' is added; use shard, one "
            "process or the plain optimizer"
        )
    return config


@contextmanager
def own_sharding() -> Iterator[None]:
    """Without accelerate's and transformers' own FSDP, which would load and divide the model in another way."""
    asked = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_FSDP] = asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")

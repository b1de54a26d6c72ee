"""A prepared model divided by FSDP2 on a CUDA device (one rank of NCCL), trained a step and made whole again.

``RESU_TEST_DEVICE=cpu`` runs it elsewhere, to check the test itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from resu.core.sharding import is_sharded
from resu.integrations.finetune.batches import Collator
from resu.integrations.finetune.masks import settle_masks, target_names
from resu.integrations.finetune.model import load_for_task
from resu.integrations.finetune.optimizers import make_optimizer, trained
from resu.integrations.finetune.prepared import prepare
from resu.integrations.finetune.sharding import shard
from tests.integrations.finetune_shard_settings import make_place, settings

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("RESU_TEST_DEVICE", "cuda"))
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "masked": {"optimizer": "adamw8bit"},
    "lora": {},
    "sparse-lora": {"bits": 4},
    "resu": {"commit": "sparse"},
    "qresu": {"theta_dtype": "bfloat16", "train_norms": False},
    "qresu-selective": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("shard"))


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stepped(place: Path, method: str, divided: bool) -> dict[str, torch.Tensor]:
    changes: dict[str, Any] = {"kind": "llama", "accumulate": 1, "optimizer": "adamw", **METHODS[method]}
    kind = changes.pop("kind")
    config = settings(place, method, **changes, source=place / kind, data=place / "words.txt", task="causal-lm")
    loaded = load_for_task(config.source, "causal-lm")
    collator = Collator(loaded.tokenizer, "causal-lm")
    masks = settle_masks(loaded, config, [], collator) if config.masks else {}
    torch.manual_seed(0)
    prepared = prepare(loaded, masks, target_names(loaded, config)[0], config)
    model = prepared.model
    classes = [type(module) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    sharding = shard(prepared, DEVICE) if divided else None
    if sharding is None:
        model.to(DEVICE)
    assert all(tensor.device.type == DEVICE.type for tensor in model.state_dict().values() if tensor.numel())
    own = [p for layer in prepared.self_updating if (p := layer.theta) is not None]
    optimizer = make_optimizer(trained(model, own), config)
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(5, 23, (2, 9), device=DEVICE)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if sharding is not None:
        sharding.gather()
        assert not any(is_sharded(tensor) for tensor in model.state_dict().values())
        assert [type(module) for module in model.modules()] == classes
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    model.to("cpu")
    plain, kept = prepared.finish()
    for name, mask in kept.items():
        assert not plain.get_parameter(name)[~mask.mask].any()
    return {name: value.detach() for name, value in plain.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_divided_and_whole_again_is_as_never_divided(place: Path, method: str) -> None:
    expected, found = stepped(place, method, divided=False), stepped(place, method, divided=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)

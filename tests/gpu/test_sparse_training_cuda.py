"""Every training rule on a CUDA device: masks as on the CPU, exact zeros, AMP, compile, one NCCL rank.

``RESU_TEST_DEVICE=cpu`` runs them elsewhere, to check the tests themselves.
"""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from resu.training import RigL, Sparsifier
from resu.training.algorithms import algorithms
from tests.conformance.test_algorithms import PATTERNS, rule_of
from tests.training.helpers import batches, convnet, loss_of, mlp

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("RESU_TEST_DEVICE", "cuda")


def zeros_are_exact(model: nn.Module, sparsifier: Sparsifier) -> None:
    for name, mask in sparsifier.masks.items():
        pruned = mask.get_pruned(model.get_parameter(name).detach())
        assert torch.equal(pruned, torch.zeros_like(pruned)), name
        assert not torch.signbit(pruned).any(), name


@pytest.mark.parametrize("name", algorithms)
def test_masks_equal_those_of_the_cpu(name: str) -> None:
    masks = []
    for device in ("cpu", DEVICE):
        model = mlp().double().to(device)  # float64: no choice hangs on the order of sums
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        sparsifier = Sparsifier(model, optimizer, rule_of(name), pattern=PATTERNS.get(name))
        for x, y in batches(12):
            optimizer.zero_grad()
            loss_of(model, (x.double().to(device), y.to(device))).backward()
            optimizer.step()
        zeros_are_exact(model, sparsifier)
        masks.append({n: mask.mask.cpu() for n, mask in sparsifier.masks.items()})
    for key, mask in masks[0].items():
        assert torch.equal(mask, masks[1][key]), key


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", algorithms)
def test_trap_21_fp16_with_an_injected_infinity(name: str, fused: bool) -> None:
    model = convnet().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    sparsifier = Sparsifier(model, optimizer, rule_of(name), pattern=PATTERNS.get(name))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    for i, (x, y) in enumerate(batches(12, image=True)):
        before = sparsifier.masks
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
            loss = loss_of(model, (x.to(DEVICE), y.to(DEVICE)))
        scaler.scale(loss).backward()
        if i == 5:
            model[0].weight.grad[0, 0, 0, 0] = torch.inf  # type: ignore[index,union-attr]
        scaler.step(optimizer)
        scaler.update()
        if i == 5:
            assert sparsifier.step == 5
            assert sparsifier.masks == before
        zeros_are_exact(model, sparsifier)
    assert sparsifier.step == 11


@pytest.mark.parametrize("name", algorithms)
def test_trap_27_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = mlp().to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        return model, optimizer, Sparsifier(model, optimizer, rule_of(name), pattern=PATTERNS.get(name))

    def go(run: tuple[nn.Module, torch.optim.Optimizer, Sparsifier], begin: int, end: int) -> None:
        for x, y in batches(12)[begin:end]:
            run[1].zero_grad()
            loss_of(run[0], (x.to(DEVICE), y.to(DEVICE))).backward()
            run[1].step()

    whole = build()
    go(whole, 0, 5)
    torch.save([part.state_dict() for part in whole], tmp_path / "state.pt")
    go(whole, 5, 12)
    again = build()
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    go(again, 5, 12)
    for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole[2].masks == again[2].masks


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")  # of the compiler
def test_under_compile_and_autocast() -> None:
    model = mlp().to(DEVICE)
    compiled = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    sparsifier = Sparsifier(compiled, optimizer, RigL(sparsity=0.9, interval=2))  # type: ignore[arg-type]
    for x, y in batches(8):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = nn.functional.cross_entropy(compiled(x.to(DEVICE)), y.to(DEVICE))
        loss.backward()
        optimizer.step()
    zeros_are_exact(model, sparsifier)
    assert sparsifier.report().explored > 0.11  # something was grown


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_of_nccl_equals_no_ranks(kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = mlp().to(DEVICE)
    model = copy.deepcopy(plain)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        run: nn.Module = model
        if kind == "ddp":
            run = nn.parallel.DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=init_device_mesh(DEVICE, (1,)))
        results = []
        for network, call in ((plain, plain), (model, run)):
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
            sparsifier = Sparsifier(call, optimizer, RigL(sparsity=0.8, interval=2))
            for x, y in batches(10):
                optimizer.zero_grad()
                nn.functional.cross_entropy(call(x.to(DEVICE)), y.to(DEVICE)).backward()
                optimizer.step()
            results.append(sparsifier.masks)
        assert results[0] == results[1]
    finally:
        dist.destroy_process_group()


def test_eight_bit_state_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 5)).to(DEVICE)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=1)
    sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.8, interval=2))
    for i in range(8):
        torch.manual_seed(i)
        optimizer.zero_grad()
        loss_of(model, (torch.randn(16, 128, device=DEVICE), torch.randint(5, (16,), device=DEVICE))).backward()
        optimizer.step()
        zeros_are_exact(model, sparsifier)
    weight = model[0].weight
    state, pruned = optimizer.state[weight], ~sparsifier.masks["0.weight"].mask
    assert state["qmap1"][state["state1"][pruned].long()].eq(0).all()

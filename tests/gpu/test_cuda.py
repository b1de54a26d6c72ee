"""The same promises on a CUDA device. ``RESU_TEST_DEVICE=cpu`` runs them elsewhere, to check the tests themselves."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from resu import RESULinear, RESUMode, resurrection_parameters
from resu.core.counting import positions, top_k_mask
from resu.core.mask import SparseMask, pack_bits, unpack_bits
from resu.modules.conv import RESUConv2d
from resu.training import RESU, Magnitude, RESUConfig, RESUTrainer, Sparsifier, Static
from tests.training.helpers import batches, convnet, loss_of, mlp

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("RESU_TEST_DEVICE", "cuda")


def enter(layer: RESULinear | RESUConv2d, mode: str) -> None:
    if mode == "dense":
        return
    layer.prune_by_magnitude(0.6)
    if mode == "resu":
        layer.enter_resu_mode(0.1)
    elif mode in ("qresu4", "qresu8"):
        layer.enter_qresu_mode(int(mode[-1]), 0.1)
    elif mode == "selective":
        layer.enter_qresu_selective_mode(4, 0.1, lr=0.1)


def test_trap_05_more_positions_than_int_max() -> None:
    if DEVICE == "cpu":
        pytest.skip("nonzero is limited on CUDA only")
    n = 2**31 + 100
    bits = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    bits[[5, 2**30, n - 1]] = True
    assert positions(bits).tolist() == [5, 2**30, n - 1]


@pytest.mark.parametrize("n", [100, 70_000, 5_000_000])
def test_selection_and_packing_equal_the_cpu(n: int) -> None:
    scores = torch.randn(n).bfloat16().float()  # many ties
    for keep in (1, n // 10, n // 2, n - 1):
        mask = top_k_mask(scores.to(DEVICE), keep)
        assert torch.equal(mask.cpu(), top_k_mask(scores, keep))
        bits = pack_bits(mask.view(-1, 10))
        assert torch.equal(bits.cpu(), pack_bits(mask.cpu().view(-1, 10)))
        assert torch.equal(unpack_bits(bits, (n // 10, 10)).flatten(), mask)


@pytest.mark.parametrize("mode", ["dense", "sparse", "resu", "qresu4", "qresu8", "selective"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_forward_and_gradients_equal_the_cpu(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    cpu: RESULinear | RESUConv2d
    if kind == "linear":
        cpu, x = RESULinear(96, 64, dtype=torch.float64), torch.randn(32, 96, dtype=torch.float64)
    else:
        cpu, x = RESUConv2d(8, 16, 3, dtype=torch.float64), torch.randn(4, 8, 9, 9, dtype=torch.float64)
    enter(cpu, mode)
    gpu = copy.deepcopy(cpu).to(DEVICE)
    assert gpu.mode is cpu.mode
    for _ in range(2):
        a = x.clone().requires_grad_()
        b = x.detach().to(DEVICE).requires_grad_()
        y, z = cpu(a), gpu(b)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(z.cpu(), y)
        torch.testing.assert_close(b.grad.cpu(), a.grad)
        for p, q in zip(cpu.parameters(), gpu.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(q.grad.cpu(), p.grad)
    torch.testing.assert_close(gpu.effective_weight().detach().cpu(), cpu.effective_weight().detach())


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"capturable": True}])
def test_frozen_weights_keep_their_bits(options: dict[str, bool]) -> None:
    if options.get("capturable") and DEVICE == "cpu":
        pytest.skip("capturable optimizers need a CUDA device")
    torch.manual_seed(0)
    layer = RESULinear(64, 32, device=DEVICE)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.3, **options)
    for _ in range(3):
        layer(torch.randn(8, 64, device=DEVICE)).square().sum().backward()
        optimizer.step()
    layer.prune_by_magnitude(0.5)
    active = layer.active_values().clone()
    layer.enter_resu_mode(0.1)
    theta = layer.theta_values().clone()
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(8, 64, device=DEVICE)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.active_values(), active)
    assert not torch.equal(layer.theta_values(), theta)
    layer.exit_resu_mode(commit=True)


@pytest.mark.parametrize(
    "rule",
    [
        Static(sparsity=0.9),
        Magnitude(sparsity=0.9, end_step=12, interval=3),
        RESU(sparsity=0.9, initial_sparsity=None, end_step=12),
    ],
    ids=lambda r: type(r).__name__,
)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_masks_hold_under_autocast_and_scaler(rule: object, half: torch.dtype) -> None:
    model = mlp().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    sparsifier = Sparsifier(model, optimizer, rule)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(DEVICE, enabled=half is torch.float16)
    for x, y in batches(20):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=half):
            loss = loss_of(model, (x.to(DEVICE), y.to(DEVICE)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.sparsity == 0.9
    for name, mask in sparsifier.masks.items():
        assert mask.device.type == torch.device(DEVICE).type
        assert (model.get_parameter(name)[~mask.mask] == 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_random_choices_are_the_same_on_every_device(seed: int) -> None:
    masks = []
    for device in ("cpu", DEVICE):
        model = mlp().to(device)
        masks.append(
            Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.9), seed=seed).masks
        )
    assert {n: m.to("cpu") for n, m in masks[1].items()} == masks[0]


@pytest.mark.parametrize("bits", [None, 4])
def test_cycles_end_exact(bits: int | None) -> None:
    model = convnet().to(DEVICE)
    config = RESUConfig(
        target_sparsity=0.8, num_cycles=2, steps_per_cycle=10, use_selective=False, quantize_bits=bits, resu_lr=0.01
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = RESUTrainer(model, config, optimizer, loss_of, progress=False)
    trainer.train([(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(7, image=True)])
    total = sum(layer.weight.numel() for layer in trainer.layers.values())
    zeros = sum(int((layer.weight[~layer.mask.mask] == 0).sum()) for layer in trainer.layers.values())
    assert zeros == int(total * 0.8)
    assert all(layer.mode is RESUMode.SPARSE for layer in trainer.layers.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")  # of the compiler
@pytest.mark.parametrize("mode", ["resu", "qresu4", "selective"])
def test_compiled_layers_give_the_same_results(mode: str) -> None:
    torch.manual_seed(0)
    layer = RESULinear(64, 64, device=DEVICE)
    enter(layer, mode)
    x = torch.randn(16, 64, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x))


@pytest.mark.skipif(DEVICE == "cpu", reason="the allocator's peak is a CUDA figure")
def test_a_qresu_backward_has_no_dense_gradient() -> None:
    width = 4096
    layer = RESULinear(width, width, device=DEVICE, bias=False)
    layer.prune_by_magnitude(0.5)
    layer.enter_qresu_mode(4)
    x = torch.randn(32, width, device=DEVICE, requires_grad=True)
    loss = layer(x).square().sum()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    torch.cuda.synchronize()
    theta = 4 * layer.mask.n_pruned
    assert torch.cuda.max_memory_allocated() - before < theta + 0.5 * 4 * width * width
    assert resurrection_parameters(layer)[0].grad.numel() == layer.mask.n_pruned


def test_masks_move_with_the_model() -> None:
    mask = SparseMask.random((40, 30), 0.5, torch.Generator().manual_seed(0))
    moved = mask.to(DEVICE)
    x = torch.randn(40, 30, device=DEVICE)
    assert torch.equal(moved.apply(x).cpu(), mask.apply(x.cpu()))
    assert moved == mask
    assert moved.checksum() == mask.checksum()

"""Measured peaks: of programs whose peak is known, of operators' insides, and against the process's own."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

from resu.core.peak_memory import measure_memory, resident_memory
from resu.modules.linear import RESULinear

KIB = 1024


def test_a_chain_of_elementwise_operations_holds_two_at_a_time():
    x = torch.ones(KIB)  # 4 KiB, existed before
    with measure_memory() as used:
        y = x.neg()
        for _ in range(20):
            y = y.neg()  # old and new at once
    assert (used.peak, used.current) == (2 * 4 * KIB, 4 * KIB)


def test_what_an_operator_needs_inside_is_counted():
    x = torch.randn(8 * KIB)
    with measure_memory() as used:
        x.sort()  # 32 KiB of values, 64 KiB of indices, and what stable sorting needs inside
    assert used.peak >= 96 * KIB
    assert used.current == 0
    q = torch.randn(1, 2, 64, 32)
    with measure_memory() as used:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert used.peak > out.nbytes + 64 * 2 * 4  # the output, the sums of exponentials, and buffers per thread


def test_a_custom_operator_shows_its_tile():
    layer = RESULinear(512, 256, bias=False)
    layer.prune_by_magnitude(0.5)
    layer.enter_qresu_mode()
    x = torch.randn(2, 512)
    with measure_memory() as used:
        layer(x)
    tile = 256 * 512 * 4
    assert tile < used.peak < 3 * tile


def test_a_backward_pass_is_followed_into_its_gradients():
    layer = nn.Linear(128, 128, bias=False)
    x = torch.randn(4, 128)
    with measure_memory() as used:
        layer(x).sum().backward()
    assert used.current == layer.weight.grad.nbytes
    assert used.peak >= layer.weight.grad.nbytes + 4 * 128 * 4


def test_an_old_address_that_is_used_again_is_no_mistake():
    with measure_memory():
        kept = [torch.empty(KIB) for _ in range(50)]
    del kept
    again = [torch.empty(KIB) for _ in range(50)]
    with measure_memory() as used:
        del again  # older than the block, whatever was at these addresses before
        gc.collect()
        x = torch.empty(KIB)
    assert (used.peak, used.current) == (x.nbytes, x.nbytes)


def test_nothing_is_printed(capfd):
    with measure_memory():
        torch.ones(3)
    assert capfd.readouterr() == ("", "")


def test_an_error_in_the_block_is_the_users(capfd):
    with pytest.raises(KeyError, match="mine"), measure_memory():
        raise KeyError("mine")
    with measure_memory() as used:
        x = torch.ones(3)
    assert used.peak == x.nbytes
    assert capfd.readouterr().err == ""


def test_two_at_a_time_are_refused():
    with measure_memory(), pytest.raises(RuntimeError, match="stop it before"), measure_memory():
        pass
    with pytest.raises(ValueError, match="not on 'meta'"), measure_memory("meta"):
        pass


PROGRAM = """
import sys, torch
from resu.core.peak_memory import measure_memory, resident_memory
before = resident_memory()[1]
with measure_memory() as used:
    x = torch.ones(16 << 20)                    # 64 MiB
    for _ in range(int(sys.argv[1])):
        x = x * 2                               # 128 MiB
    big = [torch.ones(8 << 20) for _ in range(6)]  # 64 + 192 MiB
    del big
print(used.peak, used.resident, resident_memory()[1] - before)
"""


@pytest.mark.skipif(resident_memory() is None, reason="the system does not tell a process's peak")
def test_the_process_itself_agrees():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "3"], capture_output=True, text=True, check=True)
    peak, resident, grown = map(int, done.stdout.split())
    assert peak == 256 << 20
    assert resident == pytest.approx(peak, rel=0.05)
    assert grown == pytest.approx(peak, rel=0.05)

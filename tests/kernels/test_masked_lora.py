"""Operators with a masked weight and a low-rank delta: elementwise against dense autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from resu.core.mask import SparseMask
from resu.core.peak_memory import measure_memory
from resu.core.quantization import dequantize, pack_codes, quantize
from resu.core.resurrection import PackedRows, row_offsets
from resu.kernels import masked_weight
from resu.kernels.masked_lora import arguments, masked_lora_linear
from resu.kernels.masked_lora_conv import masked_lora_conv2d
from resu.kernels.masked_weight import RULES, MaskedWeight

DOUBLE, SINGLE, HALF, BRAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=[1 << 20, 20], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(masked_weight, "TILE", request.param)


def base_of(shape, dtype=DOUBLE, sparsity=0.5, seed=0):
    """A masked weight, its mask, and both as operators take them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) >= sparsity
    weight = torch.where(mask, torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype), 0)
    return MaskedWeight.dense(weight, SparseMask(mask).packed), weight, mask


def packed_of(weight, mask, bits):
    """The same, packed; and the values that the codes stand for."""
    q = quantize(weight, bits, "per_channel", mask)
    held = SparseMask(mask)
    codes = pack_codes(q.codes[mask], bits)
    columns = weight[0].numel()
    base = MaskedWeight.packed(PackedRows(codes, held.packed, q.scale, q.zero, row_offsets(held), columns, bits))
    return base, torch.where(mask, dequantize(q.codes, q.scale, q.zero), 0)


def effective(weight, mask, delta, rule):
    k = {"mask": mask.double(), "scale": weight.double(), "dense": torch.ones_like(weight, dtype=DOUBLE)}[rule]
    return weight.double() + k * delta.view(weight.shape)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(function, tensors, cotangent=None):
    """Result and gradients with respect to all tensors."""
    tensors = leaves(*tensors)
    y = function(*tensors)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if cotangent is None else cotangent)
    return [y.detach(), *[t.grad for t in tensors]]


def linear(base, rule, transposed):
    def call(x, a, b, bias):
        left, right = (a.t(), b.t()) if transposed else (b, a)
        return masked_lora_linear(x, base, left, right, bias, rule=rule, transposed=transposed)

    return call


TOLERANCE = {DOUBLE: 1e-12, SINGLE: 2e-5, HALF: 6e-3, BRAIN: 5e-2}


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF, BRAIN], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["out first", "in first"])
@pytest.mark.parametrize("rule", RULES)
def test_linear_equals_dense_autograd(rule, transposed, dtype, tile):
    n_out, n_in, r = 7, 13, 3
    base, weight, mask = base_of((n_in, n_out) if transposed else (n_out, n_in), dtype)
    x, a, b, bias = (torch.randn(s, dtype=DOUBLE).to(dtype) for s in [(2, 5, n_in), (r, n_in), (n_out, r), (n_out,)])
    found = run(linear(base, rule, transposed), (x, a, b, bias))

    def dense(x, a, b, bias):
        delta = (b @ a).t() if transposed else b @ a
        w = effective(weight, mask, delta, rule)
        return x @ (w if transposed else w.t()) + bias

    expected = run(dense, [t.double() for t in (x, a, b, bias)])
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rule", ["mask", "scale"])
def test_convolution_equals_dense_autograd(rule, groups, tile):
    base, weight, mask = base_of((8, 4 // groups, 3, 2))
    options = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": groups}
    x, a, b, bias = (torch.randn(s, dtype=DOUBLE) for s in [(2, 4, 5, 6), (3, 4 // groups * 6), (8, 3), (8,)])
    found = run(
        lambda x, a, b, c: masked_lora_conv2d(x, base, b, a, c, rule=rule, kernel=(3, 2), **options), (x, a, b, bias)
    )
    expected = run(lambda x, a, b, c: F.conv2d(x, effective(weight, mask, b @ a, rule), c, **options), (x, a, b, bias))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    one = masked_lora_conv2d(x[0], base, b, a, bias, rule=rule, kernel=(3, 2), **options)
    torch.testing.assert_close(one, found[0][0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_by_differences(rule, transposed, tile):
    base, _, _ = base_of((4, 6))
    n_out, n_in = (6, 4) if transposed else (4, 6)
    tensors = leaves(*(torch.randn(s, dtype=DOUBLE) for s in [(3, n_in), (2, n_in), (n_out, 2), (n_out,)]))
    assert torch.autograd.gradcheck(linear(base, rule, transposed), tensors)


@given(
    rows=st.integers(1, 20), columns=st.integers(1, 20), rank=st.integers(0, 4), batch=st.integers(0, 3),
    rule=st.sampled_from(RULES), transposed=st.booleans(), limit=st.integers(1, 200), sparsity=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape_in_any_tiles(rows, columns, rank, batch, rule, transposed, limit, sparsity):
    base, weight, mask = base_of((rows, columns), sparsity=sparsity)
    n_out, n_in = (columns, rows) if transposed else (rows, columns)
    x, a, b, bias = (torch.randn(s, dtype=DOUBLE) for s in [(batch, n_in), (rank, n_in), (n_out, rank), (n_out,)])
    w = effective(weight, mask, (b @ a).t() if transposed else b @ a, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_weight, "TILE", limit)
        found = run(linear(base, rule, transposed), (x, a, b, bias))
    torch.testing.assert_close(found[0], x @ (w if transposed else w.t()) + bias)
    assert [g.shape for g in found[1:]] == [x.shape, a.shape, b.shape, bias.shape]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_packed_base_is_its_dequantized_values(rule, bits, tile):
    _, weight, mask = base_of((7, 13), SINGLE)
    base, values = packed_of(weight, mask, bits)
    assert base.wide == SINGLE
    x, a, b, bias = (torch.randn(s) for s in [(5, 13), (3, 13), (7, 3), (7,)])
    found = run(linear(base, rule, False), (x, a, b, bias))
    expected = run(linear(MaskedWeight.dense(values, base.bitmask), rule, False), (x, a, b, bias))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
    nothing = masked_lora_linear(x, base, b[:, :0], a[:0], rule=rule)
    torch.testing.assert_close(nothing, x @ values.t())
    half = masked_lora_linear(x.to(BRAIN), base, b, a, rule=rule)
    assert half.dtype == BRAIN


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_multiplied_with_is_what_merging_writes(rule, transposed, dtype, tile):
    base, weight, _ = base_of((9, 17), dtype)
    n_out, n_in = (17, 9) if transposed else (9, 17)
    a, b = torch.randn(4, n_in), torch.randn(n_out, 4) / 100
    left, right = (a.t(), b.t()) if transposed else (b, a)
    merged = base.into_(torch.empty_like(weight), left, right, rule)
    seen = masked_lora_linear(torch.eye(n_in, dtype=dtype), base, left, right, rule=rule, transposed=transposed)
    assert torch.equal(seen if transposed else seen.t(), merged)


def test_merged_zeros_are_exact_whatever_the_adapter_holds():
    base, weight, mask = base_of((8, 8), SINGLE)
    left, right = torch.full((8, 2), torch.inf), -torch.ones(2, 8)
    for rule in ("mask", "scale"):
        merged = base.into_(torch.empty_like(weight), left, right, rule)
        assert torch.equal(merged[~mask].view(torch.int32), torch.zeros(int((~mask).sum()), dtype=torch.int32))


def test_channels_last_and_other_strides():
    weight = torch.randn(6, 4, 3, 3)
    mask = torch.rand(weight.shape) > 0.5
    weight = torch.where(mask, weight, 0)
    bits = SparseMask(mask).packed
    strided = weight.to(memory_format=torch.channels_last)
    a, b, x = torch.randn(2, 36), torch.randn(6, 2), torch.randn(2, 4, 5, 5)
    outputs = [masked_lora_conv2d(x, MaskedWeight.dense(w, bits), b, a, kernel=(3, 3)) for w in (weight, strided)]
    assert torch.equal(*outputs)
    plain = torch.where(mask[:, 0, 0], weight[:, 0, 0], 0)
    base = MaskedWeight.dense(plain.t().contiguous().t(), SparseMask(mask[:, 0, 0]).packed)
    dense = MaskedWeight.dense(plain, base.bitmask)
    assert torch.equal(
        base.into_(torch.empty(6, 3), b, a[:, :3], "mask"), dense.into_(torch.empty(6, 3), b, a[:, :3], "mask")
    )


def test_low_precision_adds_tiles_in_single(monkeypatch):
    monkeypatch.setattr(masked_weight, "TILE", 64)  # a row each
    base, _, _ = base_of((512, 64), BRAIN)
    a, b, x = torch.randn(2, 512), torch.randn(64, 2), torch.randn(4, 512, dtype=BRAIN)
    y = masked_lora_linear(x, base, a.t(), b.t(), transposed=True)
    w = base.into_(torch.empty(512, 64, dtype=BRAIN), a.t(), b.t(), "mask").double()
    exact = x.double() @ w
    assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-7  # products and their sum rounded once each


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_theirs(transposed):
    base, weight, mask = base_of((8, 8), SINGLE)
    x, a, b, bias = leaves(*(torch.randn(s) for s in [(3, 8), (2, 8), (8, 2), (8,)]))
    with torch.autocast("cpu", dtype=BRAIN):
        y = linear(base, "mask", transposed)(x, a, b, bias)
    assert y.dtype == BRAIN
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, a, b, bias)} == {SINGLE}
    w = effective(weight, mask, (b @ a).t() if transposed else b @ a, "mask")
    torch.testing.assert_close(y.double(), x.double() @ (w if transposed else w.t()) + bias, rtol=0.05, atol=0.1)


def test_one_graph_when_compiled():
    torch._dynamo.reset()
    base, _, _ = base_of((8, 6), SINGLE)
    conv, _, _ = base_of((4, 2, 3, 3), SINGLE)
    tensors = [torch.randn(s) for s in [(2, 5, 6), (2, 6), (8, 2), (8,)]]
    kernels = [torch.randn(s) for s in [(2, 2, 5, 5), (2, 18), (4, 2), (4,)]]

    def convolve(x, a, b, c):
        return masked_lora_conv2d(x, conv, b, a, c, kernel=(3, 3))

    for function, given_ in ((linear(base, "mask", False), tensors), (convolve, kernels)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for got, want in zip(run(compiled, given_), run(function, given_), strict=True):
            torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_operators_are_as_they_say():
    base, _, _ = base_of((8, 6), SINGLE)
    x, b, a, bias = leaves(*(torch.randn(s) for s in [(3, 6), (8, 2), (2, 6), (8,)]))
    torch.library.opcheck(torch.ops.resu.masked_lora_linear, (x, b, a, bias, *arguments(base), "mask", False))
    packed, _ = packed_of(base.weight, SparseMask.from_packed(base.bitmask, (8, 6)).mask, 4)
    torch.library.opcheck(torch.ops.resu.masked_lora_linear, (x, b, a, None, *arguments(packed), "scale", False))


def test_only_what_is_needed_is_computed():
    base, _, _ = base_of((8, 6), SINGLE)
    x, b, a = torch.randn(3, 6), torch.randn(8, 2, requires_grad=True), torch.randn(2, 6)
    masked_lora_linear(x, base, b, a).sum().backward()
    assert b.grad is not None
    assert a.grad is None
    assert x.grad is None


def test_misuse_is_said():
    base, weight, _ = base_of((8, 6), SINGLE)
    x, b, a = torch.randn(3, 6), torch.randn(8, 2), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match="layer with 6 inputs"):
        masked_lora_linear(x[:, :5], base, b, a)
    with pytest.raises(ValueError, match="unknown rule 'sparse'; known: mask, scale, dense"):
        masked_lora_linear(x, base, b, a, rule="sparse")
    with pytest.raises(ValueError, match=r"\[8, r\] and \[r, 6\]"):
        masked_lora_linear(x, base, b[:, :1], a)
    with pytest.raises(RuntimeError, match=r"float64 but the layer has torch\.float32"):
        masked_lora_linear(x.double(), base, b, a)
    with pytest.raises(RuntimeError, match="freeze it"):
        masked_lora_linear(x, MaskedWeight.dense(weight.requires_grad_(), base.bitmask), b, a)
    conv, _, _ = base_of((4, 2, 3, 3), SINGLE)
    with pytest.raises(RuntimeError, match="2 input channels"):
        masked_lora_conv2d(torch.randn(1, 3, 5, 5), conv, torch.randn(4, 1), torch.randn(1, 18), kernel=(3, 3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_of_the_weights_size_is_allocated_or_kept(transposed, packed):
    if packed and transposed:
        pytest.skip("a packed base has outputs first")
    n = 2048
    base, weight, mask = base_of((n, n), SINGLE)
    if packed:
        base, _ = packed_of(weight, mask, 4)
    del weight, mask
    x, a, b = leaves(torch.randn(4, n), torch.randn(8, n), torch.randn(n, 8))
    call = linear(base, "mask", transposed)
    call(x, a, b, None).square().sum().backward()  # first use: tables
    x.grad = a.grad = b.grad = None
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call(x, a, b, None)
    own = {t.untyped_storage().data_ptr() for t in arguments(base) if isinstance(t, torch.Tensor)}
    assert max(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own) <= 4 * 8 * n
    with measure_memory() as used:
        call(x, a, b, None).square().sum().backward()
    # A tile is a quarter of the weight: one in the making, and what unpacking its codes or mask takes.
    assert 0 < used.peak < (0.75 if packed else 0.5) * 4 * n * n, used.peak / (4 * n * n)

"""The CSR product: equal results, only where it is allowed, never stale."""

import copy

import pytest
import torch
from torch import nn

from resu.modules import sparse_forward
from resu.modules.linear import RESULinear


def _layer(sparsity=0.8, threshold=0.5, shape=(40, 24), **options):
    torch.manual_seed(0)
    layer = RESULinear(shape[1], shape[0], sparse_threshold=threshold, **options)
    layer.prune_by_magnitude(sparsity)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_masked_dense_product(batch, dtype, bias):
    layer = _layer(dtype=dtype, bias=bias)
    x = torch.randn(batch, 24, dtype=dtype)
    y = layer(x)
    assert layer._product is not None
    torch.testing.assert_close(y, layer(x, use_sparse=False))
    shaped = layer(x.view(1, batch, 24))
    torch.testing.assert_close(shaped, y.view(1, batch, 40))


@torch.no_grad()
def test_indices_are_int32_and_kept_zeros_stay():
    layer = _layer()
    layer.weight.view(-1)[layer.mask.active_indices[:5]] = 0.0
    layer(torch.randn(2, 24))
    csr = layer._product.csr
    assert csr.crow_indices().dtype == csr.col_indices().dtype == torch.int32
    assert csr.values().numel() == layer.mask.n_active
    torch.testing.assert_close(csr.to_dense(), layer.weight)


def test_only_in_inference_on_cpu_floats():
    layer = _layer()
    x = torch.randn(2, 24)
    y = layer(x)
    assert y.requires_grad
    assert layer._product is None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer._product is None
        layer(x, use_sparse=False)
        assert layer._product is None
        low = _layer(dtype=torch.bfloat16)
        low(x.bfloat16())
        assert low._product is None
        layer(x)
        assert layer._product is not None
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), y)


@torch.no_grad()
def test_thresholds():
    x = torch.randn(2, 24)
    for threshold, used in [(0.7, True), (0.8, True), (0.81, False), (1.0, False), ("auto", False)]:
        layer = _layer(0.8, threshold)
        layer(x)
        assert (layer._product is not None) is used, threshold


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.7, 0.9, 0.95])
def test_pruning_at_the_threshold_reaches_it(sparsity):
    layer = _layer(sparsity, sparsity, (7, 13))
    layer(torch.randn(2, 13))
    assert layer._product is not None


@torch.no_grad()
def test_auto_waits_for_large_and_very_sparse_layers():
    x = torch.randn(2, 1024)
    for sparsity, rows, used in [(0.89, 1024, False), (0.9, 1024, True), (0.99, 512, False)]:
        layer = _layer(sparsity, "auto", (rows, 1024))
        layer(x)
        assert (layer._product is not None) is used
    layer = _layer(0.95, "auto", (1024, 1024))
    layer(torch.randn(sparse_forward.AUTO_BATCH + 1, 1024))
    assert layer._product is None


@pytest.mark.parametrize("change", ["optimizer", "copy", "data", "mask", "load", "in_place"])
def test_a_changed_weight_is_seen(change):
    layer = _layer()
    x = torch.randn(2, 24)
    with torch.no_grad():
        layer(x)
        first = layer._product
    if change == "optimizer":
        layer(x).square().sum().backward()
        torch.optim.Adam([layer.weight], lr=0.1).step()
    elif change == "copy":
        with torch.no_grad():
            layer.weight.copy_(layer.mask.apply(torch.randn(40, 24)))
    elif change == "data":
        layer.weight.data.mul_(2.0)
    elif change == "mask":
        layer.set_mask(torch.rand(40, 24) > 0.7)
    elif change == "load":
        layer.load_state_dict(_layer(0.9).state_dict())
    else:
        with torch.no_grad():
            layer.weight[:, 0] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer._product is not None
    assert layer._product is not first


@torch.no_grad()
def test_the_packed_form_is_never_saved_or_copied():
    layer = _layer()
    keys = list(layer.state_dict())
    layer(torch.randn(2, 24))
    assert list(layer.state_dict()) == keys
    other = copy.deepcopy(layer)
    assert other._product is None
    layer.to(torch.float64)
    assert layer._product is None
    layer.remove_mask()
    assert layer._product is None


@torch.no_grad()
def test_empty_rows_and_empty_batch():
    layer = _layer()
    mask = torch.zeros(40, 24, dtype=torch.bool)
    mask[3, 5] = True
    layer.set_mask(mask)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), layer(x, use_sparse=False))
    assert layer(torch.empty(0, 24)).shape == (0, 40)

"""What is trained in one weight: nothing has changed at the start, the mask holds, gradients are right."""

import pytest
import torch
from torch import nn

from resu.core.layers import select
from resu.pruning.repairs import make_repair


def conv1d(inputs, outputs):
    module = pytest.importorskip("transformers").pytorch_utils.Conv1D(outputs, inputs)
    nn.init.normal_(module.weight)
    return module


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 6))


KINDS_OF_LAYER = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: conv1d(6, 4),
    "conv2d": lambda: nn.Conv2d(2, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
    "experts": Experts,
}


def pruned_layer(kind, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(KINDS_OF_LAYER[kind]()).to(dtype)
    (layer,) = select(model, stacks=True).values()
    mask = torch.rand(layer.weight.shape) > 0.5
    with torch.no_grad():
        layer.weight.masked_fill_(~mask, 0)
    return layer, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kept", "theta", "lora"])
@pytest.mark.parametrize("layer_kind", KINDS_OF_LAYER)
def test_a_new_repair_is_the_weight_bit_for_bit(layer_kind, kind, dtype):
    layer, mask = pruned_layer(layer_kind, dtype)
    repair = make_repair(kind, layer, mask, rank=2)
    assert torch.equal(repair.weight(), layer.weight)
    assert repair.weight().dtype == dtype
    assert all(t.dtype == torch.promote_types(dtype, torch.float32) for t in repair.trained)


@pytest.mark.parametrize("kind", ["kept", "theta", "lora"])
@pytest.mark.parametrize("layer_kind", KINDS_OF_LAYER)
def test_the_mask_holds_whatever_is_trained(layer_kind, kind):
    layer, mask = pruned_layer(layer_kind)
    repair = make_repair(kind, layer, mask, rank=2)
    with torch.no_grad():
        for tensor in repair.trained:
            tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype))
    weight = repair.weight()
    if kind == "theta":
        assert torch.equal(weight[mask], layer.weight[mask])
        assert torch.equal(weight[~mask], repair.trained[0])  # row-major
    else:
        assert not weight[~mask].count_nonzero()
        assert not torch.signbit(weight[~mask]).any()
        assert bool((weight != layer.weight)[mask].all())


def test_the_low_rank_change_is_the_formula_element_by_element():
    layer, mask = pruned_layer("linear")
    repair = make_repair("lora", layer, mask, rank=2, alpha=3.0)
    a, b = repair.trained
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, dtype=b.dtype))
    expected = torch.where(mask, layer.weight + (3.0 / 2) * (b[0] @ a[0]), 0.0)
    assert torch.allclose(repair.weight(), expected, rtol=0, atol=1e-15)
    other, mask = pruned_layer("conv1d")  # stored [in, out]
    repair = make_repair("lora", other, mask, rank=2, alpha=3.0)
    a, b = repair.trained
    assert (a.shape, b.shape) == ((1, 2, 6), (1, 4, 2))
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, dtype=b.dtype))
    expected = torch.where(mask, other.weight + (3.0 / 2) * (b[0] @ a[0]).T, 0.0)
    assert torch.allclose(repair.weight(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["kept", "theta", "lora"])
@pytest.mark.parametrize("layer_kind", ["linear", "conv1d", "experts"])
def test_gradients(layer_kind, kind):
    layer, mask = pruned_layer(layer_kind)
    repair = make_repair(kind, layer, mask, rank=2)
    if kind == "lora":
        with torch.no_grad():
            repair.b.copy_(torch.randn(repair.b.shape, dtype=repair.b.dtype))
    assert torch.autograd.gradcheck(lambda *_: repair.weight(), repair.trained)


def test_what_is_trained_has_no_holes():
    layer, mask = pruned_layer("linear")
    assert make_repair("kept", layer, mask).trained[0].shape == (int(mask.sum()),)
    assert make_repair("theta", layer, mask).trained[0].shape == (int((~mask).sum()),)


def test_an_unknown_kind_lists_the_known_ones():
    layer, mask = pruned_layer("linear")
    with pytest.raises(ValueError, match="'kept', 'theta', 'lora'"):
        make_repair("all", layer, mask)

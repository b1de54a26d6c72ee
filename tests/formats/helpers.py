"""Models, weights of any bits, and comparisons bit by bit."""

import torch
from torch import nn

from resu.core.mask import SparseMask

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The bits of a tensor: -0.0 differs from 0.0, and NaN equals itself."""
    return tensor.contiguous().view(WORDS[tensor.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_weight(shape, dtype, keep, seed=0):
    """Any bits at all (NaN payloads, -0.0, infinities) where kept, with zeros among them, and +0.0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator).to(torch.uint8)
    weight = raw.view(WORDS[size]).view(shape).masked_fill(~keep, 0)
    weight[torch.rand(shape, generator=generator) < 0.2] = 0  # kept zeros
    return weight.view(dtype)


def random_24(rows, groups, seed=0):
    scores = torch.rand(rows, groups, 4, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(rows, groups, 4, dtype=torch.bool)
    return keep.scatter_(2, scores.topk(2, dim=2).indices, True).view(rows, 4 * groups)


def small(layout="sparse-bitmask", dtype=torch.float32, seed=0):
    keep = {"fc.weight": random_24(10, 6, seed), "head.weight": random_24(6, 3, seed + 1)}
    if layout == "sparse-bitmask":
        keep["fc.weight"] = torch.rand(10, 24, generator=torch.Generator().manual_seed(seed)) < 0.4
    state = {name: random_weight(tuple(mask.shape), dtype, mask, seed) for name, mask in keep.items()}
    state["fc.bias"] = torch.randn(10, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return state, keep


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def pruned():
    model = network()
    masks = {}
    for name in ("0.weight", "3.weight", "5.weight"):
        weight = model.get_parameter(name)
        masks[name] = SparseMask.from_magnitude(weight, 0.5)
        masks[name].apply_(weight)
    with torch.no_grad():
        model[5].weight.view(-1)[masks["5.weight"].active_indices[0]] = 0.0  # a kept zero
    return model, masks


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)

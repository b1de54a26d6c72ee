"""Small networks with every kind of layer that takes sparse LoRA adapters, and adapters that have learnt something."""

import torch
from torch import nn

from resu.pruning.sparse_lora import SparseLoRAConfig, apply_sparse_lora, get_lora_layers

MODES = ("sparse_to_dense", "sparse_to_sparse", "scale")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Conv1D(nn.Module):
    """As in transformers: a linear layer that stores [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(4, 6, 3, padding="same", groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10),
            Conv1D(12, 10), nn.LayerNorm(12), nn.Linear(12, 3, bias=False),
        )  # fmt: skip
    return model.to(dtype)


def batch(dtype=torch.float32, n=3):
    return torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def random_masks(model, sparsity=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) >= sparsity for n, p in model.named_parameters() if p.ndim > 1}


def config(mode="sparse_to_sparse", **options):
    return SparseLoRAConfig(
        **{"r": 3, "alpha": 6, "target_modules": ["Linear", "Conv2d"], "sparsity_mode": mode, **options}
    )


def learn(model, size=0.3, seed=0):
    """Give every adapter factors that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in get_lora_layers(model).values():
        for factors in (layer.lora_A, layer.lora_B):
            for parameter in factors.values():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def adapted(mode="sparse_to_sparse", dtype=torch.float32, adapters=("default",), **options):
    """A network whose adapters have learnt something, all of them active; and its masks."""
    model = network(dtype=dtype)
    masks = random_masks(model)
    for name in adapters:
        model = apply_sparse_lora(model, masks if name == adapters[0] else None, config(mode, **options), name)
    for layer in get_lora_layers(model).values():
        layer.set_active(adapters)
    return learn(model), masks


def bits_of(tensor):
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(word)


def same_bits(a, b):
    """Whether two tensors, or two dicts of them, are the same to the last bit (signs of zeros too)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))

"""LoRA on a pruned network: what a merge costs with a dense adapter, and that it costs nothing with a masked one.

Run: python examples/sparse_lora.py
"""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from resu.pruning.mask_generator import compute_unstructured_mask
from resu.pruning.sparse_lora import (
    SparseLoRAConfig,
    apply_sparse_lora,
    lora_parameters,
    merge_all_lora_weights,
    unmerge_all_lora_weights,
    validate_sparsity_preserved,
)

torch.manual_seed(0)
torch.set_num_threads(1)

teacher = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
x = torch.randn(1024, 32)
target = teacher(x).detach()
masks = compute_unstructured_mask(teacher, sparsity=0.7)


def loss(model):
    return F.mse_loss(model(x), target)


print(f"{'mode':<18}{'pruned':>9}{'trained':>9}{'merged':>9}  zeros kept, base restored")
for mode in ("sparse_to_dense", "sparse_to_sparse", "scale"):
    config = SparseLoRAConfig(r=8, alpha=16, dropout=0.0, sparsity_mode=mode)
    model = apply_sparse_lora(copy.deepcopy(teacher), masks, config)
    base = [model[i].weight.clone() for i in (0, 2, 4)]
    pruned = loss(model).item()
    optimizer = torch.optim.Adam(lora_parameters(model), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    trained = loss(model).item()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge_all_lora_weights(model)
    merged = loss(model).item()
    ok, report = validate_sparsity_preserved(model, masks, tolerance=0)
    unmerge_all_lora_weights(model)
    restored = all(torch.equal(model[i].weight, w) for i, w in zip((0, 2, 4), base, strict=True))
    print(f"{mode:<18}{pruned:>9.4f}{trained:>9.4f}{merged:>9.4f}  {ok}, {restored}")
    for warning in said:
        print(f"  warned: {warning.message}")

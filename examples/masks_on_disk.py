"""Masks from scores, checked, saved in three formats and applied to another copy of the model.

Run: python examples/masks_on_disk.py
"""

import copy
from pathlib import Path

import torch
from torch import nn

from resu import load_checkpoint, save_checkpoint
from resu.pruning import mask_ops
from resu.pruning.mask_generator import MaskGenerator

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
original = copy.deepcopy(model)

masks = MaskGenerator(model, sparsity=0.75, importance_metric="magnitude").generate_masks()
for name, mask in masks.items():
    ok, stats = mask_ops.validate_mask(mask, expected_sparsity=0.75)
    print(f"{name}: sparsity {stats['sparsity']:.4f}, as expected: {ok}")

for kind in ("safetensors", "npz", "pt"):
    path = Path(f"masks.{kind}")
    mask_ops.save_mask(masks, path, metadata={"method": "magnitude"})
    loaded, metadata = mask_ops.load_mask(path)
    same = all(torch.equal(torch.as_tensor(loaded[n]), torch.as_tensor(masks[n])) for n in masks)
    print(f"{path}: {path.stat().st_size} bytes, {metadata['method']}, equal: {same}")

mask_ops.apply_masks_to_model(model, masks)
save_checkpoint(model, "model.safetensors", masks=masks, layout="bitmask")
dense = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"model.safetensors: {Path('model.safetensors').stat().st_size} bytes; {dense} dense")

load_checkpoint("model.safetensors", original)
same = all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))
print(f"loaded into another copy of the model, equal: {same}")

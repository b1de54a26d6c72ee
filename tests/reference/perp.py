"""MaskLoRA and ScaleLoRA in a few lines, after PERP (arXiv 2312.15230): what is trained and merged."""

import torch


def mask_lora(weight, mask, a, b, scale):
    """W + M ⊙ (s·BA): the reparametrized weight, masked before it is added."""
    return weight + torch.where(mask, scale * (b @ a).reshape(weight.shape), 0)


def scale_lora(weight, a, b):
    """W ⊙ (BA), with every entry of A and B started at 1/sqrt(r)."""
    return weight * (b @ a).reshape(weight.shape)


def scale_lora_start(rank, rows, columns):
    return torch.full((rank, columns), rank**-0.5), torch.full((rows, rank), rank**-0.5)

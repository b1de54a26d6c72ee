"""Vision transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VisionTransformer"]


class _Block(nn.Module):
    """Attention over all patches and a two-layer network, each after its norm and added to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self._dropped(self.out(attended))
        return x + self._dropped(self.down(F.gelu(self.up(self.norm2(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., arXiv 2010.11929); with these sizes ViT-Ti (DeiT, arXiv 2012.12877).

    ViT-Ti/16 has 5.717 M parameters at 224x224 with 1000 classes.

    Args:
        side: Of the images, in pixels.
        patch: Of a patch; a divisor of ``side``.
        classes: Outputs.
        channels: Of the images.
        width: Of the stream.
        depth: Blocks.
        heads: Of the attention; a divisor of ``width``.
        dropout: On what a block adds to the stream.
    """

    def __init__(
        self,
        side: int = 224,
        patch: int = 16,
        classes: int = 1000,
        channels: int = 3,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if patch < 1 or side % patch:
            raise ValueError(f"patch must divide the images' side {side}, got {patch}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for name, parameter in self.named_parameters():
            if name in ("token", "position") or (parameter.ndim == 2):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith(("qkv.bias", "out.bias", "up.bias", "down.bias", "head.bias")):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, read from the class token."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # type: ignore[no-any-return]

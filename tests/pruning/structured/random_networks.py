"""Small networks put together at random from what makes channels belong together."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

KINDS = (
    "conv", "residual", "concat", "chunk", "grouped", "depthwise", "attention", "norm", "shared", "gate", "shuffle",
    "part", "bottleneck", "sum", "tied",
)  # fmt: skip
blocks = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 6, 8, 12]), st.integers(0, 3)), min_size=1, max_size=4
)


def norm(which, channels):
    return [nn.Identity(), nn.BatchNorm2d(channels), nn.GroupNorm(2, channels), nn.ReLU()][which]


class Tokens(nn.Module):
    """Attention over the pixels; heads by attribute, by -1, or by a size derived from the input's."""

    def __init__(self, channels, which):
        super().__init__()
        self.heads, self.size, self.which = 2, 4, which
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * 8)
        self.out = nn.Linear(8, channels)

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        qkv = self.qkv(tokens)
        if self.which == 0:
            q, k, v = (t.view(n, h * w, -1, self.size).transpose(1, 2) for t in qkv.chunk(3, -1))
        elif self.which == 1:
            q, k, v = qkv.view(n, h * w, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        elif self.which == 2:
            q, k, v = qkv.view(n, h * w, 3, self.heads, 8 // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (t[:, None] for t in qkv.split(8, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, -1)
        return x + self.out(y).transpose(1, 2).view(n, c, h, w)


class Block(nn.Module):
    def __init__(self, kind, channels, width, which):
        super().__init__()
        self.kind, self.which = kind, which
        self.out_channels = channels
        if kind == "conv":
            self.a, self.norm, self.out_channels = nn.Conv2d(channels, width, 3, padding=1), norm(which, width), width
        elif kind == "residual":
            self.a, self.norm = nn.Conv2d(channels, width, 3, padding=1, bias=which > 1), norm(which, width)
            self.b = nn.Conv2d(width, channels, 1)
        elif kind == "concat":
            self.a, self.out_channels = nn.Conv2d(channels, width, 1), channels + width
        elif kind == "chunk":
            self.a, self.out_channels = nn.Conv2d(channels, 2 * width, 1), width
        elif kind == "grouped":
            self.a = nn.Conv2d(channels, width, 1)
            self.b, self.out_channels = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2), 2 * width
        elif kind == "depthwise":
            self.a = nn.Conv2d(channels, channels * (1 + which % 2), 3, padding=1, groups=channels)
            self.out_channels = channels * (1 + which % 2)
        elif kind == "attention":
            self.a = Tokens(channels, which)
        elif kind == "norm":
            self.a = nn.GroupNorm(2 if channels % 2 == 0 else 1, channels) if which % 2 else nn.LayerNorm(channels)
        elif kind == "shared":
            self.a = nn.Conv2d(channels, channels, 1)
        elif kind == "gate":
            self.a, self.b = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        elif kind == "shuffle":
            self.a, self.out_channels = nn.Conv2d(channels, 4 * width, 1), width
        elif kind == "part":
            self.a, self.size = nn.Conv2d(channels, width, 1), width // 2
            self.out_channels = width // 2 if which < 2 else width
        elif kind == "bottleneck":
            self.a, self.b, self.out_channels = (
                nn.Conv2d(channels, width, 1),
                nn.ConvTranspose2d(width, width, 1),
                width,
            )
        elif kind == "sum":
            self.a, self.b, self.out_channels = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, width, 1), width
        elif kind == "tied":
            self.a = nn.Conv2d(channels, width, 1, bias=False)

    def forward(self, x):
        kind, which = self.kind, self.which
        if kind == "conv":
            return F.relu(self.norm(self.a(x)))
        if kind == "residual":
            return x + self.b(F.gelu(self.norm(self.a(x))))
        if kind == "concat":
            return torch.cat([x, torch.tanh(self.a(x))] if which % 2 else [self.a(x), x], 1)
        if kind == "chunk":
            a, b = self.a(x).chunk(2, 1)
            return a * b.sigmoid() if which % 2 else F.silu(a) + b
        if kind == "grouped":
            return F.leaky_relu(self.b(self.a(x)))
        if kind == "attention":
            return self.a(x)
        if kind == "norm" and which % 2 == 0:
            return self.a(x.transpose(1, 3)).transpose(1, 3)
        if kind == "shared":
            return self.a(F.relu(self.a(x)))
        if kind == "gate":
            return x * self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))).sigmoid()
        if kind == "shuffle":
            return F.max_pool2d(F.pixel_shuffle(self.a(x), 2), 2)
        if kind == "part":
            y = self.a(x)
            if which == 0:
                return y[:, : self.size] * y[:, self.size :]
            if which == 1:
                return y[:, : y.shape[1] // 2]
            if which == 2:
                return torch.cat([y[:, self.size :], y[:, : self.size].relu()], 1)
            return torch.stack(y.split(self.size, 1), 2).flatten(1, 2)
        if kind == "bottleneck":
            return self.b(F.elu(self.a(x)))
        if kind == "sum":
            return torch.where(self.a(x) > 0, self.a(x), self.b(x)) if which == 0 else self.a(x).relu() - self.b(x)
        if kind == "tied":
            return x + F.conv_transpose2d(F.relu(self.a(x)), self.a.weight)
        return self.a(x)


class Network(nn.Module):
    """Blocks between a first convolution and a last layer that flattens, averages, or looks at the first pixel."""

    def __init__(self, spec, end):
        super().__init__()
        self.stem, self.end = nn.Conv2d(2, 8, 3, padding=1), end
        layers, channels = [], 8
        for kind, width, which in spec:
            layers.append(Block(kind, channels, width, which))
            channels = layers[-1].out_channels
        self.blocks = nn.ModuleList(layers)
        self.hidden = nn.Linear(channels * (16 if end == 0 else 1), 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = x.flatten(1) if self.end == 0 else x.mean((2, 3)) if self.end == 1 else x[:, :, 0, 0]
        return self.head(F.relu(self.hidden(x)))

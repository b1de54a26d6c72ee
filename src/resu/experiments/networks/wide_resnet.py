"""Wide residual networks for images of 32x32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WideResNet"]


class _PreActivated(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; a 1x1 convolution where the width changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False) if fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        if self.shortcut is not None:  # then the shortcut too sees the activated input
            x = self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko & Komodakis, arXiv 1605.07146): WRN-22-2 has 1.08 M parameters.

    Convolutions start as in the authors' code (He, fan-out).

    Args:
        depth: ``6n + 4``: 16, 22, 28, 40.
        width: Factor on the 16, 32 and 64 filters of the three stages.
        classes: Outputs.
        channels: Of the images.
    """

    def __init__(self, depth: int = 22, width: int = 2, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (16, 22, 28, 40), got {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        count, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = self._stage(widths[0], widths[1], count, 1)
        self.layer2 = self._stage(widths[1], widths[2], count, 2)
        self.layer3 = self._stage(widths[2], widths[3], count, 2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.linear = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    @staticmethod
    def _stage(fan_in: int, fan_out: int, count: int, stride: int) -> nn.Sequential:
        rest = [_PreActivated(fan_out, fan_out, 1) for _ in range(count - 1)]
        return nn.Sequential(_PreActivated(fan_in, fan_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]

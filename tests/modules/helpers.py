"""Small layers, inputs and modes that the tests of this folder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.selective import SelectionConfig
from resu.modules.base import RESUMode, RESUModule
from resu.modules.conv import RESUConv2d
from resu.modules.linear import RESULinear

MODES = ["dense", "sparse", "resu", "resu_selective", "qresu4", "qresu8", "qresu_tensor", "qresu_selective"]
THETA_MODES = MODES[2:]
LAYERS = {
    "linear": lambda **k: RESULinear(24, 16, **k),
    "linear_odd": lambda **k: RESULinear(13, 7, bias=False, **k),
    "conv": lambda **k: RESUConv2d(3, 8, 3, padding=1, **k),
    "conv_groups": lambda **k: RESUConv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, **k),
    "conv_depthwise": lambda **k: RESUConv2d(6, 12, 3, groups=6, padding="same", dilation=2, **k),
    "conv_reflect": lambda **k: RESUConv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect", bias=False, **k),
    "conv_circular": lambda **k: RESUConv2d(2, 4, 4, padding="same", padding_mode="circular", **k),
}
MODE_OF = {
    "dense": RESUMode.DENSE,
    "sparse": RESUMode.SPARSE,
    "resu": RESUMode.RESU,
    "resu_selective": RESUMode.RESU,
    "qresu4": RESUMode.QRESU,
    "qresu8": RESUMode.QRESU,
    "qresu_tensor": RESUMode.QRESU,
    "qresu_selective": RESUMode.QRESU_SELECTIVE,
}


def enter(layer: RESUModule, mode: str, sparsity: float = 0.6, lr: float = 0.05) -> RESUModule:
    """Prune ``layer`` and take it to ``mode``."""
    if mode == "dense":
        return layer
    layer.prune_by_magnitude(sparsity)
    config = SelectionConfig(tau_stable=0.1, k_screen_ratio=0.8, k_select_ratio=0.5)
    if mode == "resu":
        layer.enter_resu_mode(epsilon=0.3, lr=lr)
    elif mode == "resu_selective":
        layer.enter_resu_mode(epsilon=0.3, use_selective=True, selective_config=config, lr=lr)
    elif mode in ("qresu4", "qresu8"):
        layer.enter_qresu_mode(bits=int(mode[-1]), epsilon=0.3)
    elif mode == "qresu_tensor":
        layer.enter_qresu_mode(bits=8, epsilon=0.3, qscheme="per_tensor")
    elif mode == "qresu_selective":
        layer.enter_qresu_selective_mode(bits=4, epsilon=0.3, selective_config=config, lr=lr, weight_decay=0.01)
    return layer


def leave(layer: RESUModule, commit: bool) -> None:
    """Exit whatever resurrection mode the layer is in."""
    if layer.mode is RESUMode.RESU:
        layer.exit_resu_mode(commit)
    else:
        layer.exit_qresu_mode(commit)


def sample(layer: nn.Module, batch: int = 5, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    """A random input for ``layer``."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(batch, layer.in_channels, 9, 8, generator=generator, dtype=dtype)
    return torch.randn(batch, layer.in_features, generator=generator, dtype=dtype)


def reference(layer: RESUModule, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch computes with the dense ``weight``."""
    if isinstance(layer, nn.Conv2d):
        plain = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, False, layer.padding_mode, dtype=weight.dtype,
        )  # fmt: skip
        return plain._conv_forward(x, weight, bias)
    return F.linear(x, weight, bias)


def small_model(seed: int = 0) -> nn.Sequential:
    """A plain network with a convolution and two linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 12), nn.ReLU(), nn.Linear(12, 3)
    )  # fmt: skip

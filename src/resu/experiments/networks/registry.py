"""Networks by name, each made for the shape and the classes of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from resu.core.registry import Registry
from resu.experiments.data import TrainingData
from resu.experiments.models import CharGPT, LeNet5, ResNet, SmallConv, mlp
from resu.experiments.networks.resnet50 import ResNet50
from resu.experiments.networks.vit import VisionTransformer
from resu.experiments.networks.wide_resnet import WideResNet

__all__ = ["Network", "networks"]


@dataclass(frozen=True)
class Network:
    """How a network is made, and what of it is pruned.

    Attributes:
        build: Makes the untrained network for a data set; what it takes by keyword are its options.
        include: Globs of the weights that are pruned; None: every linear and convolution weight.
    """

    build: Callable[..., nn.Module]
    include: tuple[str, ...] | None = None


networks: Registry[Network] = Registry("model")


def _add(name: str, include: tuple[str, ...] | None = None) -> Callable[[Callable[..., nn.Module]], Any]:
    def add(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        networks.register(name)(Network(build, include))
        return build

    return add


def _image(data: TrainingData, model: str, side: int | None = None, channels: int | None = None) -> tuple[int, ...]:
    """The shape of the images, checked against what a network can take."""
    wanted = f"images of {side}x{side}" if side else "images"
    if channels:
        wanted += f" with {channels} channels"
    shape = data.shape
    if len(shape) != 3 or (side and shape[1:] != (side, side)) or (channels and shape[0] != channels):
        given = "x".join(map(str, shape)) if len(shape) == 3 else "a text"
        raise ValueError(f"model {model!r} is for {wanted}; {data.name!r} is {given}")
    return shape


@_add("mlp")
def _mlp(data: TrainingData, *, hidden: tuple[int, ...] = (300, 100)) -> nn.Module:
    if any(width < 1 for width in hidden):
        raise ValueError(f"model.hidden must be positive sizes, got {list(hidden)}")
    return mlp(math.prod(_image(data, "mlp")), *hidden, data.classes)


@_add("small-conv")
def _small_conv(data: TrainingData, *, width: int = 16) -> nn.Module:
    return SmallConv(_image(data, "small-conv", 28)[0], data.classes, width)


@_add("lenet5")
def _lenet(data: TrainingData) -> nn.Module:
    return LeNet5(_image(data, "lenet5", 28)[0], data.classes)


def _resnet(depth: int) -> Callable[..., nn.Module]:
    def build(data: TrainingData) -> nn.Module:
        _image(data, f"resnet{depth}", channels=3)
        return ResNet(depth, data.classes)

    return build


for _depth in (20, 32, 56):
    _add(f"resnet{_depth}")(_resnet(_depth))


@_add("wrn-22-2")
def _wide_resnet(data: TrainingData, *, depth: int = 22, width: int = 2) -> nn.Module:
    return WideResNet(depth, width, data.classes, _image(data, "wrn-22-2")[0])


@_add("resnet50")
def _resnet50(data: TrainingData) -> nn.Module:
    return ResNet50(data.classes, _image(data, "resnet50")[0])


@_add("vit-tiny", include=("blocks.*",))
def _vit(
    data: TrainingData,
    *,
    patch: int | None = None,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    dropout: float = 0.0,
) -> nn.Module:
    channels, height, side = _image(data, "vit-tiny")
    if height != side:
        raise ValueError(f"model 'vit-tiny' is for square images; {data.name!r} is {height}x{side}")
    _dropout(dropout)
    patch = patch if patch is not None else (16 if side >= 128 else 4)
    return VisionTransformer(side, patch, data.classes, channels, width, depth, heads, dropout)


def _dropout(value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"model.dropout must lie in [0, 1), got {value}")


@_add("gpt", include=("blocks.*",))
def _gpt(data: TrainingData, *, width: int = 96, heads: int = 4, depth: int = 3, dropout: float = 0.0) -> nn.Module:
    if len(data.shape) != 1:
        raise ValueError(f"model 'gpt' is for texts; {data.name!r} holds images")
    _dropout(dropout)
    return CharGPT(data.classes, data.shape[0], width, heads, depth, dropout)

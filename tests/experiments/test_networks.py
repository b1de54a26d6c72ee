"""The networks: sizes as published, computations as other implementations have them, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from resu.core.layers import select
from resu.experiments.networks import networks
from resu.experiments.networks.resnet50 import ResNet50
from resu.experiments.networks.vit import VisionTransformer
from resu.experiments.networks.wide_resnet import WideResNet

KINDS = ("weight", "bias")


def data(*shape, classes=10):
    return SimpleNamespace(name="some", shape=shape, classes=classes)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "of", "parameters"),
    [
        # LeCun's 300-100 network and the Caffe variant of LeNet-5: 266 610 and 431 080 (arXiv 1510.00149, tables 2, 3)
        ("mlp", data(1, 28, 28), 266_610),
        ("lenet5", data(1, 28, 28), 431_080),
        # 0.27 M, 0.46 M, 0.85 M (arXiv 1512.03385, table 6)
        ("resnet20", data(3, 32, 32), 269_722),
        ("resnet32", data(3, 32, 32), 464_154),
        ("resnet56", data(3, 32, 32), 853_018),
        ("wrn-22-2", data(3, 32, 32), 1_079_642),
        # 25 557 032 and 5 717 416, as torchvision and timm count them
        ("resnet50", data(3, 224, 224, classes=1000), 25_557_032),
        ("vit-tiny", data(3, 224, 224, classes=1000), 5_717_416),
    ],
)
def test_parameters_are_as_many_as_published(name, of, parameters):
    assert count(networks[name].build(of)) == parameters


def test_wide_networks_are_those_of_the_paper():
    # arXiv 1605.07146, tables 4 and 5: 8.9 M, 36.5 M, 11.0 M
    sizes = {(40, 4): 8.9e6, (28, 10): 36.5e6, (16, 8): 11.0e6}
    for (depth, width), parameters in sizes.items():
        assert count(WideResNet(depth, width)) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", [name for name in networks if name not in ("gpt", "small-conv", "lenet5", "mlp")])
def test_every_image_network_trains_on_small_images(name):
    model = networks[name].build(data(3, 32, 32, classes=7))
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 7)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert select(model, networks[name].include)


@torch.no_grad()
def test_resnet50_computes_what_another_implementation_does():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10)).eval()
    ours = ResNet50(10).eval()
    for model in (theirs, ours):  # norms of trained networks do something
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1)
    # Both name a block's shortcut elsewhere: theirs comes before its convolutions.
    source = list(theirs.state_dict().items())
    target = ours.state_dict()
    own = [name for name in target if "downsample" not in name]
    shortcuts = [name for name in target if "downsample" in name]
    for name, (_, value) in zip(own, [item for item in source if "shortcut" not in item[0]], strict=True):
        target[name].copy_(value)
    for name, (_, value) in zip(shortcuts, [item for item in source if "shortcut" in item[0]], strict=True):
        target[name].copy_(value)
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_vision_transformer_computes_what_another_implementation_does():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    ours = VisionTransformer(32, 8, 5, 3, width=24, depth=2, heads=3).eval()
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.2)
    source, target = theirs.state_dict(), ours.state_dict()
    for own, name in {
        **{"token": "vit.embeddings.cls_token", "position": "vit.embeddings.position_embeddings"},
        **{f"patches.{k}": f"vit.embeddings.patch_embeddings.projection.{k}" for k in KINDS},
        **{f"norm.{k}": f"vit.layernorm.{k}" for k in KINDS},
        **{f"head.{k}": f"classifier.{k}" for k in KINDS},
    }.items():
        target[own].copy_(source[name])
    parts = {"out": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    parts |= {"up": "mlp.fc1", "down": "mlp.fc2"}
    for i in range(2):
        for k in KINDS:
            qkv = [source[f"vit.layers.{i}.attention.{part}_proj.{k}"] for part in "qkv"]
            target[f"blocks.{i}.qkv.{k}"].copy_(torch.cat(qkv))
            for own, name in parts.items():
                target[f"blocks.{i}.{own}.{k}"].copy_(source[f"vit.layers.{i}.{name}.{k}"])
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_wide_network_is_pre_activated_with_a_shortcut_after_the_activation():
    model = WideResNet(10, 2).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    w = model.state_dict()

    def norm(x, name):
        stats = (w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"])
        return F.batch_norm(x, *stats)

    x = images = torch.randn(2, 3, 32, 32)
    x = F.conv2d(x, w["conv1.weight"], padding=1)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):  # figure 1d and table 1 of the paper, one block a stage
        name = f"layer{stage}.0"
        y = norm(x, f"{name}.bn1").clamp(min=0)
        z = F.conv2d(y, w[f"{name}.conv1.weight"], stride=stride, padding=1)
        z = F.conv2d(norm(z, f"{name}.bn2").clamp(min=0), w[f"{name}.conv2.weight"], padding=1)
        x = F.conv2d(y, w[f"{name}.shortcut.weight"], stride=stride) + z
    x = norm(x, "bn").clamp(min=0).mean((2, 3))
    torch.testing.assert_close(model(images), x @ w["linear.weight"].T + w["linear.bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: WideResNet(20), "depth must be 6n .+ 4 .*got 20"),
        (lambda: VisionTransformer(30, 4), "patch must divide the images' side 30, got 4"),
        (lambda: VisionTransformer(32, 4, width=100), "heads must divide the width 100, got 3"),
        (lambda: networks["vit-tiny"].build(data(3, 32, 48)), "for square images; 'some' is 32x48"),
        (lambda: networks["vit-tiny"].build(data(64)), "model 'vit-tiny' is for images; 'some' is a text"),
        (lambda: networks["resnet20"].build(data(1, 28, 28)), "for images with 3 channels; 'some' is 1x28x28"),
        (lambda: networks["lenet5"].build(data(3, 32, 32)), "for images of 28x28; 'some' is 3x32x32"),
        (lambda: networks["gpt"].build(data(3, 32, 32)), "model 'gpt' is for texts; 'some' holds images"),
        (lambda: networks["gpt"].build(data(64), dropout=1.0), "model.dropout must lie in .0, 1., got 1.0"),
        (lambda: networks["mlp"].build(data(1, 8, 8), hidden=(0,)), "model.hidden must be positive sizes"),
    ],
)
def test_what_cannot_be_built_is_said(build, said):
    with pytest.raises(ValueError, match=said.replace("n .+ 4", "n . 4")):
        build()

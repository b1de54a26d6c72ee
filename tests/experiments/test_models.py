import pytest
import torch

from resu.experiments.data import Images, Split
from resu.experiments.models import CharGPT, LeNet5, ResNet, SmallConv, load_resnet, mlp


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (mlp(784, 300, 100, 10), (2, 1, 28, 28), 266_610),
        (SmallConv(), (2, 1, 28, 28), 89_546),
        (LeNet5(), (2, 1, 28, 28), 431_080),
        (ResNet(20), (2, 3, 32, 32), 269_722),
    ],
)
def test_image_networks(model, shape, parameters):
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(shape)).shape == (2, 10)


def test_chargpt_sees_no_future_and_ties_nothing():
    model = CharGPT(65, context=16, width=32, depth=2).eval()
    tokens = torch.randint(65, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 65
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, 65)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])
    assert model.head.weight is not model.embedding.weight


@pytest.mark.parametrize("make", [lambda: mlp(3), lambda: ResNet(21), lambda: CharGPT(5, width=30, heads=4)])
def test_impossible_sizes(make):
    with pytest.raises(ValueError, match=r"got|divisible"):
        make()


def test_trained_resnet_classifies(data_folder, cifar_test):
    model = load_resnet(data_folder("model_resnet_cifar10") / "resnet20.npz")
    some = torch.arange(0, 10_000, 25)
    data = Images(
        *("cifar10", *[Split(cifar_test.x[some], cifar_test.y[some])] * 3, 10),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.evaluation("test"))
    assert right / 400 == pytest.approx(0.81, abs=0.04)


def test_resnet_file_that_is_none(tmp_path):
    import numpy as np

    with pytest.raises(ValueError, match="cannot read"):
        load_resnet(tmp_path / "absent.npz")
    np.savez(tmp_path / "a.npz", x=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="is no CIFAR ResNet"):
        load_resnet(tmp_path / "a.npz")

"""However a model is run around the removal: compiled, in inference mode, with parts of parameters handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resu.pruning.structured import BlockPruner, StructuredPruner
from resu.pruning.structured.sizes import count_macs


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), Residual(), Residual(), nn.Linear(6, 2))


X = torch.linspace(-1, 1, 12).view(4, 3)


def test_in_inference_mode_parameters_stay_trainable() -> None:
    for inference in (X, None):
        model, other = stack(), stack()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.inference_mode():
            x = torch.ones(4, 3) if inference is None else inference
            result = StructuredPruner(0.5, x).prune(model, optimizer)
            BlockPruner(0.5, x, calibration=[x]).prune(other)
        assert result.macs[1] < result.macs[0] == count_macs(stack(), X)
        for made in (model, other):
            made(X).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_default_device_is_no_matter(scope: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(96, 4)]
    model, other, images = nn.Sequential(*layers), stack(), torch.randn(2, 3, 8, 8)
    with torch.device("meta"):  # whatever would be made there has no values
        assert StructuredPruner(0.5, images, scope=scope, target="macs").prune(model).units["0"][0] == 4
        assert StructuredPruner(0.5, X, scope=scope).compute_masks(other)
        for loss_fn in (None, lambda m, x: m(x).square().mean()):
            assert len(BlockPruner(0.5, X, calibration=[X], loss_fn=loss_fn).prune(other).units) in (1, 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at it
def test_nothing_is_compiled_to_try_things_out() -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(stack(), backend=backend)
    before = model(X).shape
    assert len(graphs) == 1
    result = StructuredPruner(0.5, X).prune(model)
    assert len(graphs) == 1
    assert model(X).shape == before
    assert len(graphs) == 2  # of the smaller model
    assert all(small < whole for whole, small in result.units.values())


def test_parts_of_parameters_are_handed_on() -> None:
    class Hands(nn.Module):
        """As the table of relative positions of DeBERTa."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(5, 4), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu()) + self.b(self.a(self.table.weight[:4].unsqueeze(0))).mean()
            return out

    model = Hands()
    assert count_macs(model, torch.zeros(3, 4)) == 3 * (32 + 16) + 4 * (32 + 16)
    assert StructuredPruner(0.5, torch.zeros(3, 4)).prune(model).units["a"] == (8, 4)


def test_features_that_a_forward_pass_left_behind_are_no_hindrance() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.block = nn.Linear(3, 8), nn.Linear(8, 3), Residual3()
            self.features: list[Tensor] = []
            self._seen: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).relu()
            self.features, self._seen = [hidden], {"hidden": hidden}
            out: Tensor = self.block(self.b(hidden))
            return out

    class Residual3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.inner(x)
            return out

    model = Keeps()
    model(X).sum().backward()
    assert model.features[0].grad_fn is not None
    assert StructuredPruner(0.5, X).prune(model).units == {"a": (8, 4)}
    model(X).sum().backward()
    assert list(BlockPruner(0.5, X, calibration=[X]).prune(model).units) == ["block"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_quantized_weights_and_scripts_are_refused_with_what_to_do() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = stack()
    quantization.quantize_(model[1], quantization.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match=r"'1.inner.0.weight' is a .*; make the model smaller, then quantize"):
        StructuredPruner(0.5, X).prune(model)
    with pytest.raises(TypeError, match="make the model smaller, then quantize"):
        BlockPruner(0.5, X, calibration=[X]).prune(model)
    with pytest.raises(TypeError, match="then script it"):
        BlockPruner(0.5, X, calibration=[X]).prune(nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 2))))

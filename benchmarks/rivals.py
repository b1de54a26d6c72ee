"""Other libraries that train sparse networks, each behind the few calls that ``bench_sparse_training.py`` makes.

They are no dependencies of this project. Install them into a folder of their own and name it with ``--rivals``:

    pip install --no-deps --target FOLDER rigl-torch==0.5.2 sparsimony==0.1.0 sparselab==0.2.2

Each is used as its own README says: RigL with the same sparsity, interval and drop fraction, over all linear and
convolution weights as far as it can.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resu.core.counting import keep_count

Probe = Callable[[], None]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
END = 10**6  # of the schedules: far beyond what is measured


def nothing() -> None:
    """A probe that looks at nothing."""


class Contender:
    """One network that is trained sparsely.

    ``before`` and ``after`` are called around the part of a step that may change the topology.

    Args:
        model: The network.
        make: Makes the optimizer from parameters.
    """

    def __init__(self, model: nn.Module, make: Make) -> None:
        self.model, self.optimizer = model, make(model.parameters())
        self.before: Probe = nothing
        self.after: Probe = nothing

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        loss(self.model).backward()
        self.optimizer.step()

    def masks(self) -> dict[str, Tensor]:
        """Bool masks of what it prunes, as it holds them."""
        return {}

    def effective(self) -> dict[str, Tensor]:
        """The weights that the forward pass multiplies with, by the names of :meth:`masks`."""
        return {}

    def state(self) -> dict[str, list[Tensor]]:
        """Element-wise state of the optimizer, in the shape of the weights, likewise."""
        return {}

    def asked(self) -> int:
        """How many weights of :meth:`masks` were to be kept in all, in exact decimals."""
        return sum(keep_count(mask.numel(), 0.9) for mask in self.masks().values())


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Momenta and second moments, not counters."""
    found = optimizer.state.get(parameter, {})
    return [x for x in found.values() if isinstance(x, Tensor) and x.shape == parameter.shape]


class RiglTorch(Contender):
    """rigl-torch: the scheduler is asked before each step whether the optimizer is to step."""

    package, version = "rigl-torch", "0.5.2"

    def __init__(self, model: nn.Module, make: Make, interval: int, alpha: float, rule: str) -> None:
        super().__init__(model, make)
        _torchvision_names()
        scheduler = importlib.import_module("rigl_torch.RigL").RigLScheduler
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.pruner = scheduler(
            model,
            self.optimizer,
            dense_allocation=0.1,
            T_end=END,
            delta=interval,
            alpha=alpha,
            ignore_linear_layers=False,
        )

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        self.optimizer.zero_grad()
        loss(self.model).backward()
        self.before()
        go_on = self.pruner()
        self.after()
        if go_on:
            self.optimizer.step()

    def masks(self) -> dict[str, Tensor]:
        pairs = zip(self.pruner.W, self.pruner.backward_masks, strict=True)
        return {self.names[id(w)]: mask for w, mask in pairs if mask is not None}

    def effective(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach() for name in self.masks()}

    def state(self) -> dict[str, list[Tensor]]:
        return {name: state_of(self.optimizer, self.model.get_parameter(name)) for name in self.masks()}


class Sparsimony(Contender):
    """sparsimony: masks as parametrizations; its ``step`` follows the optimizer's."""

    package, version = "sparsimony", "0.1.0"

    def __init__(self, model: nn.Module, make: Make, interval: int, alpha: float, rule: str) -> None:
        super().__init__(model, make)
        kinds = {"rigl": ("rigl", "RigL"), "set": ("set", "SET")}
        module, name = kinds[rule]
        base = importlib.import_module("sparsimony.distributions.base")
        schedule = importlib.import_module("sparsimony.schedulers.base").CosineDecayScheduler(alpha, END, interval)
        algorithm = getattr(importlib.import_module(f"sparsimony.dst.{module}"), name)
        self.algorithm = algorithm(schedule, base.UniformDistribution(), self.optimizer, sparsity=0.9)
        layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.algorithm.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers])

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        super().step(loss)
        self.before()
        self.algorithm.step()
        self.after()

    def masks(self) -> dict[str, Tensor]:
        return {g["tensor_fqn"]: g["module"].parametrizations.weight[0].mask.bool() for g in self.algorithm.groups}

    def effective(self) -> dict[str, Tensor]:
        return {g["tensor_fqn"]: g["module"].weight.detach() for g in self.algorithm.groups}

    def state(self) -> dict[str, list[Tensor]]:
        groups = self.algorithm.groups
        return {g["tensor_fqn"]: state_of(self.optimizer, g["module"].parametrizations.weight.original) for g in groups}


class Sparselab(Contender):
    """sparselab: linear layers are replaced by its ``SparseLinear``, whose weights are packed in rows."""

    package, version = "sparselab", "0.2.2"

    def __init__(self, model: nn.Module, make: Make, interval: int, alpha: float, rule: str) -> None:
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise NotImplementedError("sparselab 0.2.2 has a sparse linear layer and no convolution")
        lab = importlib.import_module("sparselab")
        if next(model.parameters()).device.type != "cpu":
            raise NotImplementedError("sparselab 0.2.2 runs on the CPU only")
        self.layers: dict[str, Any] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                new = lab.SparseLinear(module.in_features, module.out_features, module.bias is not None, sparsity=0.9)
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, new)
                self.layers[f"{name}.weight"] = new
        super().__init__(model, make)  # of other parameters than before
        made = {"rigl": lab.RigL, "set": lab.SET}[rule]
        self.algorithm = made(sparsity=0.9, drop_fraction=alpha, update_freq=interval, seed=0)
        model.apply(self.algorithm)

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        super().step(loss)
        self.before()
        self.algorithm.step()
        self.after()

    def _dense(self, layer: Any, values: Tensor) -> Tensor:
        csr = layer._csr
        used, first = np.asarray(csr.row_nnz), np.asarray(csr.row_start)
        rows = np.repeat(np.arange(len(used)), used)
        slots = np.repeat(first, used) + np.arange(used.sum()) - np.repeat(np.cumsum(used) - used, used)
        dense = values.new_zeros(layer.out_features, layer.in_features)
        columns = torch.from_numpy(np.asarray(csr.col_indices)[slots].astype(np.int64))
        dense[torch.from_numpy(rows), columns] = values.detach()[torch.from_numpy(slots).long()]
        return dense

    def masks(self) -> dict[str, Tensor]:
        return {
            name: self._dense(layer, torch.ones_like(layer._values.detach())).bool()
            for name, layer in self.layers.items()
        }

    def effective(self) -> dict[str, Tensor]:
        return {name: self._dense(layer, layer._values) for name, layer in self.layers.items()}

    def state(self) -> dict[str, list[Tensor]]:
        return {
            name: [self._dense(layer, x) for x in state_of(self.optimizer, layer._values)]
            for name, layer in self.layers.items()
        }


RIVALS: dict[str, type[Any]] = {"rigl-torch": RiglTorch, "sparsimony": Sparsimony, "sparselab": Sparselab}


def why_not(name: str, folder: Path | None) -> str | None:
    """Why a rival cannot be imported here; None: it can be."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    rival = RIVALS[name]
    try:
        found = importlib.metadata.version(rival.package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: pip install --no-deps --target FOLDER {rival.package}=={rival.version}, --rivals FOLDER"
    return None if found == rival.version else f"{rival.package} {found} is installed, measured is {rival.version}"


def _torchvision_names() -> None:
    """rigl-torch imports torchvision, without saying so, for two names that it compares types with."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # not there, or built for another torch
        blocks = {name: type(name, (nn.Module,), {}) for name in ("Bottleneck", "BasicBlock")}
        vision: Any = types.ModuleType("torchvision")
        vision.models = types.SimpleNamespace(resnet=types.SimpleNamespace(**blocks))
        sys.modules["torchvision"] = vision

"""The ways of fine-tuning that are compared: each makes a model trainable and says what trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from resu.core.layers import select
from resu.core.mask import SparseMask
from resu.core.resurrection import gather_theta
from resu.experiments.finetuning.tasks import Task
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.pruning.sparse_lora import SparseLoRAConfig, apply_sparse_lora, lora_parameters

__all__ = ["KINDS", "Kind", "Prepared", "Way", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: It, or what was made of it.
        adapter: What the way trains beside the head.
        head: Parameters of the head.
    """

    model: Any
    adapter: list[nn.Parameter]
    head: list[nn.Parameter]


@dataclass(frozen=True)
class Kind:
    """A kind of ways.

    Attributes:
        label: As tables call it.
        apply: From a model, its task, the size and the learning rate to the model and what trains.
        sizes: What is compared; see :class:`Way`.
        small: The same where layers are as small as those of stories260K; empty: the same.
        rates: Learning rates to choose from, on held-out data (``--tune``).
        eight_bits: Whether its optimizer keeps its state in 8 bits.
        like: A kind whose tuned rates it takes where it was not tuned itself; empty: none.
    """

    label: str
    apply: Callable[[Any, Task, float, float], tuple[Any, list[nn.Parameter]]]
    sizes: tuple[float, ...]
    rates: tuple[float, ...]
    eight_bits: bool = False
    small: tuple[float, ...] = ()
    like: str = ""

    def sizes_for(self, task: str) -> tuple[float, ...]:
        """The sizes that are compared on a task."""
        return self.small if self.small and task == "stories" else self.sizes


@dataclass(frozen=True)
class Way:
    """A kind, and how much of it.

    Attributes:
        kind: A name in :data:`KINDS`.
        size: For resurrection the sparsity, which is the share of weights that train; for sparse LoRA (of rank 8) the
            share that is zero; for Super-Tuning the share that trains; for the others the rank; 0 where there is no
            choice.
    """

    kind: str
    size: float = 0.0

    @property
    def label(self) -> str:
        """As tables call it."""
        return KINDS[self.kind].label + (f" {self.size:g}" if self.size else "")


def _names(model: nn.Module, task: Task) -> list[str]:
    """Modules whose weights methods change: the linear layers of the body."""
    return [name.rpartition(".")[0] for name in select(model, exclude=task.exclude)]


def _all(model: Any, task: Task, size: float, lr: float) -> tuple[Any, list[nn.Parameter]]:
    known = {id(p) for p in _head(model, task)}
    return model, [p.requires_grad_() for p in model.parameters() if id(p) not in known]


def _nothing(model: Any, task: Task, size: float, lr: float) -> tuple[Any, list[nn.Parameter]]:
    return model, []


def _resurrect(
    model: Any, task: Task, size: float, lr: float, *, bits: int, selective: bool = False
) -> tuple[Any, list[nn.Parameter]]:
    """θ in bfloat16 at the smallest weights, starting as what they are; the others as codes."""
    convert_to_resu(model, include=_names(model, task))
    for layer in get_resu_modules(model).values():
        mask = SparseMask.from_magnitude(layer.weight.detach(), size)
        theta = gather_theta(layer.weight.detach(), mask)
        layer.set_mask(mask)
        if selective:
            layer.enter_qresu_selective_mode(bits, lr=lr, init=theta, theta_dtype=torch.bfloat16)
        else:
            layer.enter_qresu_mode(bits, init=theta, theta_dtype=torch.bfloat16)
    return model, resurrection_parameters(model)


def _adapt(model: Any, task: Task, size: float, lr: float, *, make: Callable[[float], Any]) -> tuple[Any, list[Any]]:
    """A method of PEFT on the same layers; the head stays outside of it."""
    from peft import get_peft_model

    config = make(size)
    config.target_modules = _names(model, task)
    adapted = get_peft_model(model, config)
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def _sparse_lora(
    model: Any, task: Task, size: float, lr: float, *, mode: str, bits: int | None = None
) -> tuple[Any, list[nn.Parameter]]:
    """LoRA of rank 8 on layers pruned by magnitude; with ``bits`` and nothing pruned: what QLoRA holds."""
    names = _names(model, task)
    rank = 8 if size < 1 else int(size)
    config = SparseLoRAConfig(
        r=rank, alpha=2 * rank, dropout=0.0, target_modules=names, sparsity_mode=mode, base_bits=bits,
        initial_sparsity=size if size < 1 else 0.0,
    )  # fmt: skip
    return apply_sparse_lora(model, None, config), lora_parameters(model)


def _lora(rank: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=int(rank), lora_alpha=2 * int(rank))


def _resu(sparsity: float) -> Any:
    from resu.integrations.peft import RESUAdapterConfig

    return RESUAdapterConfig(sparsity=sparsity)


def _shira(rank: float) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(r=int(rank), random_seed=0)


def _super(share: float) -> Any:
    from peft import SupertuningConfig

    return SupertuningConfig(sparsity=1 - share)


_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
_RANKS = (2, 8, 32)
_FULL, _LOW, _THETA = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3, 3e-3)
KINDS: dict[str, Kind] = {
    "full": Kind("full fine-tuning", _all, (0.0,), _FULL),
    "head": Kind("head alone", _nothing, (0.0,), (0.0,)),
    "lora": Kind("LoRA", partial(_adapt, make=_lora), _RANKS, _LOW),
    "qlora": Kind("LoRA over 4 bits", partial(_sparse_lora, mode="sparse_to_dense", bits=4), _RANKS, _LOW),
    "slora-dense": Kind("sparse LoRA (dense)", partial(_sparse_lora, mode="sparse_to_dense"), _LEVELS, _LOW),
    "slora-sparse": Kind("sparse LoRA (sparse)", partial(_sparse_lora, mode="sparse_to_sparse"), _LEVELS, _LOW),
    "shira": Kind("SHiRA", partial(_adapt, make=_shira), (8, 32, 96), (3e-4, 1e-3, 3e-3, 1e-2), small=(2, 8, 16)),
    "super": Kind("Super-Tuning", partial(_adapt, make=_super), (0.01, 0.1, 0.5), (3e-4, 1e-3, 3e-3, 1e-2)),
    "resu": Kind("RESU", partial(_adapt, make=_resu), _LEVELS, _THETA),
    "qresu8": Kind("QRESU 8 bits", partial(_resurrect, bits=8), _LEVELS, _THETA, True, like="qresu4"),
    "qresu4": Kind("QRESU 4 bits", partial(_resurrect, bits=4), _LEVELS, _THETA, True),
    "selective": Kind("Selective 4 bits", partial(_resurrect, bits=4, selective=True), _LEVELS, (0.03, 0.1, 0.3, 1.0)),
}


def _head(model: nn.Module, task: Task) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if any(part in name.split(".") for part in task.head)]


def prepare(model: Any, task: Task, way: Way, lr: float) -> Prepared:
    """Freeze a pretrained model but for its head, and apply a way to it.

    Args:
        model: The pretrained model; changed.
        task: What it is to learn.
        way: How.
        lr: Learning rate, for what updates itself.

    Raises:
        ValueError: On an unknown kind.
    """
    if way.kind not in KINDS:
        raise ValueError(f"unknown way {way.kind!r}; known: {', '.join(KINDS)}")
    head = _head(model, task)
    model.requires_grad_(False)
    adapted, parameters = KINDS[way.kind].apply(model, task, way.size, lr)
    for parameter in head:  # PEFT freezes what it was not told of
        parameter.requires_grad_(True)
    return Prepared(adapted, parameters, head)

"""One training step of a Hugging Face model under a method of fine-tuning: the same program to be run, or run dry.

:mod:`resu.integrations.hf_plan` predicts the memory of these programs without weights; benchmarks measure them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.integrations.hf import model_class, quiet
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.dry_layers import dry_lora, enter_dry
from resu.modules.settings import RESUMode
from resu.pruning.sparse_lora import SparseLoRAConfig, apply_sparse_lora
from resu.pruning.targets import pruning_targets, task_head
from resu.training.adamw8bit import BLOCK, CHUNK, AdamW8bit
from resu.training.update_in_backward import optimizer_in_backward

__all__ = ["METHODS", "OPTIMIZERS", "Setup", "read_config", "training_program"]

#: What each method is called in a table.
METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "LoRA, 4-bit base",
    "sparse-lora": "sparse LoRA, sparse_to_sparse",
    "sparse-lora-dense": "sparse LoRA, sparse_to_dense",
    "resu": "RESU",
    "qresu8": "QRESU, 8 bits",
    "qresu4": "QRESU, 4 bits",
    "qresu-selective": "QRESU-Selective, 4 bits",
}
# Float32 values that AdamW8bit needs at a time for each of a part, as measured.
_BESIDE = 12
OPTIMIZERS = ("adamw", "adam", "adam8bit", "adafactor", "momentum", "sgd", "none")
_MODES = {"resu": RESUMode.RESU, "qresu-selective": RESUMode.QRESU_SELECTIVE}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a training step is to be.

    Attributes:
        method: One of :data:`METHODS`.
        batch: Samples per step.
        length: Tokens per sample.
        sparsity: Fraction of the target weights that is pruned, in [0, 1).
        dtype: Of the weights.
        theta_dtype: Of θ in the quantized modes.
        optimizer: One of :data:`OPTIMIZERS`.
        weight_decay: Of ``adamw``. Under RESU it costs a copy of the weights during a step.
        rank: Of low-rank updates.
        dropout: In low-rank updates, in [0, 1).
        checkpointing: Whether activations of blocks are computed a second time instead of kept.
        in_backward: Whether each weight is updated as soon as its gradient is there.

    Raises:
        ValueError: On an unknown method or optimizer, or a size below 1.
    """

    method: str
    batch: int = 1
    length: int = 512
    sparsity: float = 0.5
    dtype: torch.dtype = torch.float32
    theta_dtype: torch.dtype = torch.bfloat16
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    rank: int = 16
    dropout: float = 0.0
    checkpointing: bool = False
    in_backward: bool = False

    def __post_init__(self) -> None:
        for name, known in (("method", tuple(METHODS)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("batch", "length", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")


def read_config(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """The transformers configuration of a ``config.json`` (or the folder that holds it), and the same as a mapping.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If transformers does not know its model, or it is no JSON object.
    """
    from transformers import AutoConfig

    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no configuration that transformers reads: {text}") from None
    return config, config.to_dict()


def training_program(config: Any, setup: Setup, *, dry: bool = False) -> tuple[nn.Module, Callable[[], None]]:
    """A model with random weights made ready for a method, and a function that makes one training step of it.

    Tokens and labels are zeros; a model without a loss of its own gets the mean square of its last hidden state.

    Args:
        config: A transformers configuration.
        setup: What the step is to be.
        dry: Whether this is within :func:`resu.modules.dry_run.dry_run`.

    Returns:
        ``(model, step)``.

    Raises:
        ImportError: If ``lora`` is asked for without PEFT.
        ValueError: If the model has no weights that the method acts on, or takes fewer tokens.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and setup.length > limit:
        raise ValueError(f"length {setup.length} is more than the model takes: max_position_embeddings = {limit}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with quiet():
            model: Any = model_class(config.to_dict(), Path("this configuration"))(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    if setup.checkpointing:
        _checkpoint(model)
    parameters = dict(model.named_parameters())
    heads = [parameters[name] for name in task_head(type(model).__name__, parameters)]
    model = _ready(model, setup, dry)
    for parameter in heads:  # of a classification it trains whole under every method
        parameter.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    if setup.method == "qresu-selective":
        trained = []
    optimizer = _optimizer(trained, setup, dry)
    ids = torch.zeros(setup.batch, setup.length, dtype=torch.long)
    kind = type(model).__name__ if not hasattr(model, "get_base_model") else type(model.get_base_model()).__name__

    def step() -> None:
        _loss(model, ids, kind).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return model, step


def _checkpoint(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    enable()


def _loss(model: nn.Module, ids: Tensor, kind: str) -> Tensor:
    loss: Tensor
    if "LM" in kind:
        loss = model(input_ids=ids, labels=ids).loss
    elif kind.endswith("ForSequenceClassification"):
        loss = model(input_ids=ids, labels=ids[:, 0]).loss
    else:
        loss = model(input_ids=ids).last_hidden_state.square().mean()
    return loss


def _ready(model: nn.Module, setup: Setup, dry: bool) -> nn.Module:
    if setup.method == "full":
        return model
    names = list(pruning_targets(model)[0])
    modules = [name.rpartition(".")[0] for name in names]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if setup.method == "lora":
        return _lora(model, modules, setup)
    if "lora" in setup.method:
        quantized = setup.method == "qlora"
        sparse = SparseLoRAConfig(
            r=setup.rank,
            dropout=setup.dropout,
            target_modules=modules,
            sparsity_mode="sparse_to_sparse" if setup.method == "sparse-lora" else "sparse_to_dense",
            initial_sparsity=0.0 if quantized else setup.sparsity,
            base_bits=4 if quantized else None,
        )
        if not dry:
            return apply_sparse_lora(model, None, sparse)
        for name in modules:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dry_lora(model.get_submodule(name), sparse))
        return model
    convert_to_resu(model, include=names)
    bits = 8 if setup.method.endswith("8") else 4
    for layer in get_resu_modules(model).values():
        mode = _MODES.get(setup.method, RESUMode.QRESU)
        if dry:
            enter_dry(layer, mode, setup.sparsity, bits=bits, theta_dtype=setup.theta_dtype)
            continue
        layer.prune_by_magnitude(setup.sparsity)
        if mode is RESUMode.RESU:
            layer.enter_resu_mode()
        elif mode is RESUMode.QRESU:
            layer.enter_qresu_mode(bits, theta_dtype=setup.theta_dtype)
        else:
            layer.enter_qresu_selective_mode(bits, theta_dtype=setup.theta_dtype)
    for parameter in resurrection_parameters(model):
        parameter.requires_grad_(True)
    return model


def _lora(model: nn.Module, modules: list[str], setup: Setup) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("method 'lora' needs peft: pip install 'resu-torch[peft]'", name=error.name) from error
    settings = LoraConfig(r=setup.rank, lora_alpha=2 * setup.rank, lora_dropout=setup.dropout, target_modules=modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a name that will go, and warns of Conv1D
        made: nn.Module = get_peft_model(model, settings)
    return made


def _optimizer(trained: list[nn.Parameter], setup: Setup, dry: bool) -> Optimizer | None:
    if not trained or setup.optimizer == "none":
        return None
    decay = setup.weight_decay
    factories: dict[str, Callable[[Any], Optimizer]] = {
        "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=decay),
        "adam": torch.optim.Adam,
        "adafactor": torch.optim.Adafactor,
        "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
        "adam8bit": _DryAdam8bit if dry else lambda groups: AdamW8bit(groups, weight_decay=decay),
    }
    factory = factories[setup.optimizer]
    return optimizer_in_backward(trained, factory) if setup.in_backward else factory(trained)


class _DryAdam8bit(Optimizer):
    """What :class:`~resu.training.adamw8bit.AdamW8bit` holds, without its many small operators on parts of weights."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state, and what one part of a weight needs beside it."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                torch.empty(_BESIDE, min(p.numel(), CHUNK))
                for name in ("exp_avg", "exp_avg_sq") if p not in self.state else ():
                    self.state[p][name] = torch.zeros(p.shape, dtype=torch.uint8)
                    self.state[p][f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK))

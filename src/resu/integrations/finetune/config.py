"""The settings of one fine-tuning run, checked together before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from resu.core.counting import check_sparsity
from resu.core.pattern import Unstructured, get_pattern
from resu.core.quantization import check_bits

__all__ = [
    "COMMITS",
    "DTYPES",
    "LORA_MODES",
    "METHODS",
    "OPTIMIZERS",
    "SCHEDULES",
    "TASKS",
    "THETA_STARTS",
    "FinetuneConfig",
]

TASKS = ("auto", "causal-lm", "masked-lm", "classification")
#: Methods, each with the step size where none is given.
METHODS = {
    "full": 5e-5,
    "masked": 5e-5,
    "lora": 2e-4,
    "sparse-lora": 2e-4,
    "resu": 1e-4,
    "qresu": 1e-4,
    "qresu-selective": 1e-2,
}
_THETA = ("resu", "qresu", "qresu-selective")
_LORA = ("lora", "sparse-lora")
THETA_STARTS = ("weight", "zeros", "normal")
COMMITS = ("dense", "sparse", "amnesty")
LORA_MODES = ("sparse_to_sparse", "sparse_to_dense", "scale")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "sgd")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is trained, on what, and how.

    Attributes:
        source: A Hugging Face directory.
        data: Text to train on (:mod:`resu.integrations.finetune.data` names the formats).
        method: ``full``: every weight. ``masked``: every weight, the pruned ones stay 0. ``resu``: θ at pruned
            positions, the other weights frozen. ``qresu``: θ, over frozen weights in 4 or 8 bits.
            ``qresu-selective``: the same without an optimizer. ``lora``: low-rank updates (PEFT). ``sparse-lora``:
            low-rank updates that keep the mask.
        task: ``causal-lm``, ``masked-lm``, ``classification``; ``auto``: classification where the data has labels, else
            what the model was made for.
        validation: Text to evaluate on; None: a share of ``data`` that is held out.
        validation_share: That share.
        encoding: Of the text files.
        length: Tokens per sample; None: what the model was made for, at most 512.
        sparsity: Fraction of the selected weights that is pruned, in [0, 1); None: ``mask``, or the masks beside the
            source.
        mask: A mask file, ``"zeros"`` (what is 0 in the source is pruned), or None.
        prune_method: Which weights are pruned: ``magnitude``, ``wanda``, … (any registered score).
        pattern: ``row``, ``2:4``, …; None: single weights.
        samples: Training samples that calibrate a ``prune_method`` that looks at data.
        include: Globs of what to prune and train; empty: every weight that multiplies but embeddings and heads.
        exclude: Globs of what to leave out.
        theta_init: ``weight``: θ starts as what was pruned, so that the model starts as it was (of a source that is
            sparse already, at 0). ``zeros``. ``normal``: N(0, (ε·σ)²).
        epsilon: ε of ``normal``.
        bits: Of frozen weights: 4 or 8; None: 4 under ``qresu``, not quantized under ``sparse-lora``.
        theta_dtype: Of θ under ``qresu``; None: that of the weights.
        rank: Of low-rank updates.
        alpha: Their scale is ``alpha / rank``.
        dropout: Of their inputs.
        lora_mode: ``sparse_to_sparse`` (the mask acts in training), ``sparse_to_dense`` (it acts at the merge) or
            ``scale`` (weights are scaled): see :class:`resu.pruning.sparse_lora.SparseLoRAConfig`.
        commit: What becomes of θ: ``dense``: it joins the weights. ``sparse``: it joins, and the weakest positions go
            until the source's count is kept. ``amnesty``: the same, but θ takes at most ``resurrected`` of the places.
        resurrected: See ``amnesty``.
        train_norms: Whether norms train beside.
        train_biases: Whether biases train beside.
        train_head: Whether the output head of a language model trains beside. That of a classification always does,
            and so does all that the source has no weights for.
        epochs: Passes over the data; may be a fraction.
        steps: Optimizer steps; None: by ``epochs``.
        batch_size: Samples per process and forward pass.
        accumulate: Forward passes per step.
        learning_rate: None: :data:`METHODS`.
        weight_decay: Of matrices and θ, not of norms and biases.
        warmup: Share of the steps over which the step size grows from 0.
        schedule: ``linear`` or ``cosine`` to 0, or ``constant``.
        clip: Largest norm of the gradient; 0: none.
        optimizer: ``adamw``, ``adamw8bit`` (moments in 8 bits), ``adafactor``, ``sgd`` (with momentum 0.9).
        in_backward: Whether each weight is updated as soon as its gradient is there, so that gradients of layers never
            coexist (:mod:`resu.training.update_in_backward`); for ``clip`` 0, one pass per step, and one process or
            ``shard``.
        dtype: Of the weights; None: as stored.
        autocast: ``bfloat16``: products in it; None: none.
        gradient_checkpointing: Whether activations are computed a second time instead of kept.
        shard: Whether several processes divide parameters, gradients and optimizer state among them (FSDP2) instead of
            each having all. The source is read whole by each, and the result made whole in each.
        save_steps: A checkpoint after so many steps; None: at an interrupt only.
        evaluate_steps: An evaluation after so many; None: before and after only.
        compare: Whether the model is also evaluated as its source has it and as it is saved, both dense, which takes
            room for that on the device.
        seed: Of everything random.
        device: ``cpu`` or ``cuda``; None: the accelerator that is there, else the CPU.

    Raises:
        ValueError: On a value that cannot be meant, or one that the method does not look at.
    """

    source: Path
    data: Path
    method: str = "resu"
    task: str = "auto"
    validation: Path | None = None
    validation_share: float = 0.1
    encoding: str = "utf-8"
    length: int | None = None
    sparsity: float | None = None
    mask: str | None = None
    prune_method: str = "magnitude"
    pattern: str | None = None
    samples: int = 128
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    theta_init: str = "weight"
    epsilon: float = 0.1
    bits: int | None = None
    theta_dtype: str | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    lora_mode: str = "sparse_to_sparse"
    commit: str = "dense"
    resurrected: float = 0.1
    train_norms: bool = False
    train_biases: bool = False
    train_head: bool = False
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0
    optimizer: str = "adamw"
    in_backward: bool = False
    dtype: str | None = None
    autocast: str | None = None
    gradient_checkpointing: bool = False
    shard: bool = False
    save_steps: int | None = None
    evaluate_steps: int | None = None
    compare: bool = True
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_use(self)

    @property
    def masks(self) -> bool:
        """Whether the method has a mask."""
        return self.method not in ("full", "lora")

    @property
    def has_theta(self) -> bool:
        """Whether it trains θ."""
        return self.method in _THETA

    @property
    def step_size(self) -> float:
        """The learning rate as given, or the method's own."""
        return METHODS[self.method] if self.learning_rate is None else self.learning_rate

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: os.path.realpath(v) if isinstance(v, Path) else v for k, v in values.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What is another value in ``other``, the :meth:`to_json` of an earlier run."""
        now = self.to_json()
        return [
            f"{k.replace('_', '-')} was {other.get(k)}, is {now.get(k)}"
            for k in sorted({*now, *other})
            if now.get(k) != other.get(k)
        ]


def _check_names(config: FinetuneConfig) -> None:
    choices = {
        "method": tuple(METHODS),
        "task": TASKS,
        "theta_init": THETA_STARTS,
        "commit": COMMITS,
        "lora_mode": LORA_MODES,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "dtype": (*DTYPES, None),
        "theta_dtype": (*DTYPES[:2], None),
        "autocast": ("bfloat16", None),
        "device": ("cpu", "cuda", None),
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            listed = ", ".join(k for k in known if k is not None)
            raise ValueError(f"unknown {name.replace('_', '-')} {value!r}; known: {listed}")
    from resu.pruning.importance import importances

    importances[config.prune_method]


def _check_numbers(config: FinetuneConfig) -> None:
    if config.sparsity is not None:
        check_sparsity(config.sparsity)
    if config.bits is not None:
        check_bits(config.bits, "per_channel")
    at_least = {"rank": 1, "batch_size": 1, "accumulate": 1, "steps": 1, "length": 2, "save_steps": 1}
    at_least |= {"evaluate_steps": 1, "samples": 1, "epsilon": 0, "weight_decay": 0, "clip": 0, "alpha": 0}
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name.replace('_', '-')} must be {least} or more, got {value}")
    for name in ("epochs", "learning_rate"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name.replace('_', '-')} must be a positive number, got {value}")
    for name in ("dropout", "warmup", "resurrected"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if config.validation is None and not 0 < config.validation_share < 1:
        raise ValueError(f"validation-share must lie between 0 and 1, got {config.validation_share}")


def _check_use(config: FinetuneConfig) -> None:
    """Refuse what the method does not look at: a run that ignores a setting is not the one that was meant."""
    method = config.method
    if not config.masks and (config.sparsity is not None or config.mask is not None or config.pattern is not None):
        raise ValueError(
            f"{method!r} has no mask and takes no sparsity, mask or pattern; use masked, sparse-lora, resu or qresu"
        )
    if config.sparsity is not None and config.mask is not None:
        raise ValueError("give a sparsity, which prunes anew, or a mask, which says what is pruned; not both")
    if config.mask is not None and config.prune_method != "magnitude":
        raise ValueError("a mask is given, so that nothing is pruned: leave the prune-method out")
    if config.commit != "dense" and not config.has_theta:
        raise ValueError(f"{method!r} has no θ to commit; commit is for {', '.join(_THETA)}")
    if config.commit == "amnesty" and config.pattern is not None and not _free(config.pattern):
        raise ValueError(f"amnesty divides places between single weights, not within {config.pattern}; commit sparse")
    if config.in_backward and (config.clip or config.accumulate > 1):
        raise ValueError(
            "in-backward leaves no gradient behind, which clip and accumulate need; use clip 0 and accumulate 1"
        )
    if config.shard and config.optimizer == "adafactor":
        raise ValueError(
            "torch's Adafactor takes no parameters that lie in parts; use adamw8bit, adamw or sgd with shard"
        )
    if method == "qresu-selective" and config.accumulate > 1:
        raise ValueError("qresu-selective moves θ as each gradient arrives and cannot accumulate; use accumulate 1")
    if config.bits is not None and method not in ("qresu", "qresu-selective", "sparse-lora"):
        raise ValueError(f"bits are for qresu, qresu-selective and sparse-lora, not for {method!r}")
    if config.theta_dtype is not None and not method.startswith("qresu"):
        raise ValueError(f"theta-dtype is for qresu and qresu-selective, not for {method!r}")


def _free(pattern: str) -> bool:
    found = get_pattern(pattern)
    return isinstance(found, Unstructured) and found.scope == "tensor"

"""Configurations of the methods, as ``adapter_config.json`` holds them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from peft.config import PeftConfig

from resu.core.counting import check_sparsity
from resu.core.quantization import check_bits
from resu.integrations.peft.registration import add_peft_type
from resu.pruning.importance import importances

__all__ = ["QRESUAdapterConfig", "RESUAdapterConfig", "ResurrectionConfig"]

STARTS = ("weight", "zeros", "normal")


@dataclass
class ResurrectionConfig(PeftConfig):
    """What :class:`RESUAdapterConfig` and :class:`QRESUAdapterConfig` share; use one of these.

    Args:
        sparsity: Share of each target weight at which θ trains, in [0, 1): exactly ``floor(n * sparsity)`` positions.
        method: The score that chooses which: the positions of the lowest. ``"magnitude"``, or any registered
            importance. ``"wanda"`` and others that look at data need ``stats``.
        init_theta: What θ starts at. ``"weight"``: the pruned weights themselves, so that nothing is lost at the start
            (for a dense pretrained model). ``"zeros"``: the pruned network. ``"normal"``: N(0, (``epsilon``·σ)²), σ the
            standard deviation of the kept weights.
        epsilon: See ``init_theta="normal"``.
        target_modules: As in PEFT: names, a regular expression or ``"all-linear"``. ``nn.Linear``, ``Conv1D`` of
            transformers and ``nn.Conv2d`` can be targets. By default the modules that LoRA has for the architecture.
        exclude_modules: Names or a regular expression of what is no target.
        layers_to_transform: Numbers of the layers that are targets.
        layers_pattern: Name of the list of layers these numbers mean.
        modules_to_save: Further modules that train and are saved whole (a new head).
        bias: ``"none"``, ``"all"`` or ``"NAME_only"`` (``"resu_only"``, ``"qresu_only"``): which biases train too.
        masks: ``{weight or module name: mask}`` (SparseMask or bool tensor of the weight's shape, True = kept) or the
            path of a file of masks; used instead of ``sparsity`` and ``method``. Not stored here: masks lie in the
            adapter file.
        stats: ``{weight or module name: Stats}`` as :func:`resu.pruning.statistics.collect` gives, for a method that
            needs them. Not stored.
        stored: True in a saved file: masks and θ are read from the adapter file beside it, none are made.

    Raises:
        ValueError: On an unknown name or a value out of range; the error says what is allowed.
    """

    sparsity: float = 0.5
    method: str = "magnitude"
    init_theta: str = "weight"
    epsilon: float = 0.1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    masks: Any = field(default=None, repr=False)
    stats: Any = field(default=None, repr=False)
    stored: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.target_modules = as_set(self.target_modules)
        self.exclude_modules = as_set(self.exclude_modules)
        check_sparsity(self.sparsity)
        if self.masks is None and not self.stored:
            importances[self.method]  # an unknown name is an error that lists the known ones
        if self.init_theta not in STARTS:
            raise ValueError(f"unknown init_theta {self.init_theta!r}; known: {', '.join(STARTS)}")

    def to_dict(self) -> dict[str, Any]:
        """What is written to ``adapter_config.json``: plain values; masks and statistics are not among them."""
        return stored_fields(self)


@dataclass
class RESUAdapterConfig(ResurrectionConfig):
    """RESU as a method of PEFT: the weights of lowest score train, the others stay as they are, bit for bit.

    A mask per target weight, and θ, one contiguous parameter, at its pruned positions: ``W_eff = M⊙W + Φ(θ)``. The base
    weight is not touched, so adapters can be several, switched off and unmerged exactly. Arguments as of
    :class:`ResurrectionConfig`.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapted = get_peft_model(model, RESUAdapterConfig(sparsity=0.25, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in adapted.named_parameters() if p.requires_grad}
        {'base_model.model.0.resu_theta.default': (8,)}
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("RESU")
        check_bias(self.bias, "resu_only")


@dataclass
class QRESUAdapterConfig(ResurrectionConfig):
    """QRESU as a method of PEFT: as RESU, with the kept weights as codes of 4 or 8 bits and the dense weight freed.

    The base weight is gone after it: there is one adapter per model, it cannot be switched off, and ``unload`` is
    refused; ``merge_and_unload`` gives the dense model that was trained. Arguments as of :class:`ResurrectionConfig`,
    and:

    Args:
        bits: 4 or 8.
        qscheme: ``"per_channel"`` (a scale per output) or ``"per_tensor"``.

    Example:
        >>> QRESUAdapterConfig(sparsity=0.5, bits=8).to_dict()["bits"]
        8
    """

    bits: int = 4
    qscheme: str = "per_channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("QRESU")
        check_bias(self.bias, "qresu_only")
        check_bits(self.bits, self.qscheme)


def as_set(names: Any) -> Any:
    """A list of names as the set that PEFT works with; anything else as it is."""
    return set(names) if isinstance(names, (list, tuple)) else names


def check_bias(bias: str, only: str) -> None:
    """Raise ``ValueError`` unless ``bias`` is one that PEFT knows for this method."""
    if bias not in ("none", "all", only):
        raise ValueError(f"unknown bias {bias!r}; known: none, all, {only}")


def stored_fields(config: Any, without: Iterable[str] = ("masks", "stats")) -> dict[str, Any]:
    """The fields of a configuration as plain values, marked as stored."""
    names = [item.name for item in fields(config) if item.name not in without]
    return {**{name: deepcopy(getattr(config, name)) for name in names}, "stored": True}

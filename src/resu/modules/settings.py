"""The modes of a resurrection layer, their settings, and the errors about them."""

from __future__ import annotations

import enum
import math
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from resu.core.quantization import SCHEMES, check_bits
from resu.core.selective import SelectionConfig

__all__ = ["FrozenWeightError", "ModeError", "RESUMode", "Settings"]


class RESUMode(enum.Enum):
    """What a layer holds, and what of it trains.

    ``DENSE``: a plain layer. ``SPARSE``: pruned positions are 0 and stay 0. ``RESU``: active weights are
    frozen, θ at pruned positions trains inside ``weight``. ``QRESU``: active weights are 4- or 8-bit codes, θ
    is a parameter of its own, there is no dense weight. ``QRESU_SELECTIVE``: the same, and the layer updates
    θ itself.
    """

    DENSE = "dense"
    SPARSE = "sparse"
    RESU = "resu"
    QRESU = "qresu"
    QRESU_SELECTIVE = "qresu_selective"

    @property
    def quantized(self) -> bool:
        """Whether active weights are held as codes."""
        return self in (RESUMode.QRESU, RESUMode.QRESU_SELECTIVE)

    @property
    def resurrects(self) -> bool:
        """Whether there is a θ."""
        return self.quantized or self is RESUMode.RESU


class ModeError(RuntimeError):
    """A call that is illegal in the present mode; names the mode and the legal calls."""


class FrozenWeightError(RuntimeError):
    """Active weights changed between enter and exit although they were frozen."""


_PRUNE = ("prune_by_magnitude", "prune_by_wanda", "set_mask")
_ENTER = ("enter_resu_mode", "enter_qresu_mode", "enter_qresu_selective_mode")
LEGAL: dict[RESUMode, tuple[str, ...]] = {
    RESUMode.DENSE: _PRUNE,
    RESUMode.SPARSE: (*_PRUNE, *_ENTER, "remove_mask"),
    RESUMode.RESU: ("resu_step", "exit_resu_mode"),
    RESUMode.QRESU: ("exit_qresu_mode",),
    RESUMode.QRESU_SELECTIVE: ("exit_qresu_mode",),
}


def illegal(call: str, mode: RESUMode, hint: str = "") -> ModeError:
    """The error for ``call`` in ``mode``."""
    legal = ", ".join(f"{name}()" for name in LEGAL[mode])
    return ModeError(f"{call}() is illegal in mode {mode.name}{f': {hint}' if hint else ''}; legal calls are {legal}")


_MODES = list(RESUMode)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Settings:
    """What was asked for when the present mode was entered.

    Kept in a ``state_dict`` as one float64 vector (:meth:`to_tensor`), which every file format can hold.
    """

    mode: RESUMode = RESUMode.DENSE
    bits: int = 4
    qscheme: str = SCHEMES[0]
    epsilon: float = 0.1
    use_selective: bool = False
    lr: float = 1e-4
    weight_decay: float = 0.0
    selective_config: SelectionConfig = field(default_factory=SelectionConfig)
    theta_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits, self.qscheme)
        for name in ("epsilon", "lr", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number >= 0, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if not isinstance(self.selective_config, SelectionConfig):
            raise TypeError(f"selective_config must be a SelectionConfig, got {self.selective_config!r}")
        if self.theta_dtype not in _DTYPES:
            raise ValueError(f"theta_dtype must be one of {_DTYPES}, got {self.theta_dtype!r}")

    def to_tensor(self) -> Tensor:
        """All fields as float64: version, then the fields in order, the selection's five at the end."""
        return torch.tensor(
            [
                1.0,
                _MODES.index(self.mode),
                self.bits,
                SCHEMES.index(self.qscheme),
                self.epsilon,
                float(self.use_selective),
                self.lr,
                self.weight_decay,
                _DTYPES.index(self.theta_dtype),
                *asdict(self.selective_config).values(),
            ],
            dtype=torch.float64,
        )

    @classmethod
    def from_tensor(cls, values: Tensor) -> Settings:
        """Inverse of :meth:`to_tensor`.

        Raises:
            ValueError: If the vector is damaged or from a newer version.
        """
        expected = cls().to_tensor()
        if values.shape != expected.shape or not values.is_floating_point():
            raise ValueError(
                f"expected a floating vector of {expected.numel()} values, got {values.dtype} "
                f"of shape {tuple(values.shape)}"
            )
        version, mode, bits, scheme, epsilon, selective, lr, decay, dtype, *config = values.double().tolist()
        if version != 1.0:
            raise ValueError(f"unknown version {version:g}; this library reads version 1")
        try:
            names = [f.name for f in fields(SelectionConfig)]
            return cls(
                mode=_MODES[int(mode)],
                bits=int(bits),
                qscheme=SCHEMES[int(scheme)],
                epsilon=epsilon,
                use_selective=bool(selective),
                lr=lr,
                weight_decay=decay,
                selective_config=SelectionConfig(**dict(zip(names, config, strict=True))),
                theta_dtype=_DTYPES[int(dtype)],
            )
        except (IndexError, OverflowError) as error:
            raise ValueError(f"damaged settings {values.tolist()}: {error}") from None

"""Settings of resurrection cycles, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from resu.core.counting import check_sparsity
from resu.core.schedule import Constant, Cosine, Cubic, Linear, Schedule
from resu.core.selective import SelectionConfig
from resu.pruning.allocation import allocations
from resu.pruning.amnesty import AmnestyConfig
from resu.pruning.importance import importances

__all__ = [
    "RESUConfig",
    "SparsitySchedule",
    "aggressive_pruning_config",
    "conservative_pruning_config",
    "default_config",
    "densification_config",
    "quick_test_config",
]


class SparsitySchedule(StrEnum):
    """How the target moves from ``initial_sparsity`` to ``target_sparsity`` over the cycles."""

    CONSTANT = "constant"
    LINEAR = "linear"
    CUBIC = "cubic"
    COSINE = "cosine"


_CHOICES: dict[str, tuple[Any, ...]] = {
    "commit_strategy": ("amnesty", "wanda_reprune", "simple"),
    "amnesty_score_type": ("magnitude", "gradient", "wanda"),
    "resurrection": ("inline", "dormant"),
    "quantize_bits": (None, 4, 8),
    "qscheme": ("per_channel", "per_tensor"),
}


@dataclass
class RESUConfig:
    """Settings of :class:`~resu.training.cycle.RESUTrainer`. Fields may be set until the trainer is built.

    A cycle of ``steps_per_cycle`` optimizer steps has the phases TRAIN, PRUNE, STABILIZE, RESU and COMMIT.

    Args:
        initial_sparsity: Before the first cycle; above 0 the network is pruned to it at once.
        target_sparsity: After the last cycle, exact to one weight.
        sparsity_schedule: How the target moves over the cycles.
        densify: Go down instead of up: the targets are ``densification_schedule``, one cycle each; after a target
            of 0 no mask is left.
        densification_schedule: Targets of the cycles when ``densify``.
        densification_steps: Use only this many targets of it (None: all).
        num_cycles: Cycles; with ``densify`` it is the number of targets.
        steps_per_cycle: Optimizer steps per cycle.
        train_fraction, stabilize_fraction, resu_fraction: Shares of the phases; they add up to 1.
        resu_lr: Learning rate of θ (inline).
        resu_epsilon: θ starts as N(0, (ε·σ_active)²) (inline).
        freeze_active_during_resu: Active weights stay bit-identical in the RESU phase (inline). False lets them
            train on by ``optimizer`` beside θ; not with quantized actives.
        use_selective: θ is updated by the consistency rule of ``resu.core.selective`` instead of Adam (inline).
        selective_beta, selective_tau, selective_k_select_ratio: Its knobs.
        quantize_bits: 4 or 8: active weights are quantized in the RESU phase (QRESU); None: not.
        qscheme: ``"per_channel"`` or ``"per_tensor"``.
        use_amnesty: False prunes again by score instead of the budgeted tournament: ``commit_strategy`` must then
            be another than ``"amnesty"``.
        commit_strategy: ``"amnesty"`` (budgeted tournament), ``"wanda_reprune"`` (merge all θ, prune again by
            Wanda) or ``"simple"`` (merge all θ: dense until the next PRUNE).
        amnesty_r_start, amnesty_r_end: Share of the kept places that the resurrected may take, first and last cycle.
        amnesty_score_type: Ranking in the tournament: |w|, |w·g| or |w|·‖x‖.
        resurrection: ``"inline"``: θ acts in the forward pass of the RESU phase. ``"dormant"``: θ learns from the
            masked pass in all phases and competes to return (:class:`~resu.training.algorithms.RESU`).
        theta_damping: γ of dormant θ; None: 2 where all cycles have one target, else 1.
        tournament_interval: Steps between dormant tournaments.
        freeze_fraction: Last share of the run with a frozen mask (dormant).
        pruning_method: Any registered importance.
        distribution: How the budget is divided over layers at PRUNE: ``"global"``, ``"erk"``, ``"er"``, ``"uniform"``.
        base_lr, weight_decay: Set on every group of the optimizer when given.
        seed: Of θ's start and of random scores.

    Raises:
        ValueError: At construction and again in the trainer, on an illegal value or combination.
        TypeError: On an unknown key.

    Example:
        >>> config = RESUConfig(target_sparsity=0.9, num_cycles=3)
        >>> [round(config.target(c), 3) for c in range(3)]
        [0.3, 0.6, 0.9]
    """

    initial_sparsity: float = 0.0
    target_sparsity: float = 0.5
    sparsity_schedule: SparsitySchedule = SparsitySchedule.LINEAR
    densify: bool = False
    densification_schedule: tuple[float, ...] = (0.7, 0.5, 0.3, 0.1, 0.0)
    densification_steps: int | None = None
    num_cycles: int = 5
    steps_per_cycle: int = 1000
    train_fraction: float = 0.6
    stabilize_fraction: float = 0.1
    resu_fraction: float = 0.3
    resu_lr: float = 1e-4
    resu_epsilon: float = 0.1
    freeze_active_during_resu: bool = True
    use_selective: bool = True
    selective_beta: float = 0.9
    selective_tau: float = 0.5
    selective_k_select_ratio: float = 0.2
    quantize_bits: int | None = None
    qscheme: str = "per_channel"
    use_amnesty: bool = True
    commit_strategy: str = "amnesty"
    amnesty_r_start: float = 0.10
    amnesty_r_end: float = 0.02
    amnesty_score_type: str = "magnitude"
    resurrection: str = "inline"
    theta_damping: float | None = None
    tournament_interval: int = 1
    freeze_fraction: float = 0.3
    pruning_method: str = "magnitude"
    distribution: str = "global"
    base_lr: float | None = None
    weight_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RESUConfig:
        """Build from plain values; an unknown key is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; inverse of :meth:`from_dict`."""
        values = asdict(self)
        values["sparsity_schedule"] = self.sparsity_schedule.value
        values["densification_schedule"] = list(self.densification_schedule)
        return values

    def validate(self) -> None:
        """Check every field and their combination."""
        self.sparsity_schedule = SparsitySchedule(self.sparsity_schedule)
        self.densification_schedule = tuple(self.densification_schedule)
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        check_sparsity(self.target_sparsity, "target_sparsity")
        for target in self.densification_schedule:
            check_sparsity(target, "densification_schedule")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        for name in ("num_cycles", "steps_per_cycle", "tournament_interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        shares = {n: getattr(self, n) for n in ("train_fraction", "stabilize_fraction", "resu_fraction")}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
        if abs(sum(shares.values()) - 1) > 1e-6:
            listing = " + ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ValueError(f"the phases must add up to 1, got {listing} = {sum(shares.values()):g}")
        for name in ("amnesty_r_start", "amnesty_r_end", "freeze_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if not self.resu_lr > 0 or not self.resu_epsilon >= 0:
            raise ValueError(
                f"resu_lr must be positive and resu_epsilon not negative, got {self.resu_lr!r}, {self.resu_epsilon!r}"
            )
        if self.theta_damping is not None and not self.theta_damping > 0:
            raise ValueError(f"theta_damping must be positive, got {self.theta_damping!r}")
        if self.base_lr is not None and not self.base_lr > 0:
            raise ValueError(f"base_lr must be positive, got {self.base_lr!r}")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        importances[self.pruning_method]
        allocations[self.distribution]
        self.selection()
        self._check_combinations()

    def _check_combinations(self) -> None:
        if not self.densify and self.initial_sparsity > self.target_sparsity:
            raise ValueError(
                f"initial_sparsity {self.initial_sparsity} is above target_sparsity {self.target_sparsity}; "
                "set densify=True to go down"
            )
        if self.densify and not self.densification_schedule:
            raise ValueError("densify=True needs a densification_schedule, for example (0.7, 0.5, 0.3, 0.1, 0.0)")
        if self.densification_steps is not None and not (
            1 <= self.densification_steps <= len(self.densification_schedule)
        ):
            raise ValueError(
                f"densification_steps must lie in 1..{len(self.densification_schedule)} (the targets given), "
                f"got {self.densification_steps!r}"
            )
        if not self.use_amnesty and self.commit_strategy == "amnesty":
            raise ValueError(
                "use_amnesty=False contradicts commit_strategy='amnesty'; "
                "set commit_strategy to 'wanda_reprune' or 'simple'"
            )
        if self.densify and self.resu_fraction == 0:
            raise ValueError("densify=True grows by resurrection and needs a resu_fraction above 0")
        needs = importances[self.pruning_method].needs
        if needs and self.train_fraction == 0:
            raise ValueError(
                f"pruning_method {self.pruning_method!r} needs {', '.join(sorted(needs))} from the TRAIN phase; "
                "set a train_fraction above 0"
            )
        if "hessian" in needs:
            raise ValueError(f"pruning_method {self.pruning_method!r} needs a Hessian, which cycles do not collect")
        if self.resurrection == "dormant" and (self.pruning_method, self.commit_strategy) != ("magnitude", "amnesty"):
            raise ValueError(
                "dormant cycles prune and readmit by magnitude in their tournaments; leave pruning_method='magnitude' "
                "and commit_strategy='amnesty'"
            )
        if self.quantize_bits is not None and not self.freeze_active_during_resu:
            raise ValueError("quantized active weights cannot train; set freeze_active_during_resu=True")
        if self.use_selective and not self.freeze_active_during_resu:
            raise ValueError(
                "use_selective=True updates θ alone; set freeze_active_during_resu=True or use_selective=False"
            )
        if self.resurrection == "dormant" and self.quantize_bits is not None:
            raise ValueError(
                "dormant θ learns while active weights train; quantize_bits goes with resurrection='inline'"
            )

    @property
    def commit_score(self) -> str | None:
        """The importance that COMMIT ranks by; None where it merges everything."""
        strategies = {"amnesty": self.amnesty().importance, "wanda_reprune": "wanda", "simple": None}
        return strategies[self.commit_strategy]

    def amnesty(self) -> AmnestyConfig:
        """The settings of the tournament at COMMIT."""
        return AmnestyConfig(
            r_start=self.amnesty_r_start,
            r_end=self.amnesty_r_end,
            total_cycles=self.cycles,
            score_type=self.amnesty_score_type,
        )

    def selection(self) -> SelectionConfig:
        """The settings of the selective rule."""
        return SelectionConfig(
            beta=self.selective_beta,
            tau_stable=self.selective_tau,
            k_select_ratio=self.selective_k_select_ratio,
        )

    @property
    def cycles(self) -> int:
        """Number of cycles the plan has."""
        if not self.densify:
            return self.num_cycles
        return self.densification_steps or len(self.densification_schedule)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole plan."""
        return self.cycles * self.steps_per_cycle

    def target(self, cycle: int) -> float:
        """Sparsity after cycle ``cycle`` (0-based); beyond the plan the last one."""
        if self.densify:
            return self.densification_schedule[min(cycle, self.cycles - 1)]
        kinds: dict[SparsitySchedule, type[Linear] | type[Cubic] | type[Cosine]] = {
            SparsitySchedule.LINEAR: Linear,
            SparsitySchedule.CUBIC: Cubic,
            SparsitySchedule.COSINE: Cosine,
        }
        schedule: Schedule = Constant(self.target_sparsity)
        if self.sparsity_schedule is not SparsitySchedule.CONSTANT:
            schedule = kinds[self.sparsity_schedule](self.initial_sparsity, self.target_sparsity, 0, self.num_cycles)
        return schedule(cycle + 1)

    def phase_steps(self) -> tuple[int, int, int]:
        """Steps of TRAIN, STABILIZE and RESU; they add up to ``steps_per_cycle``."""
        stabilize = round(self.steps_per_cycle * self.stabilize_fraction)
        resu = round(self.steps_per_cycle * self.resu_fraction)
        return self.steps_per_cycle - stabilize - resu, stabilize, resu


def default_config() -> RESUConfig:
    """50 % in 5 cycles of 1000 steps."""
    return RESUConfig()


def aggressive_pruning_config() -> RESUConfig:
    """90 % in 7 cycles on the cubic schedule."""
    return RESUConfig(target_sparsity=0.9, num_cycles=7, sparsity_schedule=SparsitySchedule.CUBIC)


def conservative_pruning_config() -> RESUConfig:
    """50 % in 3 cycles."""
    return RESUConfig(target_sparsity=0.5, num_cycles=3)


def densification_config() -> RESUConfig:
    """From 70 % down to dense: 0.7, 0.5, 0.3, 0.1, 0."""
    return RESUConfig(initial_sparsity=0.7, target_sparsity=0.0, densify=True)


def quick_test_config() -> RESUConfig:
    """50 % in 2 cycles of 100 steps: to see whether everything runs."""
    return RESUConfig(num_cycles=2, steps_per_cycle=100)

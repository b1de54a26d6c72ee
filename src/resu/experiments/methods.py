"""How a network becomes sparse: every method of the comparison as data.

A method turns a :class:`Plan` (how sparse, how many steps, from where) into a :class:`Setting`, which is
plain values: what ran is written beside each result. How much each was tuned is said in docs/honest.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from resu.core.registry import Registry
from resu.experiments.tasks import Regime

__all__ = ["Method", "Plan", "Setting", "methods"]


# What a run asks for anyway; a setting is named without it.
_ASKED = ("sparsity", "target_sparsity")


@dataclass(frozen=True)
class Plan:
    """What a run asks of a method."""

    sparsity: float
    steps: int
    regime: Regime

    def at(self, fraction: float) -> int:
        """The step at a fraction of the run."""
        return round(fraction * self.steps)


@dataclass(frozen=True)
class Setting:
    """What a method does in one run.

    Attributes:
        driver: ``"dense"``, ``"sparsifier"`` or ``"cycles"``.
        algorithm: Registered name of the topology rule (driver ``"sparsifier"``).
        options: Arguments of the rule, or fields of ``RESUConfig``.
        distribution: How the budget is divided over the layers.
        tail: Steps of masked training after the cycles (driver ``"cycles"``).
        pattern: Which positions compete, as ``get_pattern`` reads it; None: single weights of a layer.
    """

    driver: str
    algorithm: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    distribution: str = "erk"
    tail: int = 0
    pattern: str | None = None

    def __str__(self) -> str:
        options = " ".join(f"{key}={value}" for key, value in self.options.items() if key not in _ASKED)
        tail = f"tail={self.tail}" if self.tail else ""
        place = self.distribution if self.driver == "sparsifier" else ""
        pattern = f"pattern={self.pattern}" if self.pattern else ""
        return " ".join(part for part in (self.algorithm or self.driver, place, pattern, options, tail) if part)


Method = Callable[[Plan], Setting]
methods: Registry[Method] = Registry("method")


def _sparsifier(
    algorithm: str, plan: Plan, distribution: str = "erk", pattern: str | None = None, **options: Any
) -> Setting:
    return Setting("sparsifier", algorithm, {"sparsity": plan.sparsity, **options}, distribution, pattern=pattern)


@methods.register("dense")
def dense(plan: Plan) -> Setting:
    """No sparsity: the same steps on all weights."""
    return Setting("dense")


@methods.register("static")
def static(plan: Plan) -> Setting:
    """A random mask (ERK) from the first step on."""
    return _sparsifier("static", plan, init="random")


def _one_shot(plan: Plan, distribution: str) -> Setting:
    begin = 0 if plan.regime == "finetune" else plan.at(0.5)
    return _sparsifier("static", plan, distribution, init="magnitude", begin_step=begin)


@methods.register("one-shot")
def one_shot(plan: Plan) -> Setting:
    """Magnitude once (ERK), then masked training: at the start of fine-tuning, half way from scratch."""
    return _one_shot(plan, "erk")


@methods.register("one-shot-global")
def one_shot_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _one_shot(plan, "global")


def _gradual(plan: Plan, distribution: str) -> Setting:
    begin, end = (0.0, 0.5) if plan.regime == "finetune" else (0.1, 0.6)
    steps: dict[str, Any] = {
        "begin_step": plan.at(begin),
        "end_step": plan.at(end),
        "interval": max(1, plan.steps // 100),
    }
    return _sparsifier("magnitude", plan, distribution, **steps)


@methods.register("gradual")
def gradual(plan: Plan) -> Setting:
    """Gradual magnitude pruning (ERK), cubic ramp."""
    return _gradual(plan, "erk")


@methods.register("gradual-global")
def gradual_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _gradual(plan, "global")


def _dormant(plan: Plan, distribution: str = "erk", ramp: float = 0.5, until: float = 0.85, **more: Any) -> Setting:
    """One shot in fine-tuning, a cubic ramp from scratch; after ``until`` the mask is frozen."""
    options: dict[str, Any] = {"initial_sparsity": None, "end_step": plan.at(until)}
    if plan.regime == "scratch":
        options |= {"initial_sparsity": 0.0, "ramp_end_step": plan.at(ramp)}
    return _sparsifier("resu", plan, distribution, **options, **more)


@methods.register("resu")
def resu(plan: Plan) -> Setting:
    """Dormant resurrection (ERK) with the library's defaults: γ=2 in one shot, γ=1 with a ramp."""
    return _dormant(plan)


@methods.register("resu-global")
def resu_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _dormant(plan, "global")


@methods.register("resu-every-16")
def resu_sparse(plan: Plan) -> Setting:
    """`resu` with a tournament every 16 steps."""
    return _dormant(plan, interval=16)


@methods.register("resu-every-2")
def resu_every_2(plan: Plan) -> Setting:
    """`resu` with a tournament every second step."""
    return _dormant(plan, interval=2)


@methods.register("resu-gamma-3")
def resu_gamma_3(plan: Plan) -> Setting:
    """`resu` with γ=3."""
    return _dormant(plan, gamma=3.0)


@methods.register("dormant-0.3")
def dormant_damped(plan: Plan) -> Setting:
    """Dormant resurrection damped by γ=0.3, a tournament every 16 steps."""
    return _dormant(plan, gamma=0.3, interval=16)


@methods.register("feedback")
def feedback(plan: Plan) -> Setting:
    """Dynamic pruning with feedback (arXiv 2006.07253): γ=1, a new mask every 16 steps."""
    return _dormant(plan, gamma=1.0, interval=16)


def _straight_through(plan: Plan, distribution: str) -> Setting:
    return _sparsifier("resu", plan, distribution, initial_sparsity=None, interval=1, gamma=1.0, fresh_state=False)


@methods.register("straight-through")
def straight_through(plan: Plan) -> Setting:
    """Masked forward, dense update, a new mask at each step (ERK); at the final sparsity from first to last."""
    return _straight_through(plan, "erk")


@methods.register("straight-through-global")
def straight_through_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _straight_through(plan, "global")


def _exchange(algorithm: str, plan: Plan, pattern: str | None = None, **options: Any) -> Setting:
    """Sparse from the first step (ERK): forty exchanges a run, the last at three quarters."""
    steps: dict[str, Any] = {"interval": max(1, plan.steps // 40), "end_step": plan.at(0.75)}
    init = "magnitude" if plan.regime == "finetune" else "random"
    return _sparsifier(algorithm, plan, pattern=pattern, **steps, init=init, **options)


@methods.register("set")
def set_(plan: Plan) -> Setting:
    """SET: drop by magnitude, grow at random (ERK)."""
    return _exchange("set", plan)


@methods.register("rigl")
def rigl(plan: Plan) -> Setting:
    """RigL: drop by magnitude, grow by gradient (ERK)."""
    return _exchange("rigl", plan)


@methods.register("mest")
def mest(plan: Plan) -> Setting:
    """MEST (EM): drop by magnitude and gradient, grow at random (ERK)."""
    return _exchange("mest", plan)


@methods.register("mest-soft")
def mest_soft(plan: Plan) -> Setting:
    """MEST (EM&S): grow first, drop an interval later (ERK)."""
    return _exchange("mest", plan, soft=True)


@methods.register("snfs")
def snfs(plan: Plan) -> Setting:
    """SNFS: grow by momentum, budget moves between layers (ERK at the start)."""
    return _exchange("snfs", plan)


@methods.register("srigl")
def srigl(plan: Plan) -> Setting:
    """SRigL: RigL with constant fan-in and neuron ablation (ERK)."""
    return _exchange("srigl", plan, pattern="row")


def _granet(plan: Plan, distribution: str) -> Setting:
    return _sparsifier("granet", plan, distribution, interval=max(1, plan.steps // 100), end_step=plan.at(0.6))


@methods.register("granet")
def granet(plan: Plan) -> Setting:
    """GraNet from a dense start: gradual pruning with exchanges by gradient (ERK)."""
    return _granet(plan, "erk")


@methods.register("granet-global")
def granet_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _granet(plan, "global")


def _ac_dc(plan: Plan, distribution: str) -> Setting:
    steps: dict[str, Any] = {"begin_step": plan.at(0.1), "interval": max(1, plan.at(0.05)), "end_step": plan.at(0.8)}
    return _sparsifier("ac-dc", plan, distribution, **steps)


@methods.register("ac-dc")
def ac_dc(plan: Plan) -> Setting:
    """AC/DC: dense and sparse phases in turn, a twentieth of the run each (ERK)."""
    return _ac_dc(plan, "erk")


@methods.register("ac-dc-global")
def ac_dc_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _ac_dc(plan, "global")


def _top_kast(plan: Plan, distribution: str) -> Setting:
    return _sparsifier("top-kast", plan, distribution, interval=max(1, plan.steps // 400))


@methods.register("top-kast")
def top_kast(plan: Plan) -> Setting:
    """Top-KAST: sparse forward, backward at twice the density (ERK)."""
    return _top_kast(plan, "erk")


@methods.register("top-kast-global")
def top_kast_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _top_kast(plan, "global")


@methods.register("ste")
def ste(plan: Plan) -> Setting:
    """Straight-through training: masked forward, dense update, a new mask at each step (ERK)."""
    return _sparsifier("ste", plan)


@methods.register("ste-global")
def ste_global(plan: Plan) -> Setting:
    """The same, all layers ranked together."""
    return _sparsifier("ste", plan, "global")


@methods.register("sr-ste")
def sr_ste(plan: Plan) -> Setting:
    """SR-STE: straight-through training that decays pruned weights (ERK)."""
    return _sparsifier("ste", plan, decay=2e-4)


def _cycles(plan: Plan, tail: float = 0.0, **fields: Any) -> Setting:
    """Inline cycles; from a trained network every cycle is at the final sparsity."""
    tuned = {"num_cycles": 5 if plan.regime == "scratch" else 10} | fields
    available = plan.steps - plan.at(tail)
    count = tuned["num_cycles"] = max(1, min(tuned["num_cycles"], available // 2))  # short trials: fewer cycles
    per_cycle = available // count
    start: dict[str, Any] = {"target_sparsity": plan.sparsity, "sparsity_schedule": "constant"}
    if plan.regime == "scratch":
        start = {"target_sparsity": plan.sparsity, "initial_sparsity": 0.0}
    options = start | {"steps_per_cycle": per_cycle, "distribution": "erk"} | tuned
    return Setting("cycles", options=options, tail=plan.steps - count * per_cycle)


@methods.register("inline")
def inline(plan: Plan) -> Setting:
    """RESU as documented: θ acts in the forward while the active weights are frozen; 60/10/30 % phases."""
    return _cycles(plan, use_selective=False)


@methods.register("inline-tail")
def inline_tail(plan: Plan) -> Setting:
    """Short inline phases in many cycles, and masked training over the last third."""
    phases = {"train_fraction": 0.9, "stabilize_fraction": 0.0, "resu_fraction": 0.1}
    return _cycles(plan, tail=1 / 3, use_selective=False, num_cycles=20, **phases)


@methods.register("qresu")
def qresu(plan: Plan) -> Setting:
    """Inline cycles with active weights in 4 bits during resurrection."""
    return _cycles(plan, use_selective=False, quantize_bits=4)


@methods.register("qresu-selective")
def qresu_selective(plan: Plan) -> Setting:
    """As QRESU, with only consistent coordinates of θ updated."""
    return _cycles(plan, use_selective=True, quantize_bits=4)

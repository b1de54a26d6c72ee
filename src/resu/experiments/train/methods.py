"""The method that a configuration names: a preset of the experiments or a registered algorithm, and what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from resu.experiments.methods import Plan, Setting, methods
from resu.experiments.train.typed import ConfigError, check_options
from resu.training.algorithms import algorithms

__all__ = ["check_method", "method_names", "setting_of"]

# Any plan will do to learn which algorithm a method uses.
_ANY = Plan(sparsity=0.5, steps=1000, regime="scratch")


def method_names() -> list[str]:
    """All names that a configuration may use: presets first."""
    driven = [name for name in methods if methods[name](_ANY).driver != "cycles"]
    return [*driven, *(name for name in algorithms if name not in driven)]


def _preset(name: str, plan: Plan) -> Setting:
    """The setting of a preset, or of an algorithm with its own defaults."""
    if name in methods:
        setting = methods[name](plan)
        if setting.driver == "cycles":
            raise ConfigError(
                f"method {name!r} trains in cycles of its own, which RESUTrainer drives; use it in Python, or one of: "
                + ", ".join(method_names())
            )
        return setting
    if name in algorithms:
        return Setting("sparsifier", name, {"sparsity": plan.sparsity})
    raise ConfigError(f"unknown method {name!r}; known: {', '.join(method_names())}")


def check_method(name: str, options: Mapping[str, Any], fields: Iterable[str] = ()) -> dict[str, Any]:
    """The options of a method, checked against the fields of its algorithm.

    Raises:
        ConfigError: If there is no such method, or one of its algorithm has no such option.
    """
    setting = _preset(name, _ANY)
    if setting.driver == "dense":
        if options:
            raise ConfigError(f"method 'dense' has no options, got {', '.join(options)}")
        return {}
    return check_options(algorithms[setting.algorithm], options, "method", fields, ["sparsity"])


def _described(distribution: str | Mapping[str, float]) -> str:
    """A distribution as settings tell it: plain text."""
    if isinstance(distribution, str):
        return distribution
    return ",".join(f"{glob}={sparsity:g}" for glob, sparsity in distribution.items())


def setting_of(method: Any, plan: Plan) -> Setting:
    """What a method does in one run: its preset for the plan, and over that what the configuration says.

    Args:
        method: The section ``method`` of a configuration.
        plan: Sparsity, steps and regime.
    """
    setting = _preset(method.name, plan)
    changed: dict[str, Any] = {"options": {**setting.options, **method.options}}
    if method.distribution is not None:
        changed["distribution"] = _described(method.distribution)
    if method.pattern is not None:
        changed["pattern"] = method.pattern
    return replace(setting, **changed)

"""Settings of cycles: presets, validation, plain values."""

from __future__ import annotations

import json

import pytest

from resu.training import (
    RESUConfig,
    SparsitySchedule,
    aggressive_pruning_config,
    conservative_pruning_config,
    default_config,
    densification_config,
    quick_test_config,
)

PRESETS = [
    default_config,
    aggressive_pruning_config,
    conservative_pruning_config,
    densification_config,
    quick_test_config,
]


def test_documented_presets() -> None:
    aggressive, conservative = aggressive_pruning_config(), conservative_pruning_config()
    assert (aggressive.target_sparsity, aggressive.cycles) == (0.9, 7)
    assert (conservative.target_sparsity, conservative.cycles) == (0.5, 3)
    dense = densification_config()
    assert [dense.target(c) for c in range(dense.cycles)] == [0.7, 0.5, 0.3, 0.1, 0.0]
    quick = quick_test_config()
    assert (quick.num_cycles, quick.steps_per_cycle) == (2, 100)
    assert default_config().phase_steps() == (600, 100, 300)


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_values_round_trip(preset: type[RESUConfig]) -> None:
    config = preset()
    assert RESUConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", list(SparsitySchedule))
def test_the_last_cycle_reaches_the_target_exactly(kind: SparsitySchedule) -> None:
    config = RESUConfig(initial_sparsity=0.2, target_sparsity=0.9, num_cycles=7, sparsity_schedule=kind)
    targets = [config.target(c) for c in range(7)]
    assert targets[-1] == 0.9
    assert targets == sorted(targets)
    assert targets[0] > 0.2


def test_fields_can_be_set_before_the_trainer_is_built() -> None:
    config = default_config()
    config.target_sparsity = 0.75
    config.validate()
    config.commit_strategy = "magic"
    with pytest.raises(
        ValueError, match="commit_strategy must be one of 'amnesty', 'wanda_reprune', 'simple', got 'magic'"
    ):
        config.validate()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must lie in \[0, 1\)"),
        ({"target_sparsity": -0.1}, r"target_sparsity must lie in \[0, 1\)"),
        ({"target_sparsity": float("nan")}, r"target_sparsity must lie in \[0, 1\)"),
        ({"train_fraction": 0.7}, "phases must add up to 1"),
        ({"initial_sparsity": 0.9}, "set densify=True"),
        ({"num_cycles": 0}, "num_cycles must be an integer of at least 1"),
        ({"num_cycles": 2.0}, "num_cycles must be an integer of at least 1"),
        ({"quantize_bits": 3}, "quantize_bits must be one of None, 4, 8"),
        ({"use_amnesty": False}, "contradicts commit_strategy"),
        ({"quantize_bits": 4, "freeze_active_during_resu": False}, "cannot train"),
        ({"resurrection": "dormant", "quantize_bits": 4}, "quantize_bits goes with"),
        ({"amnesty_r_start": 1.5}, r"amnesty_r_start must lie in \[0, 1\]"),
        ({"densify": True, "densification_steps": 9}, "densification_steps must lie in 1..5"),
        ({"sparsity_schedule": "quartic"}, "quartic"),
        ({"pruning_method": "magic"}, "unknown importance 'magic'; known: "),
        ({"distribution": "magic"}, "unknown distribution 'magic'; known: "),
        ({"base_lr": -1.0}, "base_lr must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"densify": True, "resu_fraction": 0.0, "train_fraction": 0.9}, "needs a resu_fraction above 0"),
        ({"pruning_method": "taylor", "train_fraction": 0.0, "resu_fraction": 0.9}, "train_fraction above 0"),
        ({"resurrection": "dormant", "commit_strategy": "simple"}, "leave pruning_method='magnitude'"),
    ],
)
def test_bad_values_say_what_to_do(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RESUConfig(**values)  # type: ignore[arg-type]


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown setting 'sparsity'; known: initial_sparsity"):
        RESUConfig.from_dict({"sparsity": 0.5})
    with pytest.raises(TypeError, match="sparsity"):
        RESUConfig(sparsity=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="target_sparsity must be a number"):
        RESUConfig(target_sparsity="0.5")  # type: ignore[arg-type]

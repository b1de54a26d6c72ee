"""The one row that a run leaves behind."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import resu
from resu.core.io import replacing
from resu.experiments.methods import Setting
from resu.experiments.train.config import Config
from resu.experiments.train.typed import ConfigError, build, plain

__all__ = ["Result", "environment", "read_result", "recipe_of", "settings_of", "write_json"]


@dataclass(frozen=True)
class Result:
    """What came of a run; the fields are the columns of tables.

    Attributes:
        val: The metric on held-out data (what settings are chosen by); ``test`` is what is reported.
        actual_sparsity: Counted over the pruned weights.
        exact: Whether every pruned weight is exactly 0 and the count of kept ones is the integer that was asked for.
        explored: R_s, the share of positions that were ever active.
        training_flops: Of the whole run, against training it dense; ``inference_flops`` likewise.
        seconds: Training alone, without measurements.
        settings: What the method did; ``recipe``: all else, the same for runs that may be compared.
    """

    data: str
    model: str
    method: str
    sparsity: float
    seed: int
    regime: str
    steps: int
    metric: str
    val: float
    test: float
    actual_sparsity: float
    exact: bool
    explored: float
    training_flops: float | None
    inference_flops: float | None
    seconds: float
    settings: str
    recipe: str
    torch: str
    resu: str


def settings_of(config: Config, setting: Setting) -> str:
    """The settings of a method that the sparsity does not decide."""
    method = config.method
    own = {"include": method.include, "exclude": method.exclude}
    given = [f"{key}={','.join(value)}" for key, value in own.items() if value]
    return " ".join([str(setting), *given])


def recipe_of(config: Config) -> str:
    """Everything that two comparable runs share beside data, model and steps, in one line."""
    values = plain(config)
    parts = {key: values[key] for key in ("batch_size", "accumulate", "clip_norm", "label_smoothing")}
    for section in ("optimizer", "schedule"):
        parts |= {f"{section}.{key}": value for key, value in values[section].items()}
    parts |= {f"data.{k}": v for k, v in values["data"].items() if k not in ("name", "dir", "workers")}
    parts |= {f"model.{key}": value for key, value in values["model"].items() if key != "name"}
    parts["precision"] = config.compute.precision
    parts["start"] = config.start is not None
    default = plain(_default_of(config))
    told = {}
    for key, value in parts.items():
        section, _, name = key.rpartition(".")
        usual = default[section].get(name) if section else default.get(key)
        if key in ("batch_size", "optimizer.name", "optimizer.lr", "schedule.name") or value != usual:
            told[key] = value
    told = {key: value for key, value in told.items() if value is not None and value is not False}
    return " ".join(
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in told.items()
    )


def _default_of(config: Config) -> Config:
    """The configuration of the same data and model with nothing else said."""
    return Config(type(config.data)(config.data.name), type(config.model)(config.model.name), steps=1)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a JSON file, whole or not at all."""
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """The row in a ``result.json``.

    Raises:
        ConfigError: If it is not the result of a run.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return build(Result, {field.name: document[field.name] for field in fields(Result)}, str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the result of a run: {type(error).__name__} {error}") from None


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Where a run was computed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "machine": name,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resu": resu.__version__,
    }

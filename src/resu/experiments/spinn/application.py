"""The application: one quantity from its recording to a sparse twin, figures and a one-page report."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resu.core.io import FileFormatError, replacing
from resu.experiments.spinn.adaptation import compare_adaptation, first_part
from resu.experiments.spinn.fitting import Recipe, physics_rms
from resu.experiments.spinn.latency import latencies, packed
from resu.experiments.spinn.laws import law_for
from resu.experiments.spinn.neurons import remove_neurons, widths
from resu.experiments.spinn.page import page
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.ridge import ridge, ridge_penalty
from resu.experiments.spinn.runs import dense_twin, recipe_for
from resu.experiments.spinn.sparse import STAGES, TARGET, kept, prune_in_stages
from resu.experiments.spinn.twin import HIDDEN, Twin, dense_network, score
from resu.pruning.snapshots import model_checksum, read_model, write_model
from resu.pruning.stage_plan import plan_stages
from resu.pruning.stages import IterativeResult

__all__ = ["Settings", "build"]

QUICK = Recipe(steps=30, tune=10, rate=3e-4, tune_rate=3e-4)
QUICK_HIDDEN = (64, 64, 64, 32)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What is to be built.

    Attributes:
        quantity: ``"wear"``, ``"milling"`` or ``"thermal"``.
        sparsity: Of the network's weights after the last stage.
        stages: How many, or the fraction of what is still active that each removes.
        physics: Whether the law is part of the loss.
        max_drop: R² on the validation part that a stage may cost; more, and it is taken back. None: any.
        quick: A small network and few steps: to see that everything runs.
        seed: Of everything random.
    """

    quantity: str
    sparsity: float = TARGET
    stages: int | tuple[float, ...] = STAGES
    physics: bool = True
    max_drop: float | None = None
    quick: bool = False
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        """Steps and rates."""
        return QUICK if self.quick else recipe_for(self.quantity, physics=self.physics)

    @property
    def hidden(self) -> Sequence[int]:
        """Widths of the dense network."""
        return QUICK_HIDDEN if self.quick else HIDDEN


def build(
    settings: Settings,
    data_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Train, prune in stages, take neurons out, measure, draw and report; a run that was stopped goes on in ``out``.

    Writes ``dense.safetensors``, ``stages/`` (a checkpoint per stage), ``sparse.safetensors``,
    ``structured.safetensors``, ``measured.png``, ``removed.png``, ``report.md`` and ``report.json``.

    Args:
        settings: What.
        data_folder: The folder of data sets.
        out: A folder; made if it is not there.
        progress: Called ``(done, total, what)``.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: If stages miss the sparsity, or ``out`` holds a run with other settings.
        FileNotFoundError: Without the data.
    """
    plan = plan_stages(settings.sparsity, settings.stages)  # before the work: a plan that misses ends it
    data = load_recording(settings.quantity, data_folder).prepare()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _same_run(out / "settings.json", settings)
    total = len(plan) + 4
    progress(0, total, "dense network")
    dense = _dense(settings, data, out / "dense.safetensors")
    sparse = copy.deepcopy(dense)
    torch.manual_seed(settings.seed)
    result = prune_in_stages(
        sparse,
        data,
        settings.recipe,
        plan=plan,
        target=settings.sparsity,
        checkpoints=out / "stages",
        max_drop=settings.max_drop,
        progress=lambda done, _, what: progress(1 + done, total, what),
    )
    result.release()
    progress(1 + len(plan), total, "neurons")
    torch.manual_seed(settings.seed)
    structured, difference = remove_neurons(dense, data, settings.recipe, target=settings.sparsity)
    progress(2 + len(plan), total, "new tools")
    new_tools = _new_tools(settings, data, sparse)
    progress(3 + len(plan), total, "report")
    twins = {"dense": dense, "sparse": sparse, "structured": structured}
    for name in ("sparse", "structured"):
        write_model(twins[name], out / f"{name}.safetensors", overwrite=True)
    report = _report(settings, data, twins, result, difference) | {"new_tools": new_tools}
    _write(out, report, data, twins)
    progress(total, total, "done")
    return report


def _same_run(path: Path, settings: Settings) -> None:
    wanted = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise FileFormatError(f"{path} is damaged; use another folder, or start over in this one") from None
        if found != wanted:
            other = sorted(key for key in wanted if found.get(key) != wanted[key])
            raise ValueError(
                f"{path.parent} holds a run with other settings ({', '.join(other)}); use another folder, or start over"
            )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _dense(settings: Settings, data: Prepared, path: Path) -> Twin:
    """Trained, or read where a run left it."""
    seal = path.with_suffix(".json")
    if path.exists() and seal.exists():
        network = dense_network(data.inputs.shape[1], data.targets.shape[1], settings.hidden)
        twin = Twin(network, data.targets[data.train], law_for(data) if settings.physics else None)
        read_model(twin, path, json.loads(seal.read_text(encoding="utf-8"))["checksum"])
        return twin
    twin = dense_twin(data, settings.recipe, settings.seed, physics=settings.physics, hidden=settings.hidden)
    write_model(twin, path, overwrite=True)
    with replacing(seal, overwrite=True) as temporary:
        temporary.write_text(json.dumps({"checksum": model_checksum(twin)}) + "\n", encoding="utf-8")
    return twin


def _new_tools(settings: Settings, data: Prepared, sparse: Twin) -> list[dict[str, Any]]:
    """What adapting to each held-out group does, and what training anew does; both see the first part of its life."""
    found = []
    for group in data.recording.parts[2]:
        if all(len(part) for part in first_part(data, group)):
            result = compare_adaptation(sparse, data, group, [None], settings.recipe, seed=settings.seed)
            (adapted,) = result.adapted
            found.append({"group": group, **asdict(result), "adapted": adapted})
    return found


def _report(
    settings: Settings, data: Prepared, twins: Mapping[str, Twin], result: IterativeResult, difference: float
) -> dict[str, Any]:
    test, y = data.test, data.targets
    penalty = ridge_penalty(data)
    line = ridge(data, penalty)
    networks: dict[str, Any] = {
        "ridge": {"r2": score(line[test], y[test]), "parameters": (data.inputs.shape[1] + 1) * y.shape[1]}
    }
    networks["ridge"]["rmse"] = (line[test] - y[test]).square().mean(0).sqrt().tolist()
    full = kept(twins["dense"])
    times = _times(data, twins)
    for name, twin in twins.items():
        predicted = twin.predict(data.inputs[test])
        networks[name] = {
            "r2": score(predicted, y[test]),
            "rmse": (predicted - y[test]).square().mean(0).sqrt().tolist(),
            "parameters": kept(twin),
            "removed": 1 - kept(twin) / full,
            "widths": list(widths(twin.network)),
            "physics": {n: {"rms": rms, "unit": unit} for n, (rms, unit) in physics_rms(twin, data, test).items()},
            "constants": {} if twin.law is None else twin.law.constants(),
        }
    recording = data.recording
    return {
        "settings": json.loads(json.dumps(asdict(settings))),
        "unit": recording.unit,
        "channels": list(recording.channels),
        "held_out": {recording.group_name: list(recording.parts[2]), "rows": len(test)},
        "ridge_penalty": penalty,
        "networks": networks,
        "stages": result.history,
        "rolled_back": result.rolled_back,
        "validation_before": result.baseline,
        "structured_difference": difference,
        "latency_us": {name: 1e6 * seconds for name, seconds in times.items()},
    }


def _times(data: Prepared, twins: Mapping[str, Twin]) -> dict[str, float]:
    x = data.inputs[data.test[:1]]

    def plain(twin: Twin) -> Callable[[], object]:
        return lambda: twin.predict(x)

    rows = packed(twins["sparse"].network)
    calls = {name: plain(twin) for name, twin in twins.items()}
    calls["sparse, packed"] = lambda: rows(x)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return latencies(calls, rounds=30)
    finally:
        torch.set_num_threads(before)


def _write(out: Path, report: Mapping[str, Any], data: Prepared, twins: Mapping[str, Twin]) -> None:
    from resu.experiments.plots import to_png
    from resu.experiments.spinn.figures import draw_measured, draw_removed

    predictions = {name: twin.predict(data.inputs) for name, twin in twins.items()}
    smaller = {name: twin.network for name, twin in twins.items() if name != "dense"}
    files = {
        "measured.png": to_png(draw_measured(data, predictions)),
        "removed.png": to_png(draw_removed(smaller, twins["dense"].network)),
        "report.md": page(report).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    for name, content in files.items():
        with replacing(out / name, overwrite=True) as temporary:
            temporary.write_bytes(content)

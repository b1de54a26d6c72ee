"""The sparse twin of a machine tool in small: flank wear of tools that training never saw, with and without 70 % of it.

Run: python examples/spinn.py
"""

import os
import sys
from pathlib import Path

import torch

from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.laws import law_for
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.ridge import ridge, ridge_penalty
from resu.experiments.spinn.sparse import prune_in_stages
from resu.experiments.spinn.twin import Twin, dense_network, score

# A recording of 13 tools; resu.experiments.spinn.recording.Recording takes your own machine's.
data_folder = Path(os.environ.get("RESU_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
if not (data_folder / "tool_wear_vicomtech").is_dir():
    print(f"skipped: no tool_wear_vicomtech in {data_folder} (set RESU_DATA)")
    sys.exit()
data = load_recording("wear", data_folder).prepare()
recipe = Recipe(steps=40, tune=10, rate=3e-4, tune_rate=1e-4)


def held_out(predicted: torch.Tensor) -> float:
    return score(predicted[data.test], data.targets[data.test])


torch.manual_seed(0)
network = dense_network(data.inputs.shape[1], 1, hidden=(128, 128, 128, 64))  # (512, 512, 512, 256) in earnest
twin = fit(Twin(network, data.targets[data.train], law_for(data)), data, recipe)
print(f"R² on tools {data.recording.parts[2]}: ridge {held_out(ridge(data, ridge_penalty(data))):.3f}")
print(f"dense network:  {held_out(twin.predict(data.inputs)):.3f}")

result = prune_in_stages(twin, data, recipe)  # four stages to exactly 70 %, masks held while fine-tuning
result.release()
print(f"70 % sparse:    {held_out(twin.predict(data.inputs)):.3f}")
for stage in result.stages:
    print(f"  stage {stage.stage}: {stage.actual:.4f} pruned, validation R² {stage.score:.3f}")
print("learned:", twin.law.constants())

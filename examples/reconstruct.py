"""A language model pruned to half and repaired block by block, towards the dense model's activations.

Run: python examples/reconstruct.py
"""

import copy
import os
import sys
import tempfile
from pathlib import Path

from resu.experiments.llama2c import write_hf_directory
from resu.experiments.stories import write_stories
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import perplexity
from resu.integrations.hf_text import calibration_batches
from resu.pruning.one_shot import prune_model
from resu.pruning.reconstruction import reconstruct

# A small trained model and texts; your own directory and files take their place.
data = Path(os.environ.get("RESU_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
if not (data / "model_stories260K").is_dir():
    print(f"skipped: no model_stories260K in {data} (set RESU_DATA)")
    sys.exit()
folder = Path(tempfile.mkdtemp())
dense, tokenizer = load_model(write_hf_directory(data / "model_stories260K", folder / "model"))
calibration = write_stories(dense, tokenizer, folder / "calibration.jsonl", count=40, tokens=96, seed=0)
evaluation = write_stories(dense, tokenizer, folder / "evaluation.jsonl", count=16, tokens=96, seed=1)
batches = calibration_batches(tokenizer, calibration, samples=32, length=64, batch_size=4)
print("dense:   ", perplexity(dense, tokenizer, evaluation).perplexity)

model = copy.deepcopy(dense)
masks = prune_model(model, 0.5, "magnitude").masks
print("pruned:  ", perplexity(model, tokenizer, evaluation).perplexity)

result = reconstruct(model, masks, dense=dense, calibration=batches, epochs=3)
print("repaired:", perplexity(model, tokenizer, evaluation).perplexity)
for block in result.report["blocks"]:
    print(f"  {block['name']}: error {block['before']:.3f} → {block['after']:.3f}")

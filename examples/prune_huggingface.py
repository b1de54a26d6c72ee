"""A Hugging Face model pruned in Python: loaded, pruned layer by layer, evaluated and written.

Run: python examples/prune_huggingface.py
"""

import os
import sys
from pathlib import Path

from resu.experiments.stories import main as make_small_model
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import perplexity
from resu.integrations.hf_save import save_pruned
from resu.integrations.hf_text import calibration_batches
from resu.pruning.one_shot import prune_model

# A small trained model and texts; your own directory and files take their place.
data = Path(os.environ.get("RESU_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
if not (data / "model_stories260K").is_dir():
    print(f"skipped: no model_stories260K in {data} (set RESU_DATA)")
    sys.exit()
make_small_model(["small", "--data", str(data)])

model, tokenizer = load_model("small/model")
print("dense:", perplexity(model, tokenizer, "small/evaluation.jsonl").perplexity)

batches = calibration_batches(tokenizer, "small/calibration.jsonl", samples=32, length=256)
result = prune_model(model, 0.5, "wanda", calibration=batches, update="sparsegpt")
print("pruned:", perplexity(model, tokenizer, "small/evaluation.jsonl").perplexity)
print("sparsity:", result.report["actual"], "of the layers,", round(result.report["total"], 3), "of all parameters")

save_pruned(model, tokenizer, result, source="small/model", out="small/pruned")
again, _ = load_model("small/pruned")
print("ties kept:", again.lm_head.weight is again.model.embed_tokens.weight)

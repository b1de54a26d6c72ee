"""Fine-tune a small language model without touching its strong weights: θ at pruned positions trains alone (RESU)."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resu.core.mask_files import read_masks
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import finetune

# A directory as `save_pretrained` leaves it; any local Hugging Face directory will do.
ANIMALS, VERBS, PLACES = ["cat", "dog", "bird"], ["sat", "ran", "flew"], ["mat", "house", "tree"]
WORDS = [*ANIMALS, *VERBS, *PLACES, "the", "by", "and", "then", "slept"]
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "[EOS]", *WORDS])}, "[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]").save_pretrained("model")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 2, max_position_embeddings=64, **sizes)).save_pretrained("model")

stories = [f"the {a} {v} by the {p} and then the {a} slept" for a, v, p in zip(ANIMALS, VERBS, PLACES, strict=True)]
Path("text.txt").write_text("\n".join(stories * 40))

report = finetune(
    FinetuneConfig(
        source=Path("model"),
        data=Path("text.txt"),
        method="resu",
        sparsity=0.5,
        commit="amnesty",  # the sparsity stays, and at most a tenth of the places goes to θ
        steps=20,
        batch_size=8,
        length=32,
        learning_rate=1e-2,
        device="cpu",
    ),
    "tuned",
)
found = report["evaluation"]
for moment in ("source", "start", "end", "saved"):
    print(f"perplexity, {moment:6}: {found[moment]['perplexity']:.3f}")
print(f"trained {report['trained']} of {report['parameters']} values, sparsity {report['sparsity']:.3f}")

model = AutoModelForCausalLM.from_pretrained("tuned")
masks, _ = read_masks("tuned/masks.safetensors")
assert all(not model.get_parameter(name)[~mask.mask].any() for name, mask in masks.items())
print("memory of a step:", json.dumps(report["memory"]))

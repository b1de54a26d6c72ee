"""Fine-tune a pruned model by low-rank updates that keep its zeros, in training and at the merge (sparse LoRA)."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resu.formats.validate import validate
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import finetune
from resu.integrations.hf_prune import prune_directory

TEXT = "one two three four five six seven eight nine ten and so on it goes"
WORDS = TEXT.split()
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "[EOS]", *WORDS])}, "[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]").save_pretrained("model")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 2, max_position_embeddings=64, **sizes)).save_pretrained("model")
Path("text.txt").write_text(f"{TEXT}\n" * 60)

prune_directory("model", "pruned", pattern="2:4")
report = finetune(
    FinetuneConfig(
        source=Path("pruned"),  # its masks lie beside it
        data=Path("text.txt"),
        method="sparse-lora",
        rank=4,
        alpha=8.0,
        steps=20,
        batch_size=8,
        length=32,
        learning_rate=1e-2,
        device="cpu",
    ),
    "tuned",
    keep_adapter=True,
)
found = report["evaluation"]
print(f"perplexity: {found['start']['perplexity']:.3f} before, {found['saved']['perplexity']:.3f} merged and saved")
print(f"trained {report['trained']} of {report['parameters']} values, sparsity {report['sparsity']}")
print("zeros, masks and 2:4 agree:", validate("tuned", sparsity=0.5, pattern="2:4")["ok"])
print("adapter by itself:", sorted(path.name for path in Path("tuned/adapter").iterdir()))

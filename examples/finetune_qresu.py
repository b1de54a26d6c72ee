"""Fine-tune a small classifier over frozen 4-bit weights: no dense weight, θ alone has an optimizer (QRESU)."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, pipeline

from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import finetune

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
GOOD, BAD = ["good", "great", "fine"], ["bad", "poor", "dull"]
OTHERS = ["the", "a", "film", "story", "is", "was", "and", "very", "it", "of"]
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *GOOD, *BAD, *OTHERS])}, "[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
).save_pretrained("model")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
BertModel(BertConfig(vocab_size=len([*SPECIAL, *GOOD, *BAD, *OTHERS]), **sizes)).save_pretrained("model")

draw = random.Random(0)
with open("reviews.tsv", "w") as file:
    print("text\tlabel", file=file)
    for _ in range(240):
        label = draw.choice(["positive", "negative"])
        text = [*draw.choices(OTHERS, k=6), draw.choice(GOOD if label == "positive" else BAD)]
        print(" ".join(draw.sample(text, len(text))) + f"\t{label}", file=file)

report = finetune(
    FinetuneConfig(
        source=Path("model"),
        data=Path("reviews.tsv"),
        method="qresu",
        bits=4,
        theta_dtype="bfloat16",
        sparsity=0.5,
        steps=30,
        learning_rate=3e-3,
        device="cpu",
    ),
    "tuned",
)
found = report["evaluation"]
print(f"accuracy: {found['start']['accuracy']:.3f} before, {found['end']['accuracy']:.3f} after")
for kind, size in report["memory"]["kinds"].items():
    print(f"{kind:>10}: {size:8} bytes")
classify = pipeline("text-classification", model="tuned", device="cpu")
print(classify("the film was very good"), classify("it is a dull story"))

"""What the tests of the PEFT methods share: small models, and adapters that have been moved."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

# PEFT 0.21 asks transformers 5.23 for an attribute by its former name.
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
VOCABULARY = 40


class Convolutional(nn.Module):
    """A grouped and a strided convolution, one with circular padding, and a linear head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular")
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean(dim=(2, 3)))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "conv": Convolutional}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
    "conv": ["first", "second", "head"],
}


def base_model(kind):
    """The same weights at every call; targets are 0 at a tenth of their positions, where :func:`masks` prune."""
    torch.manual_seed(1)
    model = MODELS[kind]().eval()
    for layer, mask in _masked(kind, model):
        layer.weight.data.mul_(mask)  # also -0.0
    return model


def masks(kind):
    """``{parameter name: mask}`` of the targets."""
    model = MODELS[kind]()
    found = dict(_masked(kind, model))
    return {f"{name}.weight": found[layer] for name, layer in model.named_modules() if layer in found}


def _masked(kind, model):
    generator = torch.Generator().manual_seed(4)
    for name, layer in model.named_modules():
        if name.split(".")[-1] in TARGETS[kind]:
            yield layer, torch.rand(layer.weight.shape, generator=generator) >= 0.1


def example(kind):
    """Inputs of a model as keyword arguments."""
    generator = torch.Generator().manual_seed(2)
    if kind == "conv":
        return {"x": torch.randn(2, 4, 6, 6, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator)}


def run(model, inputs):
    y = model(**inputs)
    return getattr(y, "logits", y)


def trained(model, adapter="default", scale=0.1):
    """Move what trains of an adapter, as training would; returns the model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name and "original_module" not in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def adapted(kind, config, **options):
    """A trained adapter around a base model."""
    return trained(get_peft_model(base_model(kind), config, **options).eval())

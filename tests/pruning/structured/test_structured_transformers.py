"""Models of transformers, whose code the pruner was not told of: grouped queries, fused qkv, ties, experts."""

import pytest
import torch

from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.removal import mask_tensors
from resu.pruning.structured.verify import compare, double_copy

transformers = pytest.importorskip("transformers")

IDS = torch.arange(9)[None] * 5 % 50
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def mixtral():
    config = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **SMALL)
    return transformers.MixtralForCausalLM(config)


def opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(vocab_size=50, max_position_embeddings=40, word_embed_proj_dim=32, **sizes)
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "heads", "neurons"),
    [
        (llama, {"model.layers.0.self_attn.q_proj": (2, 1)}, {"model.layers.0.mlp.gate_proj": (48, 24)}),
        (bert, {"encoder.layer.1.attention.self.query": (4, 2)}, {"encoder.layer.1.intermediate.dense": (48, 24)}),
        (gpt2, {"transformer.h.0.attn.c_attn": (4, 2)}, {"transformer.h.0.mlp.c_fc": (128, 64)}),
        (opt, {"model.decoder.layers.0.self_attn.k_proj": (4, 2)}, {"model.decoder.layers.1.fc1": (48, 24)}),
        (mixtral, {"model.layers.0.self_attn.q_proj": (2, 1)}, {}),
    ],
)
def test_heads_and_neurons(make, heads, neurons):
    torch.manual_seed(0)
    model = make().eval()
    inputs = {"input_ids": IDS}
    masked = double_copy(model)
    result = StructuredPruner(0.5, inputs).prune(model)
    assert result.units.items() >= (heads | neurons).items()
    mask_tensors(masked, result.slices)
    check = compare(masked, double_copy(model), {"input_ids": IDS.flip(1)}, 1e-9)
    assert check, check.reason
    if hasattr(model, "lm_head") and model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.get_input_embeddings().weight

"""Tiny Hugging Face models with random weights, and batches for them."""

import pytest
import torch

VOCAB, TOKENS = 48, 9
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


def _random(kind, config, seed=0):
    """Weights large enough that layers, routers and attention do something; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def llama(layers=2, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2, **options)
    return _random(transformers.LlamaForCausalLM, config)


def gpt2(layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=layers, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return _random(transformers.GPT2LMHeadModel, config)


def mixtral(layers=2, experts=4, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        **SIZES,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        **options,
    )
    return _random(transformers.MixtralForCausalLM, config)


def gpt_oss(layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        **SIZES,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
    )
    return _random(transformers.GptOssForCausalLM, config)


def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    return _random(transformers.T5ForConditionalGeneration, config)


def token_batches(count=3, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCAB, (rows, TOKENS), generator=generator)} for _ in range(count)]


def padded_and_not(seed=0, left=False):
    """The same texts twice: padded in one batch with a mask, and each alone."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, TOKENS, 7, 5]
    alone = [{"input_ids": torch.randint(1, VOCAB, (1, n), generator=generator)} for n in lengths]
    ids, mask = torch.zeros(len(lengths), TOKENS, dtype=torch.long), torch.zeros(len(lengths), TOKENS, dtype=torch.long)
    for row, batch in enumerate(alone):
        n = batch["input_ids"].shape[1]
        place = slice(TOKENS - n, TOKENS) if left else slice(0, n)
        ids[row, place], mask[row, place] = batch["input_ids"][0], 1
    return [{"input_ids": ids, "attention_mask": mask}], alone

"""Small random models of each family that can be made smaller."""

import torch
import transformers

#: Of class, configuration and what differs from the family's usual sizes.
KINDS = {
    "bert": ("BertModel", "BertConfig", {}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", {}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {}),
    "electra": ("ElectraModel", "ElectraConfig", {"embedding_size": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 12}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 12, "sliding_window": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
}
ENCODERS = ("bert", "bert-mlm", "roberta", "distilbert", "electra")

_SHARED = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
_SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6}


def make(kind, *, attention="sdpa", **more):
    """A model in evaluation mode with weights large enough that every part of it matters."""
    name, config, options = KINDS[kind]
    sizes = dict(_SIZES)
    if kind == "distilbert":
        sizes = {"dim": 48, "hidden_dim": 40, "n_layers": 4, "n_heads": 6}
    elif kind == "gpt2":
        sizes = {"n_embd": 48, "n_inner": 40, "n_layer": 4, "n_head": 6}
    elif kind not in ENCODERS:
        sizes["num_key_value_heads"] = 3
    settings = getattr(transformers, config)(**{**_SHARED, **sizes, **options, **more}, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, name)(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model

"""`resu plan`'s steps: predicted without weights, measured when they are made."""

import gc

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from resu.core.peak_memory import measure_memory
from resu.integrations.hf_plan import predict_step
from resu.integrations.training_program import METHODS, Setup, read_config, training_program
from resu.training.adamw8bit import CHUNK

LLAMA = transformers.LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=2,
    num_attention_heads=4,
    architectures=["LlamaForCausalLM"],
)
BERT = transformers.BertConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    architectures=["BertForSequenceClassification"],
)
GPT2 = transformers.GPT2Config(
    vocab_size=512, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, architectures=["GPT2LMHeadModel"]
)


def _measured(config, setup):
    gc.collect()
    with measure_memory() as built:
        model, step = training_program(config, setup)
    bits = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("bitmask"))  # made by NumPy
    with measure_memory() as used:
        step()
        step()
    return built.current + bits, used.current, built.current + bits + used.peak


SETUPS = [
    *[(LLAMA, {"method": method}) for method in METHODS],
    (LLAMA, {"method": "full", "checkpointing": True, "in_backward": True, "batch": 4}),
    (LLAMA, {"method": "resu", "weight_decay": 0.1}),
    (LLAMA, {"method": "qresu4", "dtype": torch.bfloat16, "checkpointing": True}),
    (BERT, {"method": "qresu8", "in_backward": True, "batch": 2}),
    *[(LLAMA, {"method": method, "dropout": 0.05}) for method in ("lora", "qlora", "sparse-lora", "sparse-lora-dense")],
    (BERT, {"method": "lora", "dropout": 0.3, "batch": 4}),
    (GPT2, {"method": "full", "optimizer": "adafactor"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"), SETUPS, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else v.model_type
)
def test_within_five_percent_of_what_is_measured(config, options):
    if options["method"] == "lora":
        pytest.importorskip("peft")
    setup = Setup(length=96, **options)
    found = predict_step(config, setup)
    weights, state, peak = _measured(config, setup)
    assert found.weights == pytest.approx(weights, rel=0.002)
    assert found.state == pytest.approx(state, rel=0.01, abs=4096)
    assert found.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("in_backward", [False, True])
def test_eight_bit_state(in_backward):
    setup = Setup(method="qresu4", length=16, optimizer="adam8bit", sparsity=0.3, in_backward=in_backward)
    found = predict_step(LLAMA, setup)
    _, state, peak = _measured(LLAMA, setup)
    noise = 3 * 4 * CHUNK  # what is drawn for a step, once per process
    assert found.state == pytest.approx(state - noise, rel=0.01)
    assert found.peak == pytest.approx(peak - noise, rel=0.05)


def test_a_large_model_is_planned_without_memory():
    config = transformers.LlamaConfig(num_hidden_layers=4, architectures=["LlamaForCausalLM"])  # of Llama 7 B
    with measure_memory() as used:
        found = predict_step(config, Setup(method="qresu4", length=256, in_backward=True, checkpointing=True))
    assert found.weights > 1e9
    assert used.peak < 5e6


def test_settings_are_checked():
    with pytest.raises(ValueError, match="unknown method 'prefix'; known: full, lora"):
        Setup(method="prefix")
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        Setup(method="full", optimizer="lion")
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        Setup(method="lora", rank=0)
    with pytest.raises(ValueError, match="length 4096 is more than the model takes"):
        predict_step(BERT, Setup(method="full", length=4096))


def test_configurations_are_read_from_files_and_folders(tmp_path):
    BERT.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        config, raw = read_config(path)
        assert (config.hidden_size, raw["architectures"]) == (96, ["BertForSequenceClassification"])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_config(tmp_path / "other.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="no configuration that transformers reads"):
        read_config(tmp_path)

"""A real trained Llama (260 000 parameters, grouped queries, tied embedding): methods in the order of the papers."""

import math

import pytest
import torch

from resu.pruning.one_shot import prune_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(data_folder, tmp_path_factory):
    from resu.experiments.llama2c import write_hf_directory

    return write_hf_directory(data_folder("model_stories260K"), tmp_path_factory.mktemp("llama") / "stories")


def load(directory):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(directory):
    """What the model tells: sampled stories to calibrate on; greedy ones from other beginnings to be judged by."""
    model = load(directory)
    torch.manual_seed(0)
    options = {"pad_token_id": 0, "eos_token_id": None}
    begin = torch.ones(1, 1, dtype=torch.long)
    sampled = model.generate(begin.expand(32, 1), do_sample=True, max_new_tokens=127, **options)
    starts = model.generate(begin.expand(16, 1), do_sample=True, max_new_tokens=8, **options)
    greedy = model.generate(starts, do_sample=False, max_new_tokens=119, **options)
    return [{"input_ids": part} for part in sampled.split(8)], greedy


@torch.no_grad()
def perplexity(model, ids):
    logits = model(ids).logits[:, :-1]
    return math.exp(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))


def test_half_of_the_weights_sparsegpt_wanda_magnitude_random(directory, texts):
    calibration, judged = texts
    found = {"dense": perplexity(load(directory), judged)}
    for method in ("sparsegpt", "wanda", "magnitude", "random"):
        model = load(directory)
        result = prune_model(model, 0.5, method, calibration=calibration)
        found[method] = perplexity(model, judged)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert result.report["actual"] == 0.5
        assert len(result.masks) == 5 * 7
        assert not any("embed" in name or "lm_head" in name for name in result.masks)
    assert found["dense"] < found["sparsegpt"] <= found["wanda"] < found["magnitude"] < found["random"], found


def test_an_update_helps_whatever_chose_the_mask(directory, texts):
    calibration, judged = texts
    for method in ("wanda", "magnitude"):
        plain, updated = load(directory), load(directory)
        prune_model(plain, 0.6, method, calibration=calibration)
        prune_model(updated, 0.6, method, update="sparsegpt", calibration=calibration)
        assert perplexity(updated, judged) < perplexity(plain, judged), method

"""The comparison of reconstruction with fine-tuning: its table, its count of cost, and that masks hold."""

import pytest
import torch

from resu.experiments.reconstruction import BATCH, EPOCHS, SAMPLES, TOKENS, WAYS, Row, _passes, finetune, markdown
from resu.pruning.one_shot import prune_model
from tests.pruning import hf_models


def row(way, stories, seed=0, pruner="magnitude", pattern=""):
    return Row(pruner, pattern, seed, way, 64, 128, 5, 3.0, stories, 150.0, 2 * stories, _passes(way), 3.0, "2")


def test_a_cell_is_the_mean_over_draws_and_what_did_not_run_is_a_dash():
    text = markdown(
        [
            row("pruned", 30.0),
            row("kept", 5.0),
            row("kept", 6.0, seed=1),
            row("finetune 10", 4.5),
            row("pruned", 9.0, pruner="wanda"),
        ]
    )
    lines = text.splitlines()
    kept = next(line for line in lines if line.startswith("| reconstruction, kept"))
    assert kept == "| reconstruction, kept weights | 1 | 5.50 ± 0.71 | – |"
    assert "| cost | magnitude 50 % | wanda 50 % |\n" in text
    assert "over up to 2 draws" in text
    assert "dense 150" in text


def test_cost_is_counted_in_passes_over_tokens():
    tokens = SAMPLES * TOKENS
    assert _passes("pruned") == 0
    assert _passes("finetune 10") == 10 * _passes("finetune 1") == 30 * EPOCHS * tokens
    train, held = 7 / 8, 1 / 8
    assert SAMPLES // BATCH == 8
    assert _passes("kept") == tokens * (2 + (EPOCHS + 1) * held + 3 * EPOCHS * train)
    assert all(_passes(way) <= _passes("finetune 1") * 1.1 for way in WAYS if way != "finetune 10")


def test_fine_tuning_holds_the_masks_and_lets_go_of_them():
    pytest.importorskip("transformers")
    model = hf_models.llama()
    masks = prune_model(model, 0.5).masks
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [b | {"attention_mask": torch.ones_like(b["input_ids"])} for b in hf_models.token_batches(2)]
    finetune(model, masks, batches, epochs=2)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        if name in masks:
            assert not parameter[~masks[name]].any()
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())

"""Sparse training in the Trainer of Hugging Face transformers: one callback; resumed half-way, equal bit for bit."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from resu.formats.validate import validate
from resu.integrations.hf_trainer import SparsityCallback
from resu.training import RigL

STEPS = 60


def train(resume=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    # Each token is the one before it plus a step that the first two tokens show.
    starts, steps = torch.randint(32, (256, 1)), torch.randint(1, 5, (256, 1))
    rows = (starts + steps * torch.arange(12)) % 32
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=STEPS // 4,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = SparsityCallback(
        lambda steps: RigL(sparsity=0.8, interval=5, end_step=int(0.75 * steps)), exclude="lm_head", save_masks=True
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.sparsifier


trainer, sparsifier = train()
print(sparsifier.report())
print("masks and weights on disk agree:", validate(f"out/checkpoint-{STEPS}")["ok"])

resumed, _ = train(resume=f"out/checkpoint-{STEPS // 2}")
pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
print("resumed half-way, equal bit for bit:", all(torch.equal(a, b) for a, b in pairs))

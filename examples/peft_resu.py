"""RESU and QRESU as PEFT methods: a small Llama learns a second task; the lowest weights train, the rest stays."""

import copy

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from resu.integrations.peft import QRESUAdapterConfig, RESUAdapterConfig

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def rows(steps):
    """Each token is the one before it plus a step that the first two tokens show."""
    starts = torch.randint(32, (256, 1))
    return (starts + torch.tensor(steps)[torch.randint(len(steps), (256, 1))] * torch.arange(12)) % 32


def fit(model, data, steps):
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in data]).train()


@torch.no_grad()
def loss(model, data):
    return model.eval()(data, labels=data).loss.item()


torch.manual_seed(0)
first, second = rows([1, 2, 3]), rows([5, 7])
base = LlamaForCausalLM(LlamaConfig(**SIZES))
fit(base, first, steps=100)
print(f"dense model: loss {loss(base, first):.2f} on the first task, {loss(base, second):.2f} on the second")

for config in (
    RESUAdapterConfig(sparsity=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
    QRESUAdapterConfig(sparsity=0.3, bits=4, target_modules="all-linear", task_type="CAUSAL_LM"),
):
    name = config.peft_type.value
    model = get_peft_model(copy.deepcopy(base), config)
    theta = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = loss(model, second)
    fit(model, second, steps=60)
    model.save_pretrained(f"out/{name}")

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), f"out/{name}").eval()
    same = torch.equal(loaded(second).logits, model.eval()(second).logits)
    merged = loaded.merge_and_unload()
    print(f"{name}: {theta} values of θ, loss on the second task {before:.2f} -> {loss(model, second):.2f}")
    print(f"  loaded equals saved: {same}; loss merged: {loss(merged, second):.2f}")

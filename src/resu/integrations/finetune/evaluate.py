"""How good a model is at its task: loss, accuracy, perplexity, the same before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.sharding import is_sharded
from resu.integrations.finetune.batches import IGNORED, Collator
from resu.integrations.finetune.data import Row

__all__ = ["METRICS", "evaluate"]

#: What is said of each task beside the loss.
METRICS = {"causal-lm": "perplexity", "masked-lm": "perplexity", "classification": "accuracy"}

Progress = Callable[[int, int, str], None]


def evaluate(
    model: nn.Module, rows: Sequence[Row], collator: Collator, batch_size: int, progress: Progress | None = None
) -> dict[str, float]:
    """Loss and metric of a model on samples; every token or sample that counts has equal weight.

    Under several processes each takes its part of the batches, and all get the same result. Of a sharded model all run
    equally often, since each call gathers weights from all.

    Args:
        model: Its output has ``logits``; its mode is as before afterwards.
        rows: See :func:`resu.integrations.finetune.data.rows_of`.
        collator: Makes batches; masked tokens are those of epoch -1, the same each time.
        batch_size: Samples per call.
        progress: Called with (done, total, what).

    Returns:
        ``loss`` (mean, nats), ``count`` (what it is a mean over), and ``accuracy`` in [0, 1] or ``perplexity``.

    Raises:
        ValueError: If nothing can be predicted (texts of one token).
    """
    training, device = model.training, next(model.parameters()).device
    fixed = Collator(collator.tokenizer, collator.task, collator.seed, epoch=-1)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # like lengths together: little padding
    chunks = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    rank, world = _place()
    sharded = any(is_sharded(p) for p in model.parameters())
    sums = torch.zeros(3, dtype=torch.float64)
    model.eval()
    try:
        # Weights gathered in inference mode could not be trained with later.
        with torch.no_grad() if sharded else torch.inference_mode():
            for start in range(0, len(chunks), world):
                mine = start + rank
                if mine < len(chunks) or sharded:
                    batch = fixed([rows[i] for i in chunks[min(mine, len(chunks) - 1)]])
                    labels = batch.pop("labels").to(device)
                    logits = model(**{k: v.to(device) for k, v in batch.items()}).logits
                    if mine < len(chunks):
                        sums += _sums(logits, labels, fixed.task).cpu()
                if progress is not None:
                    progress(min(start + world, len(chunks)), len(chunks), "evaluating")
    finally:
        model.train(training)
    loss, right, count = _over_processes(sums, device).tolist()
    if not count:
        raise ValueError("there is nothing to predict in the validation data: its texts have one token")
    found = {"loss": loss / count, "count": count}
    if METRICS[fixed.task] == "accuracy":
        return found | {"accuracy": right / count}
    return found | {"perplexity": math.exp(found["loss"]) if found["loss"] < 700 else math.inf}


def _sums(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    counted = labels != IGNORED
    losses = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    right = (logits.argmax(-1) == labels) & counted
    return torch.stack([losses.double().sum(), right.sum().double(), counted.sum().double()])


def _place() -> tuple[int, int]:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _over_processes(sums: Tensor, device: torch.device) -> Tensor:
    if _place()[1] == 1:
        return sums
    total = sums.to(device)
    torch.distributed.all_reduce(total)
    return total.cpu()

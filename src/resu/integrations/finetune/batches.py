"""From rows of token ids to batches with labels: next tokens, masked tokens or classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resu.core.randomness import derived_generator
from resu.integrations.finetune.data import Row
from resu.integrations.hf_text import padded_batch

__all__ = ["IGNORED", "Collator", "mask_tokens"]

IGNORED = -100  # labels that the losses of transformers leave out
_MASKED, _REPLACED, _RANDOM = 0.15, 0.8, 0.1


def mask_tokens(
    ids: Tensor, special: Tensor, mask_id: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked language modelling (Devlin et al., arXiv 1810.04805, section 3.1).

    Of the tokens that are not special 15 % are chosen, at least one; of these 80 % are replaced by the mask token,
    10 % by a random one, 10 % stay.

    Args:
        ids: int64 ``[tokens]``.
        special: Bool ``[tokens]``.
        mask_id: The mask token.
        vocabulary: Tokens are below it.
        generator: Of the draws.

    Returns:
        ``(inputs, labels)``, int64 ``[tokens]``; labels are -100 where nothing was chosen.
    """
    draws = torch.rand(3, ids.numel(), generator=generator)
    chosen = (draws[0] < _MASKED) & ~special
    if not chosen.any() and not special.all():
        chosen[draws[0].masked_fill(special, 2.0).argmin()] = True
    labels = ids.masked_fill(~chosen, IGNORED)
    random = (draws[2] * vocabulary).long().clamp_(max=vocabulary - 1)
    inputs = torch.where(chosen & (draws[1] < _REPLACED), mask_id, ids)
    return torch.where(chosen & (draws[1] >= 1 - _RANDOM), random, inputs), labels


class Collator:
    """Batches of rows. What is random in them depends on (seed, epoch, sample) alone, so that a run that goes on sees
    the same as one that was never stopped.

    Args:
        tokenizer: Pads and knows the mask token.
        task: ``causal-lm``, ``masked-lm`` or ``classification``.
        seed: Of masked tokens.
        epoch: Set it as training goes on; masked tokens differ between epochs.

    Raises:
        ValueError: If a masked language model's tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Any, task: str, seed: int = 0, epoch: int = 0) -> None:
        if task == "masked-lm" and getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError("the tokenizer has no mask token, so this is no masked language model; use causal-lm")
        self.tokenizer, self.task, self.seed, self.epoch = tokenizer, task, seed, epoch

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = padded_batch(self.tokenizer, [row["input_ids"] for row in rows])
        if self.task == "classification":
            return batch | {"labels": torch.tensor([row["labels"] for row in rows])}
        filling = batch["attention_mask"] == 0
        if self.task == "causal-lm":
            return batch | {"labels": batch["input_ids"].masked_fill(filling, IGNORED)}
        special = torch.tensor(sorted(self.tokenizer.all_special_ids))
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for i, row in enumerate(rows):  # without its padding, which differs from batch to batch
            ids = torch.tensor(row["input_ids"])
            draws = derived_generator(self.seed, "masked", self.epoch, row["index"])
            inputs, wanted = mask_tokens(
                ids, torch.isin(ids, special), self.tokenizer.mask_token_id, len(self.tokenizer), draws
            )
            batch["input_ids"][i, : len(ids)], labels[i, : len(ids)] = inputs, wanted
        return batch | {"labels": labels}

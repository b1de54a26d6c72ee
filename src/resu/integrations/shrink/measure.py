"""What a transformer costs with fewer units and blocks, told from its sizes, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resu.integrations.shrink.activity import evaluating
from resu.integrations.shrink.exactness import longest_input
from resu.integrations.shrink.families import Site, blocks_of, shape_of, sites_of
from resu.integrations.shrink.removal import remove
from resu.pruning.structured.sizes import Latency, count_macs, count_parameters, latencies

__all__ = ["Costs", "measured_latency", "sample_inputs", "smaller_copy"]


def sample_inputs(model: Any, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens to count and time with, int64 ``[batch, tokens]``, none of them padding.

    Raises:
        ValueError: If there are more tokens than the model was made for.
    """
    limit = longest_input(model)
    if batch < 1 or tokens < 1 or (limit is not None and tokens > limit):
        raise ValueError(f"cannot run {batch} × {tokens} tokens: {type(model).__name__} was made for up to {limit}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(int(model.config.vocab_size), (batch, tokens), generator=generator)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


@dataclass(frozen=True)
class Costs:
    """Parameters and multiply-adds as functions of how many units stay.

    Attributes:
        parameters: Of the whole model.
        macs: Of the whole model, on the inputs given.
        sites: All sites.
        unit_parameters: Of one unit, by site.
        unit_macs: Of one unit, by site.
        block_parameters: Of a block, all its units included.
        block_macs: Of a block.
    """

    parameters: int
    macs: int
    sites: tuple[Site, ...]
    unit_parameters: Mapping[str, int]
    unit_macs: Mapping[str, int]
    block_parameters: tuple[int, ...]
    block_macs: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Tensor]) -> Costs:
        """Look at a model; it is run once to count its multiply-adds.

        Raises:
            ValueError: If it does not run on such inputs, as one that chooses among several texts.
        """
        base, sites = model.base_model, tuple(sites_of(model))
        batch, tokens = inputs["input_ids"].shape
        numbers, macs = {}, {}
        for site in sites:
            reads = [(rows.size, base.get_submodule(rows.module)) for rows in site.inner]
            weights = sum(size * shape_of(module)[1] for size, module in reads)
            biases = sum(size for size, module in reads if getattr(module, "bias", None) is not None)
            weights += site.columns.size * shape_of(base.get_submodule(site.outer))[0]
            numbers[site.name] = weights + biases
            # Products of queries and keys, and of their softmax and values.
            attention = 2 * batch * tokens * tokens * site.columns.size if site.kind == "heads" else 0
            macs[site.name] = batch * tokens * weights + attention
        blocks = blocks_of(model)
        with evaluating(model):
            try:
                total = count_macs(model, dict(inputs))
            except Exception as error:  # each class has its own way to miss an input
                raise ValueError(
                    f"{type(model).__name__} does not run on token ids and an attention mask of {batch} × {tokens}, so "
                    f"nothing could be measured or verified: {' '.join(str(error).split())[:200]}"
                ) from error
        return cls(
            count_parameters(model),
            total,
            sites,
            numbers,
            macs,
            tuple(count_parameters(block) for block in blocks),
            tuple(sum(macs[s.name] * s.count for s in sites if s.block == i) for i in range(len(blocks))),
        )

    def after(self, counts: Mapping[str, int], blocks: Sequence[int] | None = None) -> tuple[int, int]:
        """``(parameters, macs)`` when so many units of each site and these blocks stay."""
        parameters, macs = self.parameters, self.macs
        for site in self.sites:
            if blocks is None or site.block in blocks:
                gone = site.count - counts.get(site.name, site.count)
                parameters -= gone * self.unit_parameters[site.name]
                macs -= gone * self.unit_macs[site.name]
        for index, (numbers, products) in enumerate(zip(self.block_parameters, self.block_macs, strict=True)):
            if blocks is not None and index not in blocks:
                parameters -= numbers
                macs -= products
        return parameters, macs


def smaller_copy(model: Any, counts: Mapping[str, int], blocks: Sequence[int] | None) -> Any:
    """A copy with so many units, the first ones: which they are makes no difference to how long it takes."""
    copied = deepcopy(model)
    remove(copied, {name: torch.arange(count) for name, count in counts.items()}, blocks, verify=False)
    return copied


def measured_latency(models: Sequence[Any], inputs: Mapping[str, Tensor], rounds: int = 15) -> Latency:
    """:func:`resu.pruning.structured.sizes.latencies`, without keeping keys and values."""
    with ExitStack() as held:
        for model in models:
            held.enter_context(evaluating(model))
        return latencies(models, dict(inputs), rounds=rounds, seconds=0.02)

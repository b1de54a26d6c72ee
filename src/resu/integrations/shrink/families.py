"""Where the parts of a transformer are: attention heads, neurons of its feed-forward layers, whole blocks.

transformers names the same parts differently by architecture; a :class:`Family` holds the names of one way, and
:func:`sites_of` turns them into :class:`Site`: a set of like units (heads with their keys and values, or neurons) that
can be taken away, with the rows and columns of the weights that belong to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import is_conv1d_of_transformers

__all__ = ["FAMILIES", "Family", "Rows", "Site", "blocks_of", "family_named", "family_of", "sites_of"]


@dataclass(frozen=True)
class Family:
    """The names of one way to write a transformer block; paths are relative to the block.

    Attributes:
        blocks: Path of the list of blocks in the base model.
        attention: The module whose attributes count heads.
        projections: Query, key and value; one name where a single weight holds all three.
        output: What mixes the heads' results.
        expand: The layers into the feed-forward width; two where one of them gates the other.
        contract: The layer out of it.
        width: Key of the configuration that holds the feed-forward width.
        streams: The modules whose input is the stream that the attention's and the feed-forward layer's result is
            added to.
        norms: The norms that stand between the results and the sum, where there are any.
        sums: Whether a block gives the last sum itself, not what a norm makes of it.
    """

    blocks: str
    attention: str
    projections: tuple[str, ...]
    output: str
    expand: tuple[str, ...]
    contract: str
    streams: tuple[str, str]
    norms: tuple[str, str] | None = None
    sums: bool = True
    width: str = "intermediate_size"


_BERT = Family(
    blocks="encoder.layer",
    attention="attention.self",
    projections=("attention.self.query", "attention.self.key", "attention.self.value"),
    output="attention.output.dense",
    expand=("intermediate.dense",),
    contract="output.dense",
    streams=("attention", "intermediate"),
    sums=False,
)
_LLAMA = Family(
    blocks="layers",
    attention="self_attn",
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    expand=("mlp.gate_proj", "mlp.up_proj"),
    contract="mlp.down_proj",
    streams=("input_layernorm", "post_attention_layernorm"),
)
_GEMMA2 = replace(
    _LLAMA,
    streams=("input_layernorm", "pre_feedforward_layernorm"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_DISTILBERT = Family(
    blocks="transformer.layer",
    attention="attention",
    projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    output="attention.out_lin",
    expand=("ffn.lin1",),
    contract="ffn.lin2",
    width="hidden_dim",
    streams=("attention", "ffn"),
    sums=False,
)
_GPT2 = Family(
    blocks="h",
    attention="attn",
    projections=("attn.c_attn",),
    output="attn.c_proj",
    expand=("mlp.c_fc",),
    contract="mlp.c_proj",
    width="n_inner",
    streams=("ln_1", "ln_2"),
)
#: By ``model_type`` of the configuration.
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    "gemma2": _GEMMA2,
    "gpt2": _GPT2,
}


@dataclass(frozen=True)
class Rows:
    """The rows of one weight that feed units: those of unit ``u`` begin at ``start + u * size``.

    Attributes:
        module: Name in the base model.
        size: Rows per unit.
        start: Where the first unit's rows begin.
    """

    module: str
    size: int
    start: int = 0

    def of(self, units: Tensor) -> Tensor:
        """Indices of the rows of units, int64 ``[len(units) * size]``, in the order of the units.

        Example:
            >>> Rows("q_proj", 2, 4).of(torch.tensor([0, 3]))
            tensor([ 4,  5, 10, 11])
        """
        return (self.start + units[:, None] * self.size + torch.arange(self.size)).reshape(-1)


@dataclass(frozen=True)
class Site:
    """Units of one kind in one block.

    Attributes:
        name: Name of the module that holds them, in the base model.
        kind: ``"heads"``, of which a unit is a key/value head with all query heads that read it, or ``"ffn"``, of
            which a unit is a neuron.
        block: Index of the block.
        count: How many units there are.
        outer: The module whose input they are, with ``outer_rows.size`` columns each.
        columns: Those columns, as :class:`Rows` of the transposed weight.
        inner: The rows of the weights that feed them.
        queries: Query heads per unit; 1 for neurons.
        stream: The module whose input is the stream that the result of ``outer`` is added to.
        norm: The norm that stands between, if one does.
    """

    name: str
    kind: str
    block: int
    count: int
    columns: Rows
    inner: tuple[Rows, ...]
    queries: int = 1
    stream: str = ""
    norm: str | None = None

    @property
    def outer(self) -> str:
        """The module whose input the units are."""
        return self.columns.module


def family_of(model: Any) -> Family:
    """The names that a model of transformers uses.

    Raises:
        ValueError: If it is none (another module, a model inside another one), or its architecture is not known here.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers and cannot be made smaller here; merge adapters and "
            "take the model out of what wraps it (torch.compile, data parallel) first"
        )
    return family_named(model.config.model_type)


def family_named(kind: object) -> Family:
    """The names that an architecture uses, by the ``model_type`` of its configuration.

    Raises:
        ValueError: If it is not known here.
    """
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{kind!r} models cannot be made smaller here; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def blocks_of(model: Any) -> nn.ModuleList:
    """The list of blocks of a model, with or without a head."""
    path = family_of(model).blocks
    found = model.base_model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return found


def sites_of(model: Any) -> list[Site]:
    """All heads and neurons of a model that can be taken away, block by block, heads first.

    Args:
        model: A ``PreTrainedModel`` of a known family, also one that was made smaller before.

    Raises:
        ValueError: If its architecture is not known, or its layers are not those of transformers (adapters,
            parametrized or shared weights): taking units away would leave something else behind.
    """
    family = family_of(model)
    found: list[Site] = []
    for index, block in enumerate(blocks_of(model)):
        found += _sites_of_block(family, block, index)
    base = model.base_model
    _check_layers(base, found)
    return found


def _sites_of_block(family: Family, block: nn.Module, index: int) -> list[Site]:
    prefix = f"{family.blocks}.{index}."
    attention = block.get_submodule(family.attention)
    size = int(getattr(attention, "head_dim", 0) or getattr(attention, "attention_head_size"))  # noqa: B009
    wide = shape_of(block.get_submodule(family.output))[1]
    heads = wide // size
    if len(family.projections) == 1:
        keys = heads
        inner = tuple(Rows(prefix + family.projections[0], size, start) for start in (0, wide, 2 * wide))
    else:
        query, key, value = family.projections
        keys = shape_of(block.get_submodule(key))[0] // size
        inner = (
            Rows(prefix + query, heads // keys * size),
            Rows(prefix + key, size),
            Rows(prefix + value, size),
        )
    group = heads // keys
    width = shape_of(block.get_submodule(family.contract))[1]
    expand = tuple(Rows(prefix + name, 1) for name in family.expand)
    mixing, contract = Rows(prefix + family.output, group * size), Rows(prefix + family.contract, 1)
    streams = [prefix + name for name in family.streams]
    norms = [None, None] if family.norms is None else [prefix + name for name in family.norms]
    mlp = prefix + family.contract.rpartition(".")[0]
    return [
        Site(prefix + family.attention, "heads", index, keys, mixing, inner, group, streams[0], norms[0]),
        Site(mlp, "ffn", index, width, contract, expand, stream=streams[1], norm=norms[1]),
    ]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer; that of Hugging Face's ``Conv1D`` lies transposed."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if is_conv1d_of_transformers(module) else (rows, columns)


def _check_layers(base: nn.Module, sites: Sequence[Site]) -> None:
    names = list(dict.fromkeys(rows.module for site in sites for rows in (*site.inner, site.columns)))
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        module = base.get_submodule(name)
        if nn.utils.parametrize.is_parametrized(module):
            raise ValueError(f"{name} has a parametrized weight; remove the parametrization first")
        if type(module) is not nn.Linear and not is_conv1d_of_transformers(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, not a plain linear layer; merge adapters and commit "
                "resurrection layers first"
            )
        for parameter in module.parameters():
            if len(owners[id(parameter)]) > 1:
                raise ValueError(
                    f"{name} shares its weight with others ({', '.join(owners[id(parameter)])}); it cannot be made "
                    "smaller on its own"
                )


def after(site: Site, count: int) -> Site:
    """A site as it is with another number of units."""
    inner = site.inner
    if len({rows.module for rows in inner}) < len(inner):  # one weight for query, key and value: parts move up
        inner = tuple(replace(rows, start=place * count * rows.size) for place, rows in enumerate(inner))
    return replace(site, count=count, inner=inner)

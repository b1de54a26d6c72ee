"""What pruning a whole model means: every weight that multiplies, without embeddings, norms and output head.

Two views of one rule: :func:`pruning_targets` looks at modules, :func:`state_dict_targets` at names and shapes
alone, for checkpoints of which no model is built. Both say what they leave out, and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from resu.core.globs import glob_list, glob_matches, listing
from resu.core.layers import Layer, every_weight, select

__all__ = ["HEADS", "pruning_targets", "state_dict_targets", "task_head"]

HEADS = ("lm_head", "embed_out")  # embed_out: the output head of GPT-NeoX
_VECTORS = "norms and biases"
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_TIED = ("output head tied to", "tied to")
_TASK_HEAD = "head of the task"


def pruning_targets(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The weights that pruning all of ``model`` means, and why the others are left out.

    Without ``include``: what :func:`resu.core.layers.select` takes, and stacks of matrices (fused experts), but not the
    output head (``model.get_output_embeddings()`` of Hugging Face models, a module named ``lm_head``, or what
    :func:`task_head` finds in a model for classification) and nothing tied to an embedding. With ``include``: exactly
    what it names.

    Args:
        model: Any module.
        include: Globs over parameter or module names, as in :func:`resu.core.layers.select`.
        exclude: Globs of what to leave out; applied last.

    Returns:
        ``{parameter name: Layer}``, never empty, and ``{parameter name: reason}`` of the weights with two dimensions or
        more that are left out, with one entry more that counts the vectors.

    Raises:
        ValueError: If a glob matches nothing, or nothing is left.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
        >>> targets, skipped = pruning_targets(model)
        >>> list(targets)
        ['fc.weight']
        >>> skipped
        {'wte.weight': 'embedding', 'lm_head.weight': 'output head', 'norms and biases': '2 vectors, 13 values'}
    """
    include, exclude = glob_list(include), glob_list(exclude) or []
    layers = select(model, include, exclude, stacks=True)
    everything = every_weight(model)
    heads = set() if include is not None else {n for n, layer in everything.items() if _is_head(model, layer)}
    kind = type(model).__name__ if hasattr(model, "base_model_prefix") and include is None else ""
    of_task = task_head(kind, everything) - heads
    chosen = {name: layer for name, layer in layers.items() if name not in heads | of_task}
    if not chosen:
        raise ValueError(f"only the output head is left to prune ({', '.join(layers)}); name it in include to prune it")
    skipped: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in everything.items():
        if name not in chosen:
            names = (name, *layer.ties)
            left_out = any(glob_matches(g, n) for g in exclude for n in names)
            reason = _TASK_HEAD if name in of_task else _reason(layer, name in heads, include is not None)
            reason = "excluded" if left_out else reason
            # A tie is one layer under the name that multiplies; the embedding it is tied to is looked for by its own.
            tables = [tie for tie in layer.ties if isinstance(modules[tie.rpartition(".")[0]], _TABLES)]
            skipped |= dict.fromkeys(tables, "embedding" if reason.startswith(_TIED) else reason) | {name: reason}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return chosen, skipped | _vectors([p.shape for p in vectors])


# A block of a body: a number in the name, with layers below what it numbers.
_BLOCK = re.compile(r"\.\d+\.\w+\.")
_TASK = re.compile(r"For(?:\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)")


def task_head(architecture: str, names: Iterable[str]) -> set[str]:
    """Weights of the head of a Hugging Face model that classifies texts, tokens or images, or answers from a text.

    Such a model is a body of blocks and a head beside it, each below a name of its own: the head is what lies under
    none that has blocks. It has few weights and all of the answer, and fine-tuning trains it whole.

    Args:
        architecture: The name of the model's class; of any other kind of model the result is empty.
        names: Of the weights.

    Example:
        >>> names = ["bert.encoder.layer.0.output.dense.weight", "bert.pooler.dense.weight", "classifier.weight"]
        >>> task_head("BertForSequenceClassification", names), task_head("BertForMaskedLM", names)
        ({'classifier.weight'}, set())
    """
    if not _TASK.search(architecture):
        return set()
    known = list(names)
    bodies = {name.partition(".")[0] for name in known if _BLOCK.search(name)}
    return {name for name in known if bodies and name.partition(".")[0] not in bodies}


def _is_head(model: nn.Module, layer: Layer) -> bool:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if isinstance(head, nn.Module) and any(p is layer.weight for p in head.parameters()):
        return True
    names = (layer.name, *layer.ties)
    return any(part in HEADS for name in names for part in name.split(".")[:-1])


def _reason(layer: Layer, head: bool, named: bool) -> str:
    if named:
        return "not named by include"
    kind = type(layer.module).__name__
    if head and not layer.ties:
        return "output head"
    if layer.ties and not isinstance(layer.module, _TABLES):
        return f"{_TIED[0] if head else _TIED[1]} {', '.join(layer.ties)}"
    if isinstance(layer.module, _TABLES) or "embed" in layer.attribute:
        return "embedding"
    if "norm" in kind.lower():
        return "norm"
    return f"{layer.attribute!r} of {kind} is not known to multiply; name it in include to prune it"


def _vectors(shapes: Sequence[torch.Size]) -> dict[str, str]:
    if not shapes:
        return {}
    return {_VECTORS: f"{len(shapes)} vector{'s' if len(shapes) > 1 else ''}, {sum(s.numel() for s in shapes)} values"}


# The last component of a module's name (or of the parameter's, where it is one itself): "wte",
# "embed_tokens", "word_embeddings", "tok_embeddings", "shared" (T5); norms as "ln_1", "input_layernorm", "q_norm".
_EMBEDDING = re.compile(
    r"(?:\w+_)?embed(?:ding|dings|s)?\d*(?:_tokens|_positions|_in|_layer)?|\w+embeddings?|wte|wpe|shared|\w+_attention_bias"
)
_TOKENS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")  # not those of positions
_NORM = re.compile(r"(?:\w+_)?(?:ln|bn|\w*norm)\d*(?:_\w+)?", re.IGNORECASE)
_BUFFER = re.compile(r"(?:\w+_)?bias|\w*_ids|\w*inv_freq|\w+_cached|running_\w+")


def state_dict_targets(
    shapes: Mapping[str, torch.Size],
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    tied: bool = False,
    architecture: str = "",
) -> tuple[list[str], dict[str, str]]:
    """The same as :func:`pruning_targets` for a checkpoint, by names and shapes alone.

    Names are all there is, so this is a rule of thumb over the naming of common checkpoints: a tensor with two
    dimensions or more is taken unless its name is that of an embedding, an output head, a norm, a bias or a buffer
    (causal masks, position indices). What a checkpoint stores in integers (indices, packed weights) is for the caller
    to leave out. A tied output head that the file does not store needs no exclusion.

    Args:
        shapes: ``{tensor name: shape}``.
        include: Globs over tensor names ("fc1.weight") or module names ("fc1"); exactly those are taken.
        exclude: Globs of what to leave out; applied last.
        tied: Whether the model's output head is its embedding; where that is one tensor without doubt, the head is
            named with the tie, stored or not.
        architecture: The class that ``config.json`` names; of one that classifies, :func:`task_head` is left out.

    Returns:
        The names taken, in the order of ``shapes``, never empty; and ``{name: reason}`` of the others.

    Raises:
        ValueError: If a glob matches no tensor with two dimensions or more, or nothing is left.

    Example:
        >>> shapes = {"wte.weight": torch.Size([9, 4]), "fc.weight": torch.Size([8, 4]), "ln.weight": torch.Size([4])}
        >>> state_dict_targets(shapes)
        (['fc.weight'], {'wte.weight': 'embedding', 'norms and biases': '1 vector, 4 values'})
    """
    include, exclude = glob_list(include), glob_list(exclude) or []
    matrices = {name: shape for name, shape in shapes.items() if len(shape) >= 2 and shape.numel() > 0}
    for glob in [*(include or ()), *exclude]:
        if not any(glob_matches(glob, name) for name in matrices):
            raise ValueError(f"the glob {glob!r} matches no weight of the file; weights are: {listing(matrices)}")
    chosen, skipped = [], {}
    of_task = task_head(architecture, matrices)
    for name, shape in matrices.items():
        reason = _reason_by_name(name, shape, name in of_task) if include is None else None
        if include is not None and not any(glob_matches(g, name) for g in include):
            reason = "not named by include"
        if any(glob_matches(g, name) for g in exclude):
            reason = "excluded"
        if reason is None:
            chosen.append(name)
        else:
            skipped[name] = reason
    if not chosen:
        raise ValueError(
            f"no prunable weight is selected; name weights in include. Left out: "
            f"{'; '.join(f'{n} ({why})' for n, why in list(skipped.items())[:20]) or 'only vectors'}"
        )
    if tied:
        _name_tie(skipped)
    return chosen, skipped | _vectors([s for n, s in shapes.items() if n not in matrices])


def _name_tie(skipped: dict[str, str]) -> None:
    """Say of the output head what it is tied to, as :func:`pruning_targets` does, which sees it."""
    tables = [n for n, why in skipped.items() if why == "embedding" and n.endswith(_TOKENS)]
    heads = [n for n, why in skipped.items() if why == "output head"] or ["lm_head.weight"]
    if len(tables) == len(heads) == 1:
        skipped[heads[0]] = f"{_TIED[0]} {tables[0]}"


def _reason_by_name(name: str, shape: torch.Size, of_task: bool) -> str | None:
    *modules, attribute = name.split(".")
    owner = modules[-1] if modules else ""
    if any(part in HEADS for part in modules):
        return "output head"
    if _BUFFER.fullmatch(attribute):
        return "bias or buffer"
    if of_task:
        return _TASK_HEAD
    # Patches are embedded by convolutions, and those multiply.
    if len(shape) == 2 and attribute == "weight" and _EMBEDDING.fullmatch(owner):
        return "embedding"
    if attribute != "weight" and _EMBEDDING.fullmatch(attribute):
        return "embedding"
    if _NORM.fullmatch(owner) and attribute == "weight":
        return "norm"
    if attribute != "weight" and ((len(shape) == 3 and shape[0] == 1) or sum(n > 1 for n in shape) <= 1):
        return "vector, or one table of positions"
    return None

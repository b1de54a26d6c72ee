"""Layer sizes of a model that need not exist yet: from a list, or from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resu.cli._common import CliError

__all__ = ["LayerShape", "Shapes", "parse_layers", "read_config"]

_LAYER = re.compile(r"(\d+)x(\d+)(?:\*(\d+))?")


@dataclass(frozen=True)
class LayerShape:
    """One weight matrix and how many times it occurs."""

    name: str
    out_features: int
    in_features: int
    count: int = 1

    @property
    def numel(self) -> int:
        """Weights in all its occurrences."""
        return self.out_features * self.in_features * self.count


@dataclass(frozen=True)
class Shapes:
    """The weights that are pruned, and the number of others (embeddings), which stay as they are."""

    layers: tuple[LayerShape, ...]
    others: int = 0

    @property
    def numel(self) -> int:
        """Weights of all layers that are pruned."""
        return sum(layer.numel for layer in self.layers)


def parse_layers(text: str) -> Shapes:
    """Layers from ``"INxOUT"`` items with an optional repeat.

    Example:
        >>> [(s.in_features, s.out_features, s.count) for s in parse_layers("784x300, 300x300*4").layers]
        [(784, 300, 1), (300, 300, 4)]
    """
    layers = []
    for index, item in enumerate(part.strip() for part in text.split(",")):
        found = _LAYER.fullmatch(item)
        if not found or 0 in (numbers := [int(group or 1) for group in found.groups()]):
            raise CliError(f"--layers items are INxOUT or INxOUT*REPEAT, such as 784x300,300x100; got {item!r}")
        wide, high, count = numbers
        layers.append(LayerShape(f"{index}: {item}", high, wide, count))
    return Shapes(tuple(layers))


def read_config(path: Path) -> Shapes:
    """The linear layers of a decoder or encoder from its ``config.json`` (or the folder that holds it).

    Known are the dense transformers whose configuration gives hidden size, depth, heads and the size of the
    feed-forward part. Biases and norms are small and left out.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CliError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CliError(f"{path} is no configuration: it holds a {type(config).__name__}, not an object")
    config = config.get("text_config") or config  # a multimodal model's language part
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise CliError(f"{path} is a mixture of experts ({key} = {config[key]}), which is not read; use --layers")

    def value(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
        if default is None:
            raise CliError(f"{path} has none of {', '.join(names)}; describe the model with --layers")
        return default

    hidden = value("hidden_size", "n_embd", "d_model", "dim")
    depth = value("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = value("num_attention_heads", "n_head", "n_heads")
    if min(hidden, depth, heads) < 1:
        raise CliError(f"{path} has a size of {min(hidden, depth, heads)}; describe the model with --layers")
    head = value("head_dim", default=hidden // heads)
    kv = head * value("num_key_value_heads", default=heads)
    inner = value("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=4 * hidden)
    gated = 2 if _is_gated(config) else 1
    blocks = []
    for size, count in _by_block(config, path, "heads", heads, depth):
        wide = size * head
        blocks += [
            LayerShape("attention query", wide, hidden, count),
            LayerShape("attention key, value", kv * size // heads, hidden, 2 * count),
            LayerShape("attention output", hidden, wide, count),
        ]
    for size, count in _by_block(config, path, "ffn", inner, depth):
        blocks += [
            LayerShape("feed-forward in", size, hidden, gated * count),
            LayerShape("feed-forward out", hidden, size, count),
        ]
    vocabulary = value("vocab_size", default=0)
    others = vocabulary * hidden
    # An output layer tied to the embedding is the embedding, and stays dense.
    if vocabulary and not config.get("tie_word_embeddings", _tied_by_default(config)) and _has_head(config):
        blocks.append(LayerShape("output layer", vocabulary, hidden))
    return Shapes(tuple(blocks), others)


def _by_block(config: dict[str, Any], path: Path, kind: str, size: int, depth: int) -> list[tuple[int, int]]:
    """``(size, how many blocks have it)``: the one that is given, or what ``resu shrink`` wrote where they differ."""
    shrunk = config.get("resu_shrunk") or {}
    sizes = shrunk.get(kind, [size] * depth) if isinstance(shrunk, dict) else None
    if not isinstance(sizes, list) or [one for one in sizes if isinstance(one, int) and 0 < one <= size] != sizes:
        sizes = []
    if len(sizes) != depth:
        raise CliError(f"resu_shrunk in {path} does not give {depth} sizes of {kind}, of at most {size} each")
    return list(Counter(sizes).items())


def _is_gated(config: dict[str, Any]) -> bool:
    act = str(config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function") or "")
    kind = str(config.get("model_type", ""))
    return act in ("silu", "swish", "swiglu") or kind.startswith(
        ("gemma", "llama", "mistral", "qwen2", "qwen3", "phi3")
    )


def _tied_by_default(config: dict[str, Any]) -> bool:
    return not str(config.get("model_type", "")).startswith(("llama", "mistral", "qwen", "phi3"))


def _has_head(config: dict[str, Any]) -> bool:
    names = config.get("architectures") or []
    return not names or any("CausalLM" in name or "LMHead" in name for name in names)

"""A Hugging Face model built block by block, each pruned and quantized before the next: it is never dense as a whole.

What is held at any time is what is packed already, one dense block, and the embeddings. So a model is made ready for
QRESU in hardly more memory than training it takes, from a sharded folder or with generated weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from resu.core.io import FileFormatError
from resu.core.shards import Shards
from resu.integrations.hf import check_directory, model_class, quiet, widest_dtype
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters

__all__ = ["block_names", "load_streamed", "to_qresu"]

Prepare = Callable[[nn.Module, str], None]
Read = Callable[[str, Tensor], Tensor | None]


def load_streamed(
    source: str | Path | Any,
    prepare: Prepare,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Build a model and have each block made ready as soon as its weights are there.

    Args:
        source: A directory with ``config.json`` and safetensors (one file or shards), or a transformers configuration,
            whose model gets random weights.
        prepare: Called as ``prepare(block, name)`` with each block in order (a child of a ``ModuleList``, such as
            ``model.layers.0``), in which it may replace layers; :func:`to_qresu` makes one.
        dtype: Of the weights; None: as they are stored, float32 for generated ones.
        seed: Of random weights.
        progress: Called with ``(blocks done, blocks there are, name)``.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: If the directory, its configuration or a shard is missing.
        FileFormatError: If a file is damaged, or a weight of the model is not in the files or has another shape.
        ValueError: If the weights are pickles or quantized, or the architecture is not known.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        ...     architectures=["LlamaForCausalLM"],
        ... )
        >>> model = load_streamed(config, to_qresu(0.5))
        >>> {layer.mode.name for layer in get_resu_modules(model).values()}
        {'QRESU'}
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        raw = check_directory(folder)
        shards = Shards.open(folder)
        dtype = dtype or widest_dtype(shards)
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(str(folder))
        read = _reader(shards, dtype)
    else:
        config, raw, folder = source, source.to_dict(), Path("this configuration")
        dtype = dtype or torch.float32
        read = _generator(seed, dtype)
    with quiet(), _weights_on_meta(), _default_dtype(dtype):
        built = model_class(raw, folder)(config)
        built.tie_weights()
    model: nn.Module = built
    model.eval()
    blocks = block_names(model)
    # What is one parameter in several places stays one. What is prepared already is not kept alive by this.
    made: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
    empty = list(model.parameters())  # kept until the end, so that no id is used again
    for name, _ in list(model.named_modules()):
        if not any(f"{name}.".startswith(f"{block}.") for block in blocks):
            _fill(model, name, read, made, deep=False)
    for index, name in enumerate(blocks):
        _fill(model, name, read, made, deep=True)
        prepare(model.get_submodule(name), name)
        if progress is not None:
            progress(index + 1, len(blocks), name)
    del empty
    return model


def to_qresu(
    sparsity: float,
    *,
    bits: int = 4,
    theta_dtype: torch.dtype | None = None,
    epsilon: float = 0.1,
    exclude: str | None = None,
) -> Prepare:
    """A function for :func:`load_streamed`: prune the layers of a block by magnitude and take them to QRESU mode.

    Everything else of the block is frozen, so that θ alone trains.

    Args:
        sparsity: Fraction removed of each weight, in [0, 1).
        bits: 4 or 8.
        theta_dtype: Of θ; that of the weights by default.
        epsilon: Size of θ's start values relative to the kept weights.
        exclude: A glob of layers to leave dense.
    """

    def prepare(block: nn.Module, name: str) -> None:
        convert_to_resu(block, exclude=exclude)
        for parameter in block.parameters():
            parameter.requires_grad_(False)
        for layer in get_resu_modules(block).values():
            layer.prune_by_magnitude(sparsity)
            layer.enter_qresu_mode(bits, epsilon, theta_dtype=theta_dtype)
        for parameter in resurrection_parameters(block):
            parameter.requires_grad_(True)

    return prepare


def block_names(model: nn.Module) -> list[str]:
    """Names of the children of a model's outermost ``ModuleList`` modules, in order.

    Example:
        >>> block_names(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1), nn.ReLU()]), "head": nn.Linear(1, 1)}))
        ['layers.0', 'layers.1']
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{one}.") for one in found):
            found.extend(f"{name}.{index}" if name else str(index) for index in range(len(module)))
    return found


def _fill(model: nn.Module, name: str, read: Read, made: Any, *, deep: bool) -> None:
    """Give the parameters of a module (and of what is in it) their weights, and buffers what is saved of them."""
    root = model.get_submodule(name)
    for path, module in list(root.named_modules(prefix=name)) if deep else [(name, root)]:
        dot = f"{path}." if path else ""
        for key, meta in module._parameters.items():
            if meta is None or meta.device.type != "meta":
                continue
            parameter = made.get(id(meta))
            if parameter is None:
                values = read(dot + key, meta)
                if values is None:
                    raise FileFormatError(
                        f"the files have no weight {dot + key!r}, which the model needs, or have it under the name of "
                        "another version of transformers; load the model whole, save it with save_pretrained, and "
                        "stream that"
                    )
                parameter = made[id(meta)] = nn.Parameter(values, requires_grad=meta.requires_grad)
            module._parameters[key] = parameter
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                saved = read(dot + key, buffer)
                if saved is not None:
                    buffer.copy_(saved)


def _reader(shards: Shards, dtype: torch.dtype) -> Read:
    def read(name: str, wanted: Tensor) -> Tensor | None:
        if name not in shards.entries:
            return None
        if shards.shape(name) != wanted.shape:
            raise FileFormatError(
                f"{name!r} has shape {tuple(shards.shape(name))} in {shards.folder}, the model needs "
                f"{tuple(wanted.shape)}; check config.json"
            )
        values = shards.read(name)
        return values.to(dtype) if values.is_floating_point() else values

    return read


def _generator(seed: int, dtype: torch.dtype) -> Read:
    random = torch.Generator().manual_seed(seed)

    def read(name: str, wanted: Tensor) -> Tensor | None:
        if not isinstance(wanted, nn.Parameter):  # a buffer is as the model made it
            return None
        if wanted.ndim > 1:
            return torch.empty(wanted.shape, dtype=dtype).normal_(0.0, 0.02, generator=random)
        start = 0.0 if name.endswith("bias") else 1.0
        return torch.full(wanted.shape, start, dtype=dtype)

    return read


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Parameters are moved to the meta device as modules take them; buffers, which are computed, stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

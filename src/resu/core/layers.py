"""Which weights of a model are meant: selection of layers by glob, with ties found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resu.core.globs import glob_list, glob_matches, listing

__all__ = ["Layer", "conv1d_globs", "every_weight", "select"]

# Weights that are multiplied with activations. Embeddings and norms are not, and so never selected unless
# a glob asks for them by name.
_TYPES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Fused experts that multiply with [experts, in, out] and, in some releases of transformers, do not say so
# by an attribute ``is_transposed``.
_EXPERTS_IN_OUT = ("AriaGroupedExpertsGemm", "GptOssExperts", "Llama4TextExperts")
# Model types of transformers whose linear layers are Conv1D, stored [in, out], and the names of these: for
# checkpoints, which do not say it.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.q_attn.weight")


def conv1d_globs(model_type: object) -> tuple[str, ...]:
    """Names of the weights that a model of this type, as ``config.json`` has it, stores ``[in, out]``.

    Example:
        >>> conv1d_globs("gpt2")[0], conv1d_globs("llama"), conv1d_globs(None)
        ('*.c_attn.weight', (), ())
    """
    return _CONV1D_NAMES if model_type in _CONV1D_MODELS else ()


@dataclass(frozen=True)
class Layer:
    """One prunable weight of a model, found again by name at each use.

    Attributes:
        name: Parameter name, e.g. ``"encoder.0.fc1.weight"``.
        module_name: Name of the module that holds it (``""`` for the model itself).
        attribute: Name of the parameter inside that module.
        module: The module.
        transposed: True where the weight is stored inputs first: ``[in, out]`` (Hugging Face ``Conv1D``),
            ``[in, out / groups, kernel…]`` (transposed convolutions), ``[experts, in, out]`` (some fused experts).
        stacked: True for a stack of matrices, ``[experts, out, in]`` (fused experts).
        ties: Other parameter names under which the same tensor is known.
    """

    name: str
    module_name: str
    attribute: str
    module: nn.Module
    transposed: bool = False
    stacked: bool = False
    ties: tuple[str, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The parameter, looked up now (wrappers and ``.to()`` may have replaced it)."""
        weight = getattr(self.module, self.attribute)
        assert isinstance(weight, Tensor)
        return weight

    def matrix(self, x: Tensor) -> Tensor:
        """``x`` as scores and patterns see it: outputs first, inputs second.

        Args:
            x: A tensor of the weight's own shape: the weight, its gradient, a mask.

        Returns:
            ``[out, in…]``; a stack as ``[experts * out, in]``. A view where strides allow it.

        Raises:
            ValueError: If ``x`` has another number of dimensions than the weight.

        Example:
            >>> model = nn.ConvTranspose1d(3, 5, 2)
            >>> layer = select(model)["weight"]
            >>> tuple(layer.weight.shape), tuple(layer.matrix(layer.weight).shape)
            ((3, 5, 2), (5, 3, 2))
        """
        if self.stacked:
            if x.ndim != 3:
                raise ValueError(f"{self.name!r} is a stack [experts, out, in]; got a tensor of shape {tuple(x.shape)}")
            return torch.flatten(x.transpose(1, 2) if self.transposed else x, 0, 1)
        if not self.transposed:
            return x
        groups = self._groups
        if groups == 1:
            return x.transpose(0, 1)
        return torch.flatten(torch.unflatten(x, 0, (groups, -1)).transpose(1, 2), 0, 1)

    def unmatrix(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: ``x`` in the weight's own shape, contiguous."""
        if self.stacked:
            parts = torch.unflatten(x, 0, (self.weight.shape[0], -1))
            return (parts.transpose(1, 2) if self.transposed else parts).contiguous()
        if not self.transposed:
            return x.contiguous()
        groups = self._groups
        if groups == 1:
            return x.transpose(0, 1).contiguous()
        return torch.flatten(torch.unflatten(x, 0, (groups, -1)).transpose(1, 2), 0, 1).contiguous()

    @property
    def _groups(self) -> int:
        return int(self.module.groups) if isinstance(self.module, _TRANSPOSED_CONVOLUTIONS) else 1


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's ``Conv1D`` or derived from it: a linear layer that stores ``[in, out]``."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def every_weight(model: nn.Module) -> dict[str, Layer]:
    """Every parameter with two dimensions or more, once, under the name that multiplies if one does.

    What :func:`select` chooses from; embeddings and norms are among them.
    """
    names: dict[int, list[Layer]] = {}
    # With duplicates: a module used twice is a tie too, and a glob may use either name.
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_lazy(parameter):
                raise ValueError(f"{module_name or 'the model'} is lazy: run one batch through the model first")
            if parameter.ndim >= 2:
                name = f"{module_name}.{attribute}" if module_name else attribute
                layer = Layer(name, module_name, attribute, module, *_orientation(module, attribute, parameter))
                names.setdefault(id(parameter), []).append(layer)
    found: dict[str, Layer] = {}
    for layers in names.values():
        owner = next((one for one in layers if _multiplies(one.module, one.attribute)), layers[0])
        ties = tuple(one.name for one in layers if one is not owner)
        found[owner.name] = replace(owner, ties=ties)
    return found


def _orientation(module: nn.Module, attribute: str, parameter: Tensor) -> tuple[bool, bool]:
    """Whether the weight is stored inputs first, and whether it is a stack."""
    if isinstance(module, _TYPES) or is_conv1d_of_transformers(module):
        inputs_first = isinstance(module, _TRANSPOSED_CONVOLUTIONS) or is_conv1d_of_transformers(module)
        return inputs_first and attribute == "weight", False
    if parameter.ndim != 3 or min(parameter.shape) <= 1 or "embed" in attribute:
        return False, False
    if _is_embedding(module) or "norm" in type(module).__name__.lower():
        return False, False
    return bool(getattr(module, "is_transposed", type(module).__name__ in _EXPERTS_IN_OUT)), True


def _multiplies(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return attribute.endswith("proj_weight")
    known = isinstance(module, _TYPES) or is_conv1d_of_transformers(module)
    return known and attribute == "weight"


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def select(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    stacks: bool = False,
) -> dict[str, Layer]:
    """The weights of ``model`` that pruning means, by parameter name, in the model's order.

    Without ``include``: the weight matrices of linear, convolution, ``nn.MultiheadAttention`` input
    projections and Hugging Face ``Conv1D`` modules, the output layer among them (exclude it by name).
    Embeddings and norms are left out, and so is a linear layer tied to an embedding (pruning it would prune the
    embedding): include it by name to have it. A tie is one layer, known by its first name. Stacks of matrices in other
    modules (fused experts) are left out with a warning unless ``stacks`` is True. A stack counts as
    ``[experts, in, out]`` where its module says ``is_transposed``, else as ``[experts, out, in]``.

    Args:
        model: Any module.
        include: Globs (``fnmatch``, case-sensitive) over parameter names ("fc1.weight") or module names ("fc1",
            "blocks.*.mlp"). Anything with two or more dimensions can be named.
        exclude: Globs of what to leave out; applied last.
        stacks: Whether stacks of matrices are taken too where nothing is named.

    Returns:
        ``{parameter name: Layer}``, never empty.

    Raises:
        ValueError: If a glob matches nothing, or nothing is left; the error lists what there is.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select(model)), list(select(model, exclude="2"))
        (['0.weight', '2.weight'], ['0.weight'])
    """
    everything = every_weight(model)
    include, exclude = glob_list(include), glob_list(exclude) or []

    def named(pattern: str, layer: Layer) -> bool:
        return any(glob_matches(pattern, name) for name in (layer.name, *layer.ties))

    for pattern in [*(include or ()), *exclude]:
        if not any(named(pattern, layer) for layer in everything.values()):
            raise ValueError(f"the glob {pattern!r} matches no weight of the model; weights are: {listing(everything)}")
    chosen: dict[str, Layer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in everything.items():
        if include is None:
            tied_to_embedding = any(_is_embedding(modules[t.rpartition(".")[0]]) for t in layer.ties)
            multiplies = _multiplies(layer.module, layer.attribute) or (stacks and layer.stacked)
            wanted = multiplies and not tied_to_embedding
        else:
            wanted = any(named(pattern, layer) for pattern in include)
        if wanted and not any(named(pattern, layer) for pattern in exclude):
            chosen[name] = layer
    if include is None and not stacks:
        _warn_of_stacks([layer for name, layer in everything.items() if name not in chosen], exclude, named)
    if include is None:
        _warn_of_computed(model, exclude)
    if not chosen:
        raise ValueError(
            "no prunable weight is selected; the model has: "
            f"{listing(everything) or 'no parameter with two dimensions or more'}"
        )
    return chosen


def _warn_of_stacks(skipped: Iterable[Layer], exclude: list[str], named: Callable[[str, Layer], bool]) -> None:
    """Say which stacks of matrices (fused experts) the default leaves dense; silence would be a false sparsity."""
    stacks = [
        layer.name for layer in skipped if layer.stacked and not any(named(pattern, layer) for pattern in exclude)
    ]
    if stacks:
        warnings.warn(
            f"stacked weights are not pruned by default: {', '.join(stacks[:8])}{', …' if len(stacks) > 8 else ''}; "
            "name them in include, or in exclude to leave them dense",
            stacklevel=3,
        )


def _warn_of_computed(model: nn.Module, exclude: list[str]) -> None:
    """Say which layers compute their weight from other tensors, so that there is no parameter to prune."""
    computed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _TYPES)
        and "weight" not in module._parameters
        and not any(glob_matches(pattern, f"{name}.weight") for pattern in exclude)
    ]
    if computed:
        warnings.warn(
            f"layers whose weight is computed (weight_norm, spectral_norm, torch.nn.utils.prune) are not pruned: "
            f"{listing(computed, 8)}; make the weight a parameter again, or exclude them by 'LAYER.*'",
            stacklevel=3,
        )

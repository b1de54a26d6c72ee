"""Masks for checkpoints larger than memory: weights stream by, counts are exact, no model is built."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from resu.core.globs import glob_list, glob_matches
from resu.core.io import open_header
from resu.core.layers import conv1d_globs
from resu.core.mask import unpack_bits
from resu.core.mask_files import MASK_HEADER, mask_format
from resu.core.mask_stream import VERSION, BitWriter, aligned, join_masks, packed_bytes
from resu.core.pattern import Pattern
from resu.core.shards import Shards
from resu.pruning.allocation import Allocation
from resu.pruning.cuts import Reading, spread
from resu.pruning.mask_plan import MaskPlan, plan_masks
from resu.pruning.weight_scores import CHUNK, Tensors

__all__ = ["MaskFile", "Progress", "compute_masks_for_state_dict", "counted_progress", "stored_transposed"]

Progress = Callable[[int, int, str], None]


def stored_transposed(
    names: Iterable[str], transposed: str | Iterable[str] | None, folder: Path | None = None
) -> frozenset[str]:
    """Which weights are stored ``[in, out]``: by globs, or else by the model type in ``config.json``.

    Raises:
        ValueError: If a glob matches nothing.
    """
    names = list(names)
    if transposed is None:
        config = folder / "config.json" if folder is not None else None
        if config is None or not config.is_file():
            return frozenset()
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config} is damaged: {error}") from None
        globs: list[str] = list(conv1d_globs(kind))
    else:
        globs = glob_list(transposed) or []
        for glob in globs:
            if not any(glob_matches(glob, name) for name in names):
                raise ValueError(f"the glob {glob!r} of transposed matches no tensor")
    return frozenset(name for name in names if any(glob_matches(glob, name) for glob in globs))


def counted_progress(progress: Progress | None, total: int, what: str) -> Callable[[int], None]:
    """A function that adds to what is done and says so to ``progress``; the end may come late or early by readings."""
    done, lock = 0, Lock()

    def tick(more: int) -> None:
        nonlocal done
        with lock:  # threads call it
            done += more
            if progress is not None:
                progress(min(done, total), total, what)

    return tick


class MaskFile(Mapping[str, Tensor]):
    """The masks of a file, each read when it is asked for.

    Example:
        >>> weights = {"a.weight": torch.randn(8, 4), "b.weight": torch.randn(4, 4)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     masks = compute_masks_for_state_dict(weights, 0.5, into=f"{folder}/masks.safetensors")
        ...     type(masks).__name__, int(masks["a.weight"].sum())
        ('MaskFile', 16)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shards = Shards.open(path)
        given = next(iter(self._shards.metadata.values()))
        self._entries = open_header(MASK_HEADER, given, VERSION, path)["masks"]

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(self._shards.read(name), self._entries[name]["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards.names)  # as they lie in the file; the header is sorted

    def __len__(self) -> int:
        return len(self._entries)


def compute_masks_for_state_dict(
    state_dict_or_path: Mapping[str, Tensor] | str | os.PathLike[str],
    sparsity: float | Mapping[str, float] | None,
    method: str = "magnitude",
    *,
    pattern: Pattern | str | None = None,
    distribution: str | Allocation | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    transposed: str | Iterable[str] | None = None,
    workers: int = 1,
    seed: int = 0,
    into: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """Masks for the weights of a checkpoint, without a model and without all weights in memory.

    Embeddings, output head, norms and biases are left out (:func:`resu.pruning.targets.state_dict_targets`). Matrices
    are taken as ``[out, in]``, three-dimensional weights as stacks ``[experts, out, in]`` (one with "conv" in its
    name: as a convolution), because names and shapes say no more.

    Magnitude scores are read in chunks. Other scores need a whole weight at a time, and so do blocks and channels:
    memory is then bounded by the largest weight, a few times in float32 or float64. Counts and positions are those
    of the same call in memory, bit for bit.

    Args:
        state_dict_or_path: ``{name: tensor}``; or a folder of safetensors shards (with or without an index), or one
            safetensors file. Pickles are refused.
        sparsity: Fraction removed, or ``{glob: sparsity}`` over tensor or module names, where the first glob that
            matches counts and weights matched by none get no mask. None with an N:M pattern: its own.
        method: Name of a registered importance that needs weights only: ``"magnitude"``, ``"lamp"``, ``"random"``,
            or your own.
        pattern: ``"tensor"``, ``"row"``, ``"2:4"``, ``"block:16x1"``, ``"channel:0"``, a ``Pattern``; None: where the
            score says.
        distribution: ``"global"``, ``"lamp"``, ``"uniform"``, ``"er"``, ``"erk"`` or a function of shapes; None: every
            layer gets ``sparsity`` itself.
        include: Globs over tensor names or module names; exactly those.
        exclude: Globs of what to leave out.
        transposed: Globs of weights stored ``[in, out]``; None: as ``config.json`` says (GPT-2 and its kin).
        workers: Threads; the masks do not depend on it.
        seed: Of random scores; each layer draws from (seed, name).
        into: A ``.safetensors`` file for the masks, which are then read from it one by one.
        progress: ``progress(done, total, what)`` in weights.

    Returns:
        ``{name: bool mask}``, True = kept, in the order of the checkpoint.

    Raises:
        FileNotFoundError: If there is nothing, or a shard is missing.
        ValueError: On a damaged file, NaN or infinite weights (the tensor is named), a method or distribution that
            needs more than weights, or a glob that matches nothing.

    Example:
        >>> weights = {"fc1.weight": torch.randn(20, 10), "fc2.weight": torch.randn(5, 20)}
        >>> masks = compute_masks_for_state_dict(weights, 0.9, distribution="global")
        >>> sum(int(mask.sum()) for mask in masks.values())
        30
    """
    if isinstance(state_dict_or_path, Mapping):
        tensors = {name: x for name, x in state_dict_or_path.items() if isinstance(x, Tensor)}
        weights: Tensors | Shards = Tensors(tensors)
        shapes = {name: x.shape for name, x in tensors.items()}
        turned = stored_transposed(shapes, transposed)
    elif not isinstance(state_dict_or_path, (str, os.PathLike)):
        raise TypeError(f"expected a state_dict or a path, got {type(state_dict_or_path).__name__}")
    else:
        weights = Shards.open(state_dict_or_path)
        shapes = weights.shapes
        turned = stored_transposed(shapes, transposed, weights.folder)
    check_workers(workers)
    if into is not None:
        mask_format(into)
        if Path(into).exists():
            raise FileExistsError(f"{into} is there already; remove it or name another file")
        if not Path(into).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {into} does not exist; make it first")
    # How often scores are read is known at the end; the bar of counting is one reading long.
    counting = counted_progress(progress, sum(s.numel() for s in shapes.values()), "counting")
    plan = plan_masks(
        weights,
        shapes,
        sparsity,
        method,
        pattern=pattern,
        distribution=distribution,
        include=include,
        exclude=exclude,
        transposed=turned,
        seed=seed,
        how=Reading(workers=workers, tick=counting),
    )
    tick = counted_progress(progress, sum(plan.scores.sizes.values()), "masks")
    if into is not None:
        _write(plan, Path(into), workers, tick)
        return MaskFile(into)

    def one(name: str) -> Tensor:
        return torch.cat(list(_parts(plan, name, tick))).view(shapes[name])

    return dict(zip(plan.names, spread(one, plan.names, workers), strict=True))


def check_workers(workers: int) -> None:
    """Raise ``ValueError`` unless ``workers`` is a whole number of one or more."""
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers must be a whole number of threads, 1 or more, got {workers!r}")


def _parts(plan: MaskPlan, name: str, tick: Callable[[int], None]) -> Iterator[Tensor]:
    masker = plan.masker(name)
    size = aligned(plan.scores.weights.shape(name), CHUNK, masker.unit)
    for chunk in plan.scores.weights.chunks(name, size):
        yield masker(chunk)
        tick(chunk.numel())


def _write(plan: MaskPlan, path: Path, workers: int, tick: Callable[[int], None]) -> None:
    shapes = {name: plan.scores.weights.shape(name) for name in plan.names}
    place, places = 0, {}
    for name, shape in shapes.items():
        places[name], place = place, place + packed_bytes(shape)
    # Beside the file, where there is room for it.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
        bits = Path(folder) / "bits"
        bits.touch()

        def one(name: str) -> dict[str, object]:
            with open(bits, "r+b") as file:
                writer = BitWriter(file, places[name], shapes[name])
                for mask in _parts(plan, name, tick):
                    writer.add(mask)
                return writer.entry()

        entries = dict(zip(plan.names, spread(one, plan.names, workers), strict=True))
        join_masks([(bits, entries)], path)

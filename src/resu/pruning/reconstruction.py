"""Block-wise reconstruction: a pruned model is repaired one block at a time, towards the dense model's activations."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.io import tensor_checksum
from resu.core.layers import Layer, every_weight
from resu.core.mask import SparseMask
from resu.core.shards import Shards
from resu.pruning.layerwise import Walk
from resu.pruning.lending import Lending, Read
from resu.pruning.one_shot import calibration_list
from resu.pruning.one_shot_files import OneShotFolder, batches_checksum, weight_checksums
from resu.pruning.placement import outer_items
from resu.pruning.reconstruction_run import Plan, Run, check_pruned
from resu.pruning.spill import Spill

__all__ = ["ReconstructResult", "masked_layers", "reader", "reconstruct", "run_reconstruction", "stored_names"]


@dataclass(frozen=True)
class ReconstructResult:
    """What :func:`reconstruct` did.

    Attributes:
        masks: As they were given, bool.
        report: Plain JSON: the settings; ``blocks``, a list of ``{name, layers, trained, before, after, epoch, errors,
            seconds}``: ``before`` and ``after`` are ``‖f_sparse(x̂) − y‖² / ‖y‖²`` on held-out calibration batches,
            ``epoch`` is the one that was kept (0: nothing was better, so nothing changed), ``errors`` is the error
            after each (None where it was not finite); ``skipped``, ``{parameter: reason}``; ``actual``, the sparsity
            of the masked weights now (0 after ``"theta"``); ``seconds``.
    """

    masks: dict[str, Tensor]
    report: dict[str, Any]


def reconstruct(
    model: nn.Module,
    masks: Mapping[str, Tensor | SparseMask],
    *,
    dense: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    calibration: Iterable[Any],
    train: str = "kept",
    targets: str = "dense",
    epochs: int = 10,
    lr: float = 3e-2,
    rank: int = 16,
    alpha: float = 32.0,
    held_out: float = 0.125,
    blocks: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    spill: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    seed: int = 0,
) -> ReconstructResult:
    """Repair a pruned model in place, block by block, without labels and without a backward pass through the model.

    For each block k in the order of execution, with x̂ what the repaired blocks before it give and y the dense model's
    activation, minimise over what is trained

        ``‖f_k(x̂; W) − y‖² / ‖y‖²``

    (local reconstruction, arXiv 2510.14444, with one block as the window; block-wise reconstruction with global
    propagation, arXiv 2406.15524). Here besides: the epoch with the least error on held-out calibration batches is
    kept, and a block for which none is better stays as it was, bit for bit; learning rates are relative to the size of
    a layer's weights; θ at pruned positions can be trained.

    Only one block is trained at a time, so that gradients and optimizer state are those of one block. Cost: about
    ``3 · epochs + 2`` forward passes over the calibration data. Memory beside the model: activations of all calibration
    tokens at three places of the model.

    Fails where pruned and dense activations differ so much that a block cannot make up for it (much above 50 %), and on
    a calibration text that is not what the model is for: the model then learns that text's activations.

    Args:
        model: Any module, pruned: +0.0 at pruned positions. Plain layers; leave RESU modes first.
        masks: ``{parameter name: mask}``, True = kept, of what is to be repaired. Layers outside of blocks (stems,
            heads) stay as they are.
        dense: The model before pruning: a module of the same architecture, ``{name: tensor}``, or a folder of
            safetensors, of which a block at a time is read.
        calibration: Batches, as in :func:`resu.pruning.one_shot.prune_model`; two or more.
        train: ``"kept"``: the kept weights under the mask. ``"lora"``: a low-rank change under the mask,
            ``M⊙(W + (alpha/rank)·B·A)``, merged at the end. ``"theta"``: θ at pruned positions, starting at 0, with
            active weights frozen; **the model is no longer sparse then**, and its masks say which weights are active.
        targets: ``"dense"``: y is the dense block's output on the dense model's activations. ``"sparse"``: on x̂, which
            asks the block for its own part only.
        epochs: How often each calibration batch comes.
        lr: AdamW's step at the beginning, relative to the root mean square of a layer's kept weights; falls linearly.
        rank: Of the low-rank change.
        alpha: See ``train``.
        held_out: Fraction of the batches that choose the epoch and are not trained on, at least one batch.
        blocks: Globs of the modules that run one after another; None: found. Finer ones (``"*.mlp"``) work too.
        device: Where to compute; None: where the model is.
        forward: ``forward(model, batch)`` where the default is not right.
        spill: A folder where activations wait in memory-mapped files; None: main memory.
        checkpoint: A folder; after each block everything is stored there, and the same call goes on from there after
            an interrupt, with the same result bit for bit.
        progress: Called ``(done, total, what)`` after each epoch.
        seed: Of held-out batches, order and start values.

    Returns:
        :class:`ReconstructResult`.

    Raises:
        ValueError: On an unknown name, a mask that fits no weight, values at pruned positions, a dense model that lacks
            a weight or has another shape, fewer than two batches, activations that are not finite, or a checkpoint of
            another run (what differs is named).

    Example:
        >>> from resu.pruning.one_shot import prune_model
        >>> _ = torch.manual_seed(0)
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> _ = model.load_state_dict(dense.state_dict())
        >>> masks = prune_model(model, 0.5).masks
        >>> mixing = torch.randn(6, 16)  # inputs that depend on each other, as activations do
        >>> batches = [torch.randn(32, 6) @ mixing for _ in range(8)]
        >>> result = reconstruct(model, masks, dense=dense, calibration=batches, epochs=20)
        >>> [block["after"] < 0.4 * block["before"] for block in result.report["blocks"]]
        [True, True]
        >>> bool((model[0].weight[~masks["0.weight"]] == 0).all())
        True
    """
    plan = Plan(train, targets, epochs, lr, rank, alpha, held_out, seed)
    batches = calibration_list(calibration) or []
    layers, held = masked_layers(model, masks)
    teacher = Lending(model, outer_items(model), reader(model, dense, layers))
    run = Run(layers, held, plan, teacher, Lending(model, (), lambda name: None), progress)
    names = blocks if blocks is None or isinstance(blocks, str) else list(blocks)
    store = None if spill is None else Spill(spill)
    walk = Walk(model, layers, batches, blocks=names, forward=forward, device=device, store=store)
    identity = {"blocks": names}
    if checkpoint is not None:
        identity["dense"] = _checksum(run.teacher.read, model)
    return run_reconstruction(run, walk, checkpoint, identity)


def run_reconstruction(
    run: Run, walk: Walk, checkpoint: str | os.PathLike[str] | None, identity: Mapping[str, Any], streamed: bool = False
) -> ReconstructResult:
    """What :func:`reconstruct` does once everything is checked.

    Args:
        run: The run.
        walk: The way through its model, not entered yet.
        checkpoint: As above.
        identity: What else has to be equal for a run to go on.
        streamed: Whether the model's own weights lie on disk, and repaired ones are looked up in the checkpoint.
    """
    started = time.monotonic()
    stated = {"kind": "reconstruction", **asdict(run.plan)}
    masks = {name: SparseMask(run.masks[name]) for name in run.layers}
    with run.own.lent():
        walk.__enter__()
    try:
        if checkpoint is not None:
            known = {n: m.checksum() for n, m in masks.items()}
            calibration = batches_checksum(walk.batches)
            settings = {**stated, **identity, "masks": known, "calibration": calibration}
            folder = OneShotFolder(checkpoint, settings)
            sums = {} if streamed else weight_checksums(walk.model, run.layers)
            if folder.exists():
                folder.open(sums)
                if not streamed:
                    folder.restore(run.layers)
            else:
                folder.begin(sums, {}, None)
            run.folder = folder
        if not streamed:
            done = {} if run.folder is None else run.folder.body["layers"]
            for name, layer in run.layers.items():
                if name not in done:
                    check_pruned(name, layer.weight, run.masks[name])
        run.walk(walk)
    finally:
        walk.__exit__()
    numel = sum(mask.numel for mask in masks.values())
    pruned = 0 if run.plan.train == "theta" else sum(mask.n_pruned for mask in masks.values())
    report = {
        **asdict(run.plan),
        "actual": pruned / numel,
        "batches": len(walk.batches),
        "blocks": run.blocks,
        "skipped": run.skipped,
        "seconds": time.monotonic() - started,
    }
    return ReconstructResult(dict(run.masks), report)


def masked_layers(
    model: nn.Module, masks: Mapping[str, Tensor | SparseMask]
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The layers that masks are of, and the masks as bool tensors, both by the layers' names.

    Raises:
        ValueError: If there is none, or a name is no weight of the model, or a mask has another shape.
        TypeError: If a mask is not bool.
    """
    if not masks:
        raise ValueError("there is no mask; give those the model was pruned with")
    known: dict[str, Layer] = {}
    for layer in every_weight(model).values():
        known |= dict.fromkeys((layer.name, *layer.ties), layer)
    layers, held = {}, {}
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"the model has no weight {name!r}; it has: {', '.join(known) or 'none'}")
        layer = known[name]
        if tuple(mask.shape) != tuple(layer.weight.shape):
            raise ValueError(
                f"mask {name!r} has shape {tuple(mask.shape)}, the weight {tuple(layer.weight.shape)}; leave modes "
                "that pack a layer (exit_qresu_mode) before"
            )
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise TypeError(f"mask {name!r} has dtype {mask.dtype}; a mask is bool, True = kept")
        layers[layer.name] = layer
        held[layer.name] = mask.mask if isinstance(mask, SparseMask) else mask
    return layers, held


def reader(
    model: nn.Module, source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str], needed: Iterable[str] = ()
) -> Read:
    """Reads weights of a model by its names from a module, a mapping or a folder of safetensors.

    Args:
        model: Whose names are asked for. Where it has a ``base_model_prefix`` (Hugging Face), stored names may lack it.
        source: Where weights come from.
        needed: Names that must be there.

    Raises:
        ValueError: If one is not.
    """
    read: Callable[[str], Tensor]
    if isinstance(source, nn.Module):
        tensors = {**dict(source.named_parameters(remove_duplicate=False)), **dict(source.named_buffers())}
        held, read = set(tensors), tensors.__getitem__
    elif isinstance(source, Mapping):
        held, read = set(source), source.__getitem__
    else:
        shards = Shards.open(source)
        held, read = set(shards.names), shards.read
    stored = stored_names(model, held)

    def find(name: str) -> Tensor | None:
        found = stored.get(name)
        return None if found is None else read(found)

    for name in needed:
        if name not in stored:
            raise ValueError(f"the dense model has no {name!r}; it must be of the same architecture as the pruned one")
    return find


def stored_names(model: nn.Module, held: Collection[str]) -> dict[str, str]:
    """``{name in the model: name among those that are held}`` of parameters and buffers.

    Where a model has a ``base_model_prefix`` (Hugging Face), held names may lack it, or have it beside the model's.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if name in held or other in held:
            found[name] = name if name in held else other
    return found


def _checksum(read: Read, model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        found = read(name)
        digest.update(f"{name} {None if found is None else tensor_checksum(found)}\n".encode())
    return digest.hexdigest()

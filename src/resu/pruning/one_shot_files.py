"""The folder of a long one-shot run: what is done stays done after an interrupt, and goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from resu.core.io import FileFormatError, replacing, tensor_checksum
from resu.core.layers import Layer
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks, write_masks, write_safetensors
from resu.pruning.layerwise import Activations
from resu.pruning.links import Slot
from resu.pruning.run_notes import read_run, write_run
from resu.pruning.trees import leaves

__all__ = ["OneShotFolder", "batches_checksum", "weight_checksums"]

_KEY, _VERSION = "resu_one_shot", 1


def batches_checksum(batches: Iterable[Any]) -> str:
    """SHA-256 over everything in the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for path, x in leaves(batch):
            digest.update(f"{path} {tensor_checksum(x) if isinstance(x, Tensor) else repr(x)}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


def weight_checksums(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """SHA-256 of each layer's weight, and under ``""`` of all the rest of the model's state."""
    found = {name: tensor_checksum(layer.weight) for name, layer in layers.items()}
    ours = {id(layer.weight) for layer in layers.values()}
    digest = hashlib.sha256()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, value in sorted(tensors, key=lambda pair: pair[0]):
        if id(value) not in ours:
            digest.update(f"{name} {tensor_checksum(value)}\n".encode())
    return found | {"": digest.hexdigest()}


class OneShotFolder:
    """``run.json``, ``unit-0007.safetensors`` (weights and packed masks) for each unit, activations of the last one.

    Each file is written atomically and ``run.json`` last, so that what it names is whole.

    Args:
        path: Made if it is not there.
        settings: What has to be equal for a run to go on; plain JSON.

    Attributes:
        body: What ``run.json`` says; empty before :meth:`open` or :meth:`begin`.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"checkpoint is a folder, and {self.path} is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.body: dict[str, Any] = {}

    @property
    def _run(self) -> Path:
        return self.path / "run.json"

    def exists(self) -> bool:
        """Whether there is a run here."""
        return self._run.is_file()

    def begin(self, weights: Mapping[str, str], keeps: Mapping[str, int], masks: Mapping[str, Tensor] | None) -> None:
        """Start a run. ``masks``: those that are decided already."""
        if masks is not None:
            write_masks({n: SparseMask(m) for n, m in masks.items()}, self._masks, overwrite=True)
        self.body = {
            "version": _VERSION,
            "settings": self.settings,
            "weights": dict(weights),
            "keeps": dict(keeps),
            "decided": masks is not None,
            "units": [],
            "layers": {},
            "warnings": [],
            "activations": None,
            "seconds": 0.0,
        }
        self._write()

    @property
    def _masks(self) -> Path:
        return self.path / "masks.safetensors"

    def open(self, weights: Mapping[str, str]) -> None:
        """Read ``run.json``. Nothing is loaded into the model yet.

        Args:
            weights: Checksums of the model as it is now (:func:`weight_checksums`).

        Raises:
            FileFormatError: If it is damaged.
            ValueError: If it is a run with other settings or of another model; what differs is named.
        """
        advice = "use another folder, or delete this one to start over"
        body = read_run(self._run, _KEY, _VERSION, self.settings, kind="a one-shot run", advice=advice)
        pruned = {name: entry["weight"] for name, entry in body["layers"].items()}
        odd = [name for name, value in weights.items() if value not in (body["weights"].get(name), pruned.get(name))]
        if odd:
            name = repr(odd[0]) if odd[0] else "parameters that are not pruned"
            raise ValueError(
                f"{self.path} holds a run of another model: {name} differ{'s' if odd[0] else ''}; {advice}"
            )
        self.body = body

    @property
    def done(self) -> int:
        """How many units are done."""
        return len(self.body["units"])

    def decided(self) -> dict[str, Tensor] | None:
        """The masks that :meth:`begin` was given."""
        return {n: m.mask for n, m in read_masks(self._masks)[0].items()} if self.body["decided"] else None

    def add(
        self,
        name: str,
        layers: Mapping[str, Layer],
        masks: Mapping[str, Tensor],
        entries: Mapping[str, Any],
        warnings: Sequence[str],
        activations: Activations,
        seconds: float,
    ) -> None:
        """A unit is done: its layers as they are now, their masks and what the report says of them."""
        number = self.done + 1
        if layers:
            tensors = {f"weight.{n}": layer.weight.detach().cpu().contiguous() for n, layer in layers.items()}
            packed = {n: SparseMask(mask) for n, mask in masks.items()}
            tensors |= {f"mask.{n}": mask.packed.cpu() for n, mask in packed.items()}
            self._save(self._unit(number), tensors)
        before = self.body["activations"]
        after = None
        if any(activations):
            after = {
                "file": f"activations-{number:04d}.safetensors",
                "slots": self._save_activations(number, activations),
            }
        for n, layer in layers.items():
            self.body["layers"][n] = {
                "unit": number,
                "weight": tensor_checksum(layer.weight),
                "mask": packed[n].checksum(),
                "entry": entries[n],
            }
        self.body["units"].append(name)
        self.body |= {"warnings": list(warnings), "activations": after, "seconds": seconds}
        self._write()
        if before is not None:
            (self.path / before["file"]).unlink(missing_ok=True)

    def restore(self, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        """Put the weights of all units that are done into the model, in place; returns their masks.

        Raises:
            FileFormatError: If a file is damaged; it is named.
        """
        masks = {}
        units = {entry["unit"] for entry in self.body["layers"].values()}
        for unit in sorted(units):
            tensors = self._load(self._unit(unit))
            for name, entry in self.body["layers"].items():
                if entry["unit"] != unit:
                    continue
                weight, layer = tensors[f"weight.{name}"], layers[name]
                mask = SparseMask.from_packed(tensors[f"mask.{name}"], weight.shape)
                if tensor_checksum(weight) != entry["weight"] or mask.checksum() != entry["mask"]:
                    raise FileFormatError(f"{self._unit(unit)} is damaged: {name!r} does not match its checksum")
                with torch.no_grad():
                    layer.weight.copy_(weight)
                masks[name] = mask.mask.to(layer.weight.device)
        return masks

    def weight(self, name: str) -> Tensor | None:
        """The weight of one layer as a unit that is done left it, or None; not loaded into the model.

        Raises:
            FileFormatError: If a file is damaged; it is named.
        """
        entry = self.body["layers"].get(name) if self.body else None
        if entry is None:
            return None
        path = self._unit(entry["unit"])
        weight = self._load(path, [f"weight.{name}"])[f"weight.{name}"]
        if tensor_checksum(weight) != entry["weight"]:
            raise FileFormatError(f"{path} is damaged: {name!r} does not match its checksum")
        return weight

    def activations(self) -> Activations | None:
        """What :meth:`add` was given last."""
        entry = self.body["activations"]
        if entry is None:
            return None
        tensors = self._load(self.path / entry["file"])
        held: Activations = []
        for i, slots in enumerate(entry["slots"]):
            held.append({})
            for j, (kind, block, path, checksum) in enumerate(slots):
                value = tensors[f"{i}.{j}"]
                if tensor_checksum(value) != checksum:
                    raise FileFormatError(
                        f"{self.path / entry['file']} is damaged: {i}.{j} does not match its checksum"
                    )
                held[-1][Slot(kind, block, tuple(path))] = value
        return held

    def _save_activations(self, number: int, activations: Activations) -> list[list[Any]]:
        tensors: dict[str, Tensor] = {}
        slots: list[list[Any]] = []
        memory: set[int] = set()
        for i, held in enumerate(activations):
            slots.append([[s.kind, s.block, list(s.path), tensor_checksum(x)] for s, x in held.items()])
            for j, x in enumerate(held.values()):
                # A copy where memory is shared, as by outputs of one block: the format refuses it.
                shared = x.untyped_storage().data_ptr() in memory
                memory.add(x.untyped_storage().data_ptr())
                tensors[f"{i}.{j}"] = x.clone().contiguous() if shared else x.contiguous()
        self._save(self.path / f"activations-{number:04d}.safetensors", tensors)
        return slots

    def _unit(self, number: int) -> Path:
        return self.path / f"unit-{number:04d}.safetensors"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        with replacing(path, overwrite=True) as temporary:
            write_safetensors(tensors, temporary, {})

    def _load(self, path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        try:
            if names is None:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"cannot read {path}: {error}; delete the folder to start over") from None

    def _write(self) -> None:
        write_run(self._run, _KEY, self.body)

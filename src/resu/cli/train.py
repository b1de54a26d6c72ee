"""``resu train``: a sparse network from a configuration file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import CliError, Force, Json, fail, print_json, progress, stdout

if TYPE_CHECKING:
    from resu.experiments.train import Config, Result

EXAMPLE = (
    "Example: resu train examples/configs/mlp_fashion_mnist.yaml --set method.name=set --set seed=1 --out runs/set-1"
)


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A .yaml or .json file.")],
    out: Annotated[Path | None, typer.Option(help="The folder of the run.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Over the file, such as method.sparsity=0.95; may be repeated."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, bit for bit as if it had never stopped.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration in full and leave.")] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Train a network, dense or sparse by any method, and write down all that came of it.

    The folder gets config.json, log.csv, checkpoints while it trains (also at Ctrl-C), and in the end result.json,
    model.safetensors and masks.safetensors; `resu leaderboard` makes tables of such folders. Under torchrun each
    process takes its part of every batch.
    """
    from resu.experiments.train import Interrupted, LostProcess, load_config, run

    read = load_config(config, settings or ())
    if dry_run:
        _print_config(read, as_json)
        return
    if out is None:
        raise CliError("--out is missing: name the folder of the run")
    if out.exists() and not out.is_dir():
        raise CliError(f"--out {out} is a file; name a folder")
    if resume and force:
        raise CliError("--resume goes on with a run and --force replaces it; give one of them")
    first = os.environ.get("RANK", "0") == "0"
    try:
        with _shown(first) as tell:
            result = run(read, out, resume=resume, force=force, on_event=tell)
    except FileExistsError:
        raise CliError(
            f"{out} holds a run already; --resume goes on with it, --force replaces it, --out names another folder"
        ) from None
    except Interrupted as stop:
        fail(f"{stop}; go on with: resu train {out / 'config.json'} --out {out} --resume", 130)
    except LostProcess as lost:
        fail(f"{lost}: the same command with --resume", 1)
    except FloatingPointError as error:
        fail(str(error), 1)
    if first:
        _tell(result, out, as_json)


@contextlib.contextmanager
def _shown(first: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener that shows on a terminal how far a run is; the first of several processes does."""
    if not first:
        yield lambda name, about: None
        return
    with progress() as bar:
        task = bar.add_task("reading data", total=None)

        def tell(name: str, about: dict[str, Any]) -> None:
            if name in ("start", "step"):
                bar.update(task, completed=about["step"], total=about["steps"])
            if name == "start":
                bar.update(task, description=about["setting"])
            if name == "log":
                val = "" if about["val"] is None else f", {about['metric']} {about['val']:.4g}"
                bar.update(task, description=f"loss {about['loss']:.4g}, sparsity {about['sparsity']:.3f}{val}")

        yield tell


def _print_config(config: Config, as_json: bool) -> None:
    from resu.experiments.train.typed import plain

    values = plain(config)
    if not as_json:
        try:
            import yaml
        except ImportError:
            as_json = True
        else:
            sys.stdout.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    if as_json:
        print_json(values)


def _tell(result: Result, out: Path, as_json: bool) -> None:
    """The result, and what to do next."""
    from dataclasses import asdict

    if as_json:
        print_json({**asdict(result), "out": str(out)})
        return
    unit = " %" if result.metric == "accuracy" else ""
    lines = [
        f"{result.model} on {result.data}, {result.method}, seed {result.seed}: {result.steps} steps, "
        f"{result.seconds:.0f} s of training",
        f"  test {result.metric} {result.test:.4g}{unit}, held-out {result.val:.4g}{unit}",
    ]
    if result.sparsity:
        exact = "exact" if result.exact else "NOT the count asked for"
        lines.append(
            f"  sparsity {result.actual_sparsity:.6g} ({exact}), {100 * result.explored:.3g} % of all positions tried"
        )
    if result.sparsity and result.training_flops is not None and result.inference_flops is not None:
        lines.append(
            f"  FLOPs of training {result.training_flops:.3g} and of inference {result.inference_flops:.3g} of dense"
        )
    console = stdout()
    console.print("\n".join(lines), markup=False)
    files = ["model.safetensors", *(["masks.safetensors"] if result.sparsity else []), "result.json", "log.csv"]
    console.print(f"\nIn {out}/: {', '.join(files)}\nNext:  resu leaderboard {out}", markup=False, soft_wrap=True)

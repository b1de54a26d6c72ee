"""What sparse training costs: steps between topology updates, and the updates, against the same steps without.

    python benchmarks/bench_sparse_training.py
    python benchmarks/bench_sparse_training.py --rivals FOLDER     # beside other libraries, see rivals.py

Networks with equal weights train side by side, one step after the other in turn, with one thread. Each step is compared
with the dense step of the same round, for shared machines drift and ratios within a round do not; ``dense again`` is a
second dense network and shows what such a comparison is worth. On the CPU the clock is the CPU time of the process,
which other processes do not add to.

``between`` is a step after which the topology stays, in dense steps; ``update`` what an update adds to the steps it has
to do with (its own, whose gradient may be caught whole, and the next one), in dense steps. All rules have sparsity 0.9
and the same interval, also those that usually update at every step.

A second table, ``…_facts.csv``, says of RigL and SET in each library what can be counted in three intervals: whether
the count is the one asked for, whether pruned weights are 0 after each step, what an update leaves in the optimizer's
state, how many of the pruned layers are norms or embeddings, and whether ``optimizer.step`` still takes a closure.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from machine import machine
from resu import __version__
from resu.core.counting import keep_count
from resu.experiments.models import CharGPT, ResNet
from resu.training import Sparsifier
from resu.training.algorithms import algorithms
from rivals import END, RIVALS, Contender, nothing, state_of, why_not

SYMBOLS, ALPHA = 65, 0.3
BATCHES = {"resnet20": (64, 128), "gpt": (16,)}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}
RULES = (
    "static", "magnitude", "set", "rigl", "mest", "granet", "ac-dc", "top-kast", "ste", "srigl", "snfs", "resu",
)  # fmt: skip
ENTRIES = [(name, rule) for name in RIVALS for rule in ("rigl", "set") if (name, rule) != ("rigl-torch", "set")]
TIMES = (
    "network", "weights", "batch", "optimizer", "library", "rule", "between_p25", "between_median", "update_p25",
    "update_median", "step_ms", "rounds", "interval", "sparsity", "device", "clock", "note", "cpu", "flags", "torch",
    "python",
)  # fmt: skip
# Summed over the steps: pruned weights that are not 0 after a step; positions grown, and with state of the optimizer
# right after the update; positions dropped, and with state after the next step; weights that stay and have other state
# after an update than before it.
COUNTED = ("not_zero", "grown", "grown_with_state", "dropped", "dropped_with_state", "others_state_changed")
FACTS = (
    "network", "optimizer", "library", "rule", "asked", "kept", *COUNTED, "norms_and_embeddings", "takes_closure",
    "note", "torch",
)  # fmt: skip


class Ours(Contender):
    """This project."""

    def __init__(self, model: nn.Module, make: Callable[..., torch.optim.Optimizer], interval: int, rule: str) -> None:
        super().__init__(model, make)
        settings: dict[str, Any] = {"sparsity": 0.9, "interval": interval}
        if rule in ("magnitude", "granet", "ac-dc", "mest"):
            settings["end_step"] = END
        if rule == "resu":
            settings["initial_sparsity"] = None
        pattern = "row" if rule == "srigl" else None
        self.rule = algorithms[rule](**settings)
        # Before the driver's own hook: between the optimizer's work and its.
        self.optimizer.register_step_post_hook(lambda *_: self.before())
        self.driver = Sparsifier(model, self.optimizer, self.rule, pattern=pattern, distribution="uniform")

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        super().step(loss)
        self.after()

    def masks(self) -> dict[str, Tensor]:
        return {name: mask.mask for name, mask in self.driver.masks.items()}

    def effective(self) -> dict[str, Tensor]:
        return {name: layer.weight.detach() for name, layer in self.driver.layers.items()}

    def state(self) -> dict[str, list[Tensor]]:
        return {name: state_of(self.optimizer, layer.weight) for name, layer in self.driver.layers.items()}

    def asked(self) -> int:
        return keep_count(sum(layer.weight.numel() for layer in self.driver.layers.values()), 0.9)


def network(name: str, device: str) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return (ResNet() if name == "resnet20" else CharGPT(SYMBOLS)).to(device)


def loss_of(name: str, batch: int, device: str) -> Callable[[nn.Module], Tensor]:
    """The loss on one batch of random data: what is in it costs the same."""
    generator = torch.Generator().manual_seed(1)
    if name == "resnet20":
        x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
        y = torch.randint(10, (batch,), generator=generator).to(device)
        return lambda model: F.cross_entropy(model(x), y)
    x, y = (torch.randint(SYMBOLS, (batch, 64), generator=generator).to(device) for _ in range(2))
    return lambda model: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


Key = tuple[str, str]  # library, rule


def contenders(name: str, make: Callable[..., torch.optim.Optimizer], options: Any) -> tuple[dict[Key, Contender], Any]:
    """Those that can be made here, and why the others cannot."""
    found: dict[Key, Contender] = {}
    missing: dict[Key, str] = {}
    for rule in options.rules:
        found["resu", rule] = Ours(network(name, options.device), make, options.interval, rule)
    for library, rule in ENTRIES if options.rivals else []:
        reason = why_not(library, options.rivals)
        if reason is None:
            try:
                model = network(name, options.device)
                found[library, rule] = RIVALS[library](model, make, options.interval, ALPHA, rule)
            except Exception as error:
                reason = f"not made: {_said(error)}"
        if reason is not None:
            missing[library, rule] = reason
    return found, missing


def _said(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = (
        "" if trace is None else f" in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_frame.f_code.co_name}"
    )
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:160]}".rstrip(": ")


class Clock:
    """Seconds of a call."""

    def __init__(self, device: str, wall: bool) -> None:
        self.cuda = device.startswith("cuda")
        self.name = "wall" if self.cuda or wall else "cpu"
        self._now = time.perf_counter if self.name == "wall" else time.process_time

    def __call__(self, act: Callable[[], None]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = self._now()
        act()
        if self.cuda:
            torch.cuda.synchronize()
        return self._now() - start


def time_all(name: str, batch: int, optimizer: str, options: Any) -> list[dict[str, Any]]:
    """Rows of one network."""
    make, loss = OPTIMIZERS[optimizer], loss_of(name, batch, options.device)
    found, missing = contenders(name, make, options)
    dense: dict[Key, Contender] = {
        ("dense", ""): Contender(network(name, options.device), make),
        ("dense again", ""): Contender(network(name, options.device), make),
    }
    runs = {**dense, **found}
    clock = Clock(options.device, options.wall)
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    order, begin = list(runs), time.perf_counter()
    for i in range(options.rounds):
        for key in order[i % len(order) :] + order[: i % len(order)]:  # nobody always comes after the same one
            if key in missing:
                continue
            try:
                seconds[key].append(clock(lambda run=runs[key]: run.step(loss)))  # type: ignore[misc]
            except Exception as error:
                missing[key] = f"step {i + 1}: {_said(error)}"
        _progress(f"{name}, batch {batch}, {optimizer}", i + 1, options.rounds, begin)
    base = seconds["dense", ""]
    weights = sum(p.numel() for p in runs["dense", ""].model.parameters() if p.ndim > 1)
    rows = []
    for key in [*order, *(key for key in missing if key not in order)]:
        rule = getattr(found.get(key), "rule", None)
        due = _due(key, rule, options)
        row = {
            "network": name, "weights": weights, "batch": batch, "optimizer": optimizer, "library": _named(key[0]),
            "rule": key[1], "rounds": options.rounds, "interval": options.interval, "sparsity": 0.9,
            "device": options.device, "clock": clock.name, "note": missing.get(key, ""), **machine(),
        }  # fmt: skip
        if options.device != "cpu":
            row["cpu"] = torch.cuda.get_device_name()
        rows.append(row if key in missing else {**row, **ratios(seconds[key], base, due, 2 * options.interval)})
    return rows


def _due(key: Key, rule: Any, options: Any) -> Callable[[int], bool]:
    if key[0].startswith("dense"):
        return lambda step: False
    return rule.due if rule is not None else lambda step: step % options.interval == 0  # type: ignore[no-any-return]


def ratios(mine: list[float], dense: list[float], due: Callable[[int], bool], warm: int) -> dict[str, Any]:
    """Of the steps after the first ``warm`` ones."""
    ratio = {step: a / b for step, (a, b) in enumerate(zip(mine, dense, strict=True), 1) if step > warm}
    between = sorted(r for step, r in ratio.items() if not due(step) and not due(step - 1))
    found: dict[str, Any] = {"step_ms": round(1e3 * statistics.median(mine[warm:]), 2)}
    if between:
        usual = statistics.median(between)
        found["between_p25"] = round(between[len(between) // 4], 3)
        found["between_median"] = round(usual, 3)
        extra = sorted(r + ratio[s + 1] - 2 * usual for s, r in ratio.items() if due(s) and s + 1 in ratio)
        if extra:
            found["update_p25"] = round(extra[len(extra) // 4], 2)
            found["update_median"] = round(statistics.median(extra), 2)
    return found


def facts_of(name: str, optimizer: str, options: Any) -> list[dict[str, Any]]:
    """What can be counted of RigL and SET in three intervals."""
    loss = loss_of(name, 8, options.device)
    chosen = argparse.Namespace(**{**vars(options), "rules": ["rigl", "set"]})
    found, missing = contenders(name, OPTIMIZERS[optimizer], chosen)
    rows = []
    for key in [*found, *missing]:
        row: dict[str, Any] = {"network": name, "optimizer": optimizer, "library": _named(key[0]), "rule": key[1]}
        row |= {"note": missing.get(key, ""), "torch": machine()["torch"]}
        if key not in missing:
            row |= _counted(found[key], loss, 3 * options.interval)
        rows.append(row)
    return rows


def _counted(run: Contender, loss: Callable[[nn.Module], Tensor], steps: int) -> dict[str, Any]:
    seen: list[tuple[dict[str, Tensor], dict[str, list[Tensor]]]] = []

    def look() -> None:
        state = {name: [x.clone() for x in found] for name, found in run.state().items()}
        seen.append(({name: mask.clone() for name, mask in run.masks().items()}, state))

    run.before = run.after = look
    counts = dict.fromkeys(COUNTED, 0)
    gone: dict[str, Tensor] = {}  # what the step before has dropped
    note = ""
    try:
        for _ in range(steps + 1):
            seen.clear()
            run.step(loss)
            weights, masks, state_now = run.effective(), run.masks(), run.state()
            (old, state), (new, after) = seen[0], seen[-1]
            for name, mask in masks.items():
                counts["not_zero"] += int((weights[name] != 0)[~mask].sum())
                if state_now[name] and name in gone:
                    counts["dropped_with_state"] += int((_any(state_now[name]) & gone[name] & ~mask).sum())
                grown, dropped, stayed = new[name] & ~old[name], old[name] & ~new[name], old[name] & new[name]
                counts["grown"] += int(grown.sum())
                counts["dropped"] += int(dropped.sum())
                if after[name] and bool(grown.any()):
                    counts["grown_with_state"] += int((_any(after[name]) & grown).sum())
                    moved = [a != b for a, b in zip(state[name], after[name], strict=True)]
                    counts["others_state_changed"] += int((_any(moved) & stayed).sum())
                gone[name] = dropped
    except Exception as error:
        note = _said(error)
    run.before = run.after = nothing
    masks = run.masks()
    usual = {id(m.weight) for m in run.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    beyond = sum(id(p) not in usual for name, p in run.model.named_parameters() if name in masks)
    found = {"asked": run.asked(), "kept": sum(int(mask.sum()) for mask in masks.values()), **counts}
    return {**found, "norms_and_embeddings": beyond, "takes_closure": _takes_closure(run, loss), "note": note}


def _any(tensors: list[Tensor]) -> Tensor:
    """Where one of them is not 0."""
    return torch.stack([x != 0 for x in tensors]).any(0)


def _takes_closure(run: Contender, loss: Callable[[nn.Module], Tensor]) -> str:
    def closure() -> Tensor:
        run.optimizer.zero_grad()
        value = loss(run.model)
        value.backward()
        return value

    try:
        run.optimizer.step(closure)
    except Exception as error:
        return f"no: {type(error).__name__}"
    return "yes"


def _named(library: str) -> str:
    if library == "resu":
        return f"resu {__version__}"
    return f"{library} {RIVALS[library].version}" if library in RIVALS else library


def _progress(what: str, done: int, rounds: int, begin: float) -> None:
    if done == rounds or done % max(1, rounds // 20) == 0:
        left = (time.perf_counter() - begin) / done * (rounds - done)
        print(f"\r{what}: {done}/{rounds} rounds, {left:.0f} s left  ", end="", file=sys.stderr, flush=True)
    if done == rounds:
        print(file=sys.stderr)


def write(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]], append: bool) -> None:
    """One CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not (append and path.exists())
    with path.open("w" if new else "a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="steps of each network (default: 64 of resnet20, 240 of gpt)")
    parser.add_argument("--interval", type=int, default=8, help="steps between updates")
    parser.add_argument("--networks", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--batch", type=int, nargs="+", help="instead of 64 and 128, or 16 for gpt")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--rivals", type=Path, help="folder with other libraries, see rivals.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wall", action="store_true", help="on the CPU too, time by the clock on the wall")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_training.csv")
    parser.add_argument("--append", action="store_true", help="add to the files instead of replacing them")
    options = parser.parse_args(argv)
    if options.interval < 4:
        parser.error("--interval must be at least 4: an update has to do with two steps")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
    rounds, append = options.rounds, options.append
    facts = options.out.with_name(f"{options.out.stem}_facts.csv")
    for name in options.networks:
        options.rounds = rounds or {"resnet20": 64, "gpt": 240}[name]
        for optimizer in options.optimizers:
            write(facts, FACTS, facts_of(name, optimizer, options), append)
            for batch in options.batch or BATCHES[name]:
                rows = time_all(name, batch, optimizer, options)
                write(options.out, TIMES, rows, append)
                append = True
                print(f"{name}, batch {batch}, {optimizer}:{'between':>26}{'update':>10}   (dense steps; p25, median)")
                for row in rows:
                    shown = [row.get(k, "") for k in ("between_p25", "between_median", "update_p25", "update_median")]
                    print(f"  {row['library']:20} {row['rule']:10}" + "".join(f"{x!s:>8}" for x in shown), row["note"])
    print(f"written to {options.out} and {facts}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

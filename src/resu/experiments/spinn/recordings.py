"""The three real recordings: wear while turning, wear while milling, displacement by heat.

No public set has wear and displacement of one machine, so the twin has one network per quantity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from resu.experiments.spinn.recording import Recording
from resu.experiments.spinn.signals import Array, integral, lagged, per_sequence

__all__ = ["RECORDINGS", "load_milling", "load_recording", "load_thermal", "load_wear"]


def _arrays(folder: str | os.PathLike[str], *parts: str) -> Mapping[str, Array]:
    path = Path(folder).joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; name the folder that holds {'/'.join(parts)}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def load_wear(folder: str | os.PathLike[str]) -> Recording:
    """Flank wear while turning, 13 tools, a row per second (Vicomtech and Mondragon Unibertsitatea, CC BY-SA 4.0).

    Features: statistics of the three forces, the two force ratios that flank wear raises, both smoothed over 10 s, the
    time in cut and the work of cutting so far. The unit of wear is not stated by its authors; its size suggests
    micrometres. Neither is that of speed: it is taken relative to
    its mean with the first tool.

    Raises:
        FileNotFoundError: Without ``tool_wear_vicomtech/tool_wear_vicomtech.npz`` in ``folder``.
    """
    data = _arrays(folder, "tool_wear_vicomtech", "tool_wear_vicomtech.npz")
    names, tool = [str(n) for n in data["feature_names"]], data["tool"].astype(np.int64)
    column = {name: np.nan_to_num(data["X"][:, i]) for i, name in enumerate(names)}
    force = [n for n in names if n.startswith("F_")]
    load = np.clip(column["F_c_MEAN"], 1.0, None)
    speed = np.clip(column["CON.A.SREAL.S"], 0.0, None)
    speed = speed / speed[tool == tool[0]].mean()
    now = np.stack(
        [column["F_p_MEAN"], column["F_f_MEAN"], load, column["F_p_MEAN"] / load, column["F_f_MEAN"] / load], 1
    )
    pieces = per_sequence(tool, now, load * speed)
    smooth = np.concatenate([lagged(x, 10.0, 1.0) for x, _ in pieces])
    time = np.concatenate([np.arange(float(len(x))) for x, _ in pieces])
    work = np.concatenate([integral(p, np.arange(float(len(p)))) for _, p in pieces])
    return Recording(
        name="wear",
        inputs=np.c_[np.stack([column[n] for n in force], 1), now[:, 3:], smooth, time, work],
        features=(
            *(*force, "F_p/F_c", "F_f/F_c"),
            *(f"{n}, 10 s" for n in ("F_p", "F_f", "F_c", "F_p/F_c", "F_f/F_c")),
            *("time in cut", "work of cutting"),
        ),
        targets=data["vb"][:, None],
        channels=("flank wear",),
        unit="µm",
        time=time,
        time_unit="s",
        drive=work[:, None],
        drives=("cutting force × relative speed, N",),
        sequence=tool,
        group=tool,
        group_name="tool",
        lag=20,
        parts=((3, 5, 6, 7, 9, 11, 13, 15), (12, 16), (4, 10, 14)),
    )


_SUBSAMPLES = 5  # of one run: every fifth sample each, so that all see the whole cut


def load_milling(folder: str | os.PathLike[str]) -> Recording:
    """Flank wear while milling, 16 cases (NASA Ames and UC Berkeley), five interleaved subsamples of each run.

    The column ``thermal`` of that file was not measured and is never read. Features: statistics of spindle current and
    vibration in the run, and relative to the case's first run; depth, feed and material; runs so far, the load so far,
    and the products that let one rate of wear per material and cut be told.

    Raises:
        FileNotFoundError: Without ``nasa_milling/nasa_milling_raw_units.npz`` in ``folder``.
    """
    data = _arrays(folder, "nasa_milling", "nasa_milling_raw_units.npz")
    columns = ("signals", "case", "run_index", "vb_mm", "material")
    signals, case, run, wear, material = (
        np.concatenate([data[f"{part}_{name}"] for part in ("train", "val", "test")]) for name in columns
    )
    rows, targets, sequence, time, drive = [], [], [], [], []
    for number in dict.fromkeys(case.tolist()):
        there = case == number
        runs = list(dict.fromkeys(run[there].tolist()))
        for part in range(_SUBSAMPLES):
            samples = [np.flatnonzero(there & (run == r))[part::_SUBSAMPLES] for r in runs]
            stats = np.stack([_statistics(signals[s][:, 2:]) for s in samples])
            elapsed = np.array([float(r - runs[0]) for r in runs])
            load = stats[:, 5]  # mean spindle current, direct
            done = integral(load, elapsed) + load[0]
            depth, feed = signals[samples[0][0], :2]
            steel = float(material[samples[0][0]] == 2)
            rows.append(np.c_[stats, stats[:, :8] - stats[0, :8], _products(elapsed, done, depth, feed, steel)])
            targets.append(np.array([wear[s[0]] for s in samples]))
            sequence.append(np.full(len(runs), _SUBSAMPLES * number + part))
            time.append(elapsed)
            drive.append(integral(load, elapsed))
    order = np.concatenate(sequence)
    return Recording(
        name="milling",
        inputs=np.concatenate(rows),
        features=_MILLING_FEATURES,
        targets=np.concatenate(targets)[:, None],
        channels=("flank wear",),
        unit="mm",
        time=np.concatenate(time),
        time_unit="run",
        drive=np.concatenate(drive)[:, None],
        drives=("spindle current (V of its sensor) at constant speed",),
        sequence=order,
        group=order // _SUBSAMPLES,
        group_name="case",
        lag=1,
        parts=((3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16), (1, 15), (2, 10, 14)),
    )


def _statistics(x: Array) -> Array:
    """Spread, then mean after the entry of the cutter, of each signal."""
    return np.concatenate([x.std(0), x[len(x) // 3 :].mean(0)])


def _products(runs: Array, load: Array, depth: float, feed: float, steel: float) -> Array:
    one = np.ones_like(runs)
    cut = (steel, depth, feed, steel * depth, steel * feed, depth * feed)
    rates = [runs, *(runs * c for c in cut), load, load * steel]
    return np.stack([*rates, *(one * c for c in cut)], 1)


_SIGNALS = ("spindle current AC", "spindle current DC", "vibration of table", "vibration of spindle")
_CUT = ("steel", "depth", "feed", "steel × depth", "steel × feed", "depth × feed")
_MILLING_FEATURES = (
    *(f"{s}, {w}" for w in ("spread", "mean") for s in _SIGNALS),
    *(f"{s}, {w} above the first run" for w in ("spread", "mean") for s in _SIGNALS),
    *("runs", *(f"runs × {c}" for c in _CUT), "load so far", "load so far × steel", *_CUT),
)

_TAUS = {"temperature": (300, 1800, 7200), "speed": (300, 900, 1800, 3600, 7200), "speed²": (300, 1800, 7200)}


def load_thermal(folder: str | os.PathLike[str]) -> Recording:
    """Displacement by heat, five channels over 46 h (CAIVIAC FL_THERMAL, MIT), split in time.

    Features: 16 temperatures and the spindle's speed, now and lagged by first-order systems of 5 min to 2 h, as heat
    is. Blocks: 60 % train, 10 % validate, 30 % test, in this order.

    Raises:
        FileNotFoundError: Without ``thermal_displacement_caiviac/thermal_displacement_caiviac.npz`` in ``folder``.
    """
    data = _arrays(folder, "thermal_displacement_caiviac", "thermal_displacement_caiviac.npz")
    time, warm, speed = data["time_s"], data["temp_c"], data["spindle_rpm"][:, None] / 1000
    series = {"temperature": warm, "speed": speed, "speed²": speed**2}
    lags = [lagged(series[what], float(tau), 15.0) for what, taus in _TAUS.items() for tau in taus]
    here = [f"t{i}" for i in range(1, 17)]
    n = len(time)
    block = np.searchsorted([int(0.6 * n), int(0.7 * n)], np.arange(n), side="right").astype(np.int64)
    drive = integral(np.c_[speed, speed**2, warm], time)
    return Recording(
        name="thermal",
        inputs=np.concatenate([warm, speed, *lags], 1),
        features=(
            *(*here, "speed"),
            *(f"{t}, {tau} s" for tau in _TAUS["temperature"] for t in here),
            *(f"{what}, {tau} s" for what in ("speed", "speed²") for tau in _TAUS[what]),
        ),
        targets=data["disp_um"],
        channels=("ch1", "ch2", "ch3", "ch4", "ch5"),
        unit="µm",
        time=time,
        time_unit="s",
        drive=drive,
        drives=("spindle speed, 1000 rpm", "its square, (1000 rpm)²", *(f"temperature {t}, °C" for t in here)),
        sequence=np.zeros(n, dtype=np.int64),
        group=block,
        group_name="block of time",
        lag=4,
        parts=((0,), (1,), (2,)),
    )


RECORDINGS: dict[str, Callable[[str | os.PathLike[str]], Recording]] = {
    "wear": load_wear,
    "milling": load_milling,
    "thermal": load_thermal,
}


def load_recording(name: str, folder: str | os.PathLike[str]) -> Recording:
    """One of :data:`RECORDINGS` from the folder of data sets.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If its file is absent.
    """
    if name not in RECORDINGS:
        raise ValueError(f"unknown recording {name!r}; known: {', '.join(RECORDINGS)}")
    return RECORDINGS[name](folder)

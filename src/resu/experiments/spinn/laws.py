"""Physics of wear and of heat as terms of a loss: each has a unit, and its constants are learned.

A prediction is compared with a law over pairs of rows a short time apart, by finite differences along the series; what
drives the law is integrated over the pair, so that both sides are means over the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.ridge import ridge_weights
from resu.experiments.spinn.signals import lagged, per_sequence

__all__ = ["Archard", "LumpedHeat", "Pairs", "Term", "law_for"]


@dataclass(frozen=True)
class Pairs:
    """Predictions at both ends of some pairs, and what lay between.

    Attributes:
        first, last: ``[pairs, channels]``, in units of the target.
        time: ``[pairs, 1]``, from one end to the other, > 0.
        drive: ``[pairs, drives]``, means over that time.
    """

    first: Tensor
    last: Tensor
    time: Tensor
    drive: Tensor

    @property
    def rate(self) -> Tensor:
        """``[pairs, channels]``: change per time."""
        return (self.last - self.first) / self.time


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Attributes:
        residual: What should be 0, in ``unit``; any shape.
        unit: Its unit.
        scale: What counts as a large residual, in ``unit``: the loss takes the square of residual / scale.
        weight: Of that square's mean in the loss.
    """

    residual: Tensor
    unit: str
    scale: float
    weight: float

    @property
    def loss(self) -> Tensor:
        """Scalar without unit, as the optimizer sees it."""
        return self.weight * (self.residual / self.scale).square().mean()

    @property
    def rms(self) -> float:
        """Root mean square of the residual, in ``unit``."""
        return float(self.residual.detach().square().mean().sqrt())


class Archard(nn.Module):
    """Archard's law of wear: volume worn per time is proportional to load × sliding speed (Archard 1953, eq. 5).

    Wear is not negative, does not fall along a tool's life, and rises by ``k · load · speed``; ``k`` is learned, and
    positive.

    Args:
        k: Start value, in ``unit`` of wear per time and drive.
        size: Typical wear, for scaling.
        rate: Typical wear per time, for scaling.
        weight: Of Archard's term; the two inequalities, which hold for certain, have weight 1.
        unit: Of wear.
        time_unit: Of time.
        drive: What load × speed is, with its unit.

    Example:
        >>> law = Archard(k=0.5, size=1.0, rate=1.0, weight=1.0, unit="µm", time_unit="s", drive="N·m/s")
        >>> pairs = Pairs(torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([[2.0]]))
        >>> {name: round(term.rms, 6) for name, term in law.terms(pairs).items()}
        {'wear is not negative': 0.0, 'wear does not fall': 0.0, "Archard's law": 0.0}
    """

    def __init__(
        self, *, k: float, size: float, rate: float, weight: float, unit: str, time_unit: str, drive: str
    ) -> None:
        super().__init__()
        if not k > 0:
            raise ValueError(f"the wear constant is positive, got {k!r}")
        self.log_k = nn.Parameter(torch.tensor(k).log())
        self.size, self.rate, self.weight = size, rate, weight
        self.unit, self.time_unit, self.drive = unit, time_unit, drive

    def terms(self, pairs: Pairs) -> dict[str, Term]:
        """Three terms; the residual of Archard's law is ``d(wear)/dt − k · load · speed``."""
        per_time = f"{self.unit}/{self.time_unit}"
        below = torch.cat([pairs.first, pairs.last]).clamp(max=0)
        law = pairs.rate - self.log_k.exp() * pairs.drive
        return {
            "wear is not negative": Term(below, self.unit, self.size, 1.0),
            "wear does not fall": Term(pairs.rate.clamp(max=0), per_time, self.rate, 1.0),
            "Archard's law": Term(law, per_time, self.rate, self.weight),
        }

    def constants(self) -> dict[str, str]:
        """What was learned, with units."""
        return {"k": f"{float(self.log_k.detach().exp()):.4g} {self.unit}/{self.time_unit} per ({self.drive})"}


class LumpedHeat(nn.Module):
    """A body that is heated and cools: ``τ · dd/dt + d = o + Σ g_i · q_i``, per channel of displacement ``d``.

    The lumped thermal ODE of first order: the body has one temperature, displacement is proportional to it, and heat
    flows in proportion to differences of temperature. ``q`` are the temperatures around the body, and what heats it
    (speed and its square). τ > 0, g and o are learned.

    Args:
        tau: ``[channels]`` start values of τ.
        gain: ``[drives, channels]`` start values of g.
        offset: ``[channels]`` start values of o.
        size: ``[channels]`` typical displacement, for scaling.
        usual: ``[2, drives]``: mean and standard deviation of ``q``, for scaling.
        weight: Of the term.
        unit: Of displacement.
        drives: What ``q`` are, with units.

    Example:
        >>> law = LumpedHeat(tau=torch.tensor([2.0]), gain=torch.ones(1, 1), offset=torch.zeros(1), size=torch.ones(1),
        ...                  usual=torch.tensor([[4.0], [0.5]]), weight=1.0, unit="µm", drives=("heat, W",))
        >>> pairs = Pairs(torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[5.0]]))
        >>> float(law.residual(pairs).detach())  # 2·2 + 1 − 5
        0.0
    """

    size: Tensor
    usual: Tensor

    def __init__(
        self,
        *,
        tau: Tensor,
        gain: Tensor,
        offset: Tensor,
        size: Tensor,
        usual: Tensor,
        weight: float,
        unit: str,
        drives: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.log_tau = nn.Parameter(tau.log())
        # Learned in parts of the channel's size, for drives of the same size, so that one learning rate suits all.
        mean, spread = usual
        self.gain = nn.Parameter(gain * spread[:, None] / size)
        self.offset = nn.Parameter((offset + mean @ gain) / size)
        self.register_buffer("size", size)
        self.register_buffer("usual", usual)
        self.weight, self.unit, self.drives = weight, unit, drives

    def residual(self, pairs: Pairs) -> Tensor:
        """``[pairs, channels]``: ``τ · dd/dt + d − (o + Σ g_i · q_i)``, in the unit of displacement."""
        middle = (pairs.first + pairs.last) / 2
        return self.log_tau.exp() * pairs.rate + middle - self.steady(pairs.drive)

    def steady(self, drive: Tensor) -> Tensor:
        """``[rows, channels]``: ``o + Σ g_i · q_i``, where displacement would come to rest."""
        found: Tensor = self.size * (self.offset + (drive - self.usual[0]) / self.usual[1] @ self.gain)
        return found

    def terms(self, pairs: Pairs) -> dict[str, Term]:
        """One term, for all channels."""
        scaled = self.residual(pairs) / self.size
        scale = float(self.size.mean())
        return {"lumped heat": Term(scaled * scale, self.unit, scale, self.weight)}

    def constants(self) -> dict[str, str]:
        """What was learned, with units: a list over channels each; drives of one kind (temperatures) are summed."""
        with torch.no_grad():
            gain = self.gain * self.size / self.usual[1][:, None]
            found = {"τ": ", ".join(f"{tau:.0f}" for tau in self.log_tau.exp().tolist()) + " s"}
        named = [drive.rpartition(", ") for drive in self.drives]
        for unit in dict.fromkeys(unit for _, _, unit in named):
            here = [i for i, (_, _, u) in enumerate(named) if u == unit]
            what = named[here[0]][0] + (f" to {named[here[-1]][0]} together" if len(here) > 1 else "")
            told = ", ".join(f"{g:.3g}" for g in gain[here].sum(0).tolist())
            found[f"gain of {what}"] = f"{told} {self.unit}/({unit})"
        return found


Law = Archard | LumpedHeat
START_TAU, START_PENALTY = 1200.0, 30.0  # chosen by rolling origins (docs/spinn.md)
WEIGHTS: Mapping[str, float] = {"wear": 0.002, "milling": 0.002, "thermal": 1.0}


def law_for(data: Prepared, weight: float | None = None) -> Law:
    """The law of a recording, with start values from its training rows by least squares.

    Args:
        data: A recording with a split.
        weight: Of the law's term in the loss; None: as in the results of docs/spinn.md.

    Raises:
        ValueError: If no law is known for the name of the recording, or it does not fit.
    """
    recording, ends = data.recording, data.pairs(data.train)
    if recording.name not in WEIGHTS:
        raise ValueError(
            f"which law holds for {recording.name!r}? Name the recording 'wear' or 'milling' (Archard's law) or "
            "'thermal' (lumped heat), or train without a law"
        )
    if len(ends) < 2:
        raise ValueError(
            f"{len(ends)} pairs of training rows lie {recording.lag} rows apart (lag) in one sequence; a law needs two "
            "at least: take a smaller lag, or train without a law"
        )
    weight = WEIGHTS[recording.name] if weight is None else weight
    if recording.name == "thermal":
        return _heat(data, weight)
    if len(recording.drives) != 1:
        raise ValueError(f"Archard's law has one drive, load × speed; the recording has {len(recording.drives)}")
    pairs = take_pairs(data, ends, data.targets[ends[:, 0]], data.targets[ends[:, 1]])
    k = float((pairs.rate * pairs.drive).sum() / pairs.drive.square().sum())
    return Archard(
        k=max(k, 1e-9),
        size=float(data.targets[data.train].std()),
        rate=float(pairs.rate.std()),
        weight=weight,
        unit=recording.unit,
        time_unit=recording.time_unit,
        drive=recording.drives[0],
    )


def take_pairs(data: Prepared, ends: Tensor, first: Tensor, last: Tensor) -> Pairs:
    """Pairs of rows ``ends`` with their predictions; the mean of the drive is its integral's difference over time."""
    time = (data.time[ends[:, 1]] - data.time[ends[:, 0]])[:, None]
    drive = (data.drive[ends[:, 1]] - data.drive[ends[:, 0]]) / time
    return Pairs(first, last, time.float(), drive.float())


def _heat(data: Prepared, weight: float) -> LumpedHeat:
    """The ODE's solution is a sum of drives lagged by τ: for the start value of τ, g and o are a ridge solution.

    Differences of measurements over a minute, which the equation itself would take, are noise for the most part.
    """
    recording, train = data.recording, data.train
    lags, means = [], []
    for time, done in per_sequence(recording.sequence, recording.time, recording.drive):
        if len(time) < 2:  # its drive is not known: an integral tells means between rows
            means.append(np.full_like(done, np.nan))
            lags.append(means[-1])
            continue
        drive = np.diff(done, axis=0) / np.diff(time)[:, None]  # means from row to row
        means.append(np.concatenate([drive[:1], drive]))
        lags.append(lagged(means[-1], START_TAU, float(np.diff(time).mean())))
    train = train[torch.tensor(np.isfinite(np.concatenate(means)).all(1))[train]]
    now, late = (torch.tensor(np.concatenate(x))[train] for x in (means, lags))
    usual = torch.stack([now.mean(0), now.std(0).clamp(min=1e-12)])
    size = data.targets[train].std(0)
    gain, offset = ridge_weights((late - usual[0]) / usual[1], (data.targets[train] / size).double(), START_PENALTY)
    gain = gain / usual[1][:, None] * size
    return LumpedHeat(
        tau=torch.full_like(size, START_TAU),
        gain=gain.float(),
        offset=(offset * size - usual[0] @ gain).float(),
        size=size,
        usual=usual.float(),
        weight=weight,
        unit=recording.unit,
        drives=recording.drives,
    )

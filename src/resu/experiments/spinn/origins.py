"""What is chosen for a split in time is chosen by rolling origins: train on what was, judge what came next, four times.

One block for validation tells little of later ones when a machine does something else in each.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from resu.experiments.spinn.recording import Prepared, Recording

__all__ = ["far_origins", "rolling_origins"]

BLOCKS, FIRST = 7, 3


def rolling_origins(recording: Recording) -> list[Prepared]:
    """Splits within the training and validation parts of a recording that is one series, split in time.

    These parts are cut into seven blocks of equal length. The first three train and the fourth is judged, then the
    first four and the fifth, and so on. Rows after the judged block are not in a split at all, so nothing of the
    test part is.

    Args:
        recording: With its parts in the order of time.

    Returns:
        Four splits, judged by their ``test`` rows, without a validation part; none for a recording of several series.
    """
    if len(np.unique(recording.sequence)) > 1:
        return []
    edges = _edges(recording)
    return [_cut(recording, edges[k], edges[k], edges[k + 1]) for k in range(FIRST, BLOCKS)]


def far_origins(recording: Recording) -> list[Prepared]:
    """Three splits that look as far ahead as a test part does: a block is left out, all known ones after it are judged.

    Args:
        recording: As for :func:`rolling_origins`.
    """
    edges = _edges(recording)
    return [_cut(recording, edges[k], edges[k + 1], edges[-1]) for k in range(FIRST, BLOCKS - 1)]


def _edges(recording: Recording) -> list[int]:
    known = len(recording.rows([*recording.parts[0], *recording.parts[1]]))
    return [known * k // BLOCKS for k in range(BLOCKS + 1)]


def _cut(recording: Recording, train: int, start: int, end: int) -> Prepared:
    rows = ("inputs", "targets", "time", "drive", "sequence")
    group = np.searchsorted([train, start], np.arange(end), side="right").astype(np.int64)
    cut = {name: getattr(recording, name)[:end] for name in rows}
    return dataclasses.replace(recording, **cut, group=group, parts=((0,), (), (2,))).prepare()

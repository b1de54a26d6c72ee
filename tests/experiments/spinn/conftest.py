"""Small made-up recordings that obey the laws exactly."""

import numpy as np
import pytest

from resu.experiments.spinn.recording import Recording
from resu.experiments.spinn.signals import integral


def made_up(seed=0, tools=6, rows=40):
    """Tools whose wear follows Archard's law with k = 0.05 from a noisy force."""
    make = np.random.default_rng(seed)
    inputs, wear, time, work, tool = [], [], [], [], []
    for number in range(tools):
        t = np.arange(float(rows))
        load = 3 + make.random() + 0.5 * np.sin(t / 5 + number)
        done = integral(load, t)
        inputs.append(np.c_[load + 0.1 * make.standard_normal(rows), done, t, make.standard_normal(rows)])
        wear.append(0.05 * done)
        time.append(t)
        work.append(done)
        tool.append(np.full(rows, number))
    return Recording(
        name="wear",
        inputs=np.concatenate(inputs),
        features=("force", "work", "time", "noise"),
        targets=np.concatenate(wear)[:, None],
        channels=("flank wear",),
        unit="µm",
        time=np.concatenate(time),
        time_unit="s",
        drive=np.concatenate(work)[:, None],
        drives=("force × speed, N",),
        sequence=np.concatenate(tool),
        group=np.concatenate(tool),
        group_name="tool",
        lag=4,
        parts=((0, 1, 2, 3), (4,), (5,)),
    )


@pytest.fixture
def recording():
    return made_up()


@pytest.fixture
def data(recording):
    return recording.prepare()

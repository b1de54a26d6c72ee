"""Who does what: every part once, the same answer on every rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resu.core.ranks import Ranks, joined


@given(costs=st.lists(st.integers(0, 100), max_size=12), world=st.integers(1, 5))
def test_every_part_is_done_once_and_loads_are_even(costs, world):
    named = {f"l{i}": cost for i, cost in enumerate(costs)}
    shares = [Ranks(rank, world).mine(named) for rank in range(world)]
    assert sorted(name for share in shares for name in share) == sorted(named)
    for share in shares:
        assert share == [name for name in named if name in set(share)]
    loads = [sum(named[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
        assert ranks.sum(np.array([1, 2])).tolist() == [1, 2]
        ranks.barrier()

"""Labels through views: the same as if every element of the tensor had one, and never as many."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resu.pruning.structured import find_structure
from resu.pruning.structured.flow import reshape
from resu.pruning.structured.units import Units

SHAPES = [(2, 3, 4), (6, 4), (2, 12), (24,), (1, 24, 1), (2, 3, 2, 2), (6, 2, 2), (2, 1, 3, 4), (3, 2, 4), (8, 3)]


def elements(units: Units, labels: list[Tensor], shape: tuple[int, ...]) -> list[list[int]]:
    """Roots of each component at each element."""
    return [units.roots(c.expand(shape).reshape(-1).contiguous()).tolist() for c in labels]


@settings(deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES), st.integers(0, 2))
def test_a_reshape_moves_each_elements_label_along(old: tuple[int, ...], new: tuple[int, ...], dim: int) -> None:
    units, dim = Units(), dim % len(old)
    ids = units.new(old[dim]).view([-1 if d == dim else 1 for d in range(len(old))])
    component = units.compact(ids)
    before = [] if component is None else [component]
    after = reshape(units, old, new, before, lambda sizes, dims: 0, "reshape")
    fixed = component is not None and units.reason(int(component.reshape(-1)[-1])) is not None
    if before and after:
        assert elements(units, after, new) == elements(units, before, old)  # what was tied is tied on both sides
    else:
        assert not before or fixed
    for c in after:
        assert all(n in (1, whole) for n, whole in zip(c.shape, new, strict=True))


def test_roots_of_long_chains_and_of_what_is_new() -> None:
    units = Units()
    labels = units.new(1000)
    for k in range(999, 0, -1):
        units.unite(labels[k - 1 : k], labels[k : k + 1], "chain")
    more = units.new(5)
    assert units.roots(labels).unique().tolist() == [1]
    assert units.roots(more).tolist() == more.tolist() == [1001, 1002, 1003, 1004, 1005]
    units.fix(labels[500:501], "said")
    assert units.reason(1000) == "said"
    assert units.reason(1001) is None


def test_no_labels_are_as_many_as_a_matrix_has_weights() -> None:
    largest = 0
    roots = Units.roots

    def watched(self: Units, labels: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, labels.numel())
        return roots(self, labels)

    model = nn.Sequential(nn.Linear(30, 70), nn.ReLU(), nn.Unflatten(1, (7, 10)), nn.Flatten(1), nn.Linear(70, 2))
    Units.roots = watched  # type: ignore[method-assign]
    try:
        structure = find_structure(model, torch.zeros(50, 30))
    finally:
        Units.roots = roots  # type: ignore[method-assign]
    assert structure.groups
    assert largest <= 70

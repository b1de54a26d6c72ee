"""The streamed top-k equals the one in memory, position by position, whatever the sample said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.counting import keep_count, pruned_count
from resu.pruning.allocation import global_masks
from resu.pruning.cut_search import find_cuts
from resu.pruning.cuts import Reading

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class InMemory:
    """Scores of tensors, in small chunks; counts what is read."""

    def __init__(self, tensors, local=True, chunk=7):
        self.tensors, self.local, self.chunk, self.read = tensors, local, chunk, 0

    @property
    def sizes(self):
        return {name: x.numel() for name, x in self.tensors.items()}

    def chunks(self, name, span=None):
        flat = self.tensors[name].reshape(-1)
        first, last = span or (0, len(flat))
        for start in range(first, last, self.chunk):
            part = flat[start : min(start + self.chunk, last)]
            self.read += len(part)
            yield part.clone()


def masks_of(cuts, scores):
    return {
        name: torch.cat([mask(c) for mask in [cut.masker()] for c in scores.chunks(name)]).view(
            scores.tensors[name].shape
        )
        for name, cut in cuts.items()
    }


@st.composite
def layers(draw):
    """Layers of mixed dtypes and scales, full of ties, signs and zeros of both signs."""
    found = {}
    for i in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        kind = draw(st.sampled_from(["ties", "plain", "constant", "zeros", "negative", "tiny"]))
        x = {
            "ties": x.mul(2).round().div(2),
            "plain": x,
            "constant": torch.full_like(x, 0.5),
            "zeros": torch.where(x > 0, 0.0, -0.0),
            "negative": -x.abs() - 1,
            "tiny": x * 1e-6,
        }[kind]
        found[f"layer{i}"] = x.to(dtype)
    return found


readings = st.builds(
    Reading,
    workers=st.sampled_from([1, 3]),
    blocks=st.sampled_from([1, 3, 16]),
    block=st.sampled_from([1, 4]),
    collected=st.sampled_from([1, 5, 1 << 20]),
    span=st.sampled_from([5, 1 << 20]),
    bins=st.sampled_from([2, 11]),
)


@settings(max_examples=150)
@given(tensors=layers(), digits=st.integers(0, 999), how=readings, local=st.booleans())
def test_cuts_are_the_global_masks_position_by_position(tensors, digits, how, local):
    total = sum(x.numel() for x in tensors.values())
    keep = keep_count(total, digits / 1000)
    scores = InMemory(tensors, local)
    if keep < len(tensors):
        with pytest.raises(ValueError, match="cannot keep"):
            find_cuts(scores, list(tensors), keep, how)
        return
    expected = global_masks(tensors, digits / 1000)
    cuts = find_cuts(scores, list(tensors), keep, how)
    found = masks_of(cuts, scores)
    for name in tensors:
        assert torch.equal(found[name], expected[name]), name
        assert cuts[name].kept == int(expected[name].sum())


def test_trap_09_a_layer_of_tiny_weights_keeps_its_best_in_place_of_the_lowest_elsewhere():
    tensors = {"a": torch.tensor([1.0, 2.0, 3.0, 2.0]), "b": torch.tensor([1e-3, 2e-3, 2e-3]), "c": torch.zeros(2)}
    cuts = find_cuts(scores := InMemory(tensors), list(tensors), 4)
    found = masks_of(cuts, scores)
    assert found["a"].tolist() == [False, True, True, False]
    assert found["b"].tolist() == [False, True, False]
    assert found["c"].tolist() == [True, False]


def test_a_lucky_sample_costs_one_reading_and_an_unlucky_one_a_few():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"l{i}": torch.randn(1 << 17, generator=generator).abs() * (i + 1) for i in range(4)}
    total = 4 << 17
    keep = total - pruned_count(total, 0.7)
    expected = global_masks(tensors, 0.7)
    scores = InMemory(tensors, chunk=1 << 14)
    how = Reading(blocks=256, block=128)
    cuts = find_cuts(scores, list(tensors), keep, how)
    assert total < scores.read < 1.1 * total
    unlucky = InMemory({"head": torch.full((1 << 16,), 9.0)} | tensors, chunk=1 << 14)
    how = Reading(blocks=2, block=64)  # too few to say much
    others = find_cuts(unlucky, list(unlucky.tensors), keep, how)
    assert unlucky.read <= 4 * (total + (1 << 16))
    for name, mask in masks_of(cuts, scores).items():
        assert torch.equal(mask, expected[name])
    assert sum(cut.kept for cut in others.values()) == keep


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_nan_and_inf_are_refused_by_name(dtype, bad):
    x = torch.ones(50, dtype=dtype)
    x[49] = bad
    with pytest.raises(ValueError, match=r"'b\.weight' holds NaN or infinite"):
        find_cuts(InMemory({"a.weight": torch.ones(50), "b.weight": x}), ["a.weight", "b.weight"], 20)


def test_integer_scores_count_exactly_or_are_refused():
    tensors = {"a": torch.arange(10), "b": torch.arange(10, dtype=torch.int32)}
    cuts = find_cuts(scores := InMemory(tensors), list(tensors), 5)
    assert {n: int(m.sum()) for n, m in masks_of(cuts, scores).items()} == {"a": 3, "b": 2}
    with pytest.raises(ValueError, match="2\\^53"):
        find_cuts(InMemory({"a": torch.tensor([2**60, 2**60 + 1])}), ["a"], 1)

"""How much goes and which: exact counts, ties, costs told in advance, targets."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers

import resu.integrations.shrink.targets as targets
from resu.integrations.shrink.families import Rows, Site, sites_of
from resu.integrations.shrink.measure import Costs, sample_inputs, smaller_copy
from resu.integrations.shrink.plan import Fractions, choose_blocks, choose_units, kept_counts
from resu.integrations.shrink.quality import BatchJudge
from resu.integrations.shrink.removal import remove
from resu.integrations.shrink.scores import score_units
from resu.integrations.shrink.sensitivity import sensitivity
from resu.integrations.shrink.sizes import sizes_of
from resu.integrations.shrink.targets import Target, solve_target
from resu.pruning.structured.sizes import Latency, count_macs, count_parameters
from tests.integrations.shrink_models import KINDS, make


def site(kind, count):
    return Site(kind, kind, 0, count, Rows("outer", 1), ())


@pytest.mark.parametrize(
    ("count", "fraction", "round_to", "kept"),
    [
        (12, Fraction(1, 3), 1, 8),
        (12, 0.33, 1, 9),  # 3.96 is not 4
        (100, 0.29, 1, 71),
        (1536, 0.5, 8, 768),
        (172, 0.5, 8, 88),  # never more removed than asked for
        (172, 0.0, 8, 172),
        (172, 0.01, 8, 172),  # 171 would round to 176
        (5, 0.9, 8, 5),
        (1536, 0.999, 8, 8),
    ],
)
def test_counts(count, fraction, round_to, kept):
    assert kept_counts([site("ffn", count)], Fractions(ffn=fraction, round_to=round_to)) == {"ffn": kept}
    if round_to == 1:
        assert kept_counts([site("heads", count)], Fractions(heads=fraction, round_to=8)) == {"heads": kept}


@given(st.integers(1, 300), st.fractions(0, 1).filter(lambda f: f < 1), st.integers(1, 32))
def test_a_width_is_a_multiple_or_whole_and_no_smaller_than_asked(count, fraction, round_to):
    kept = kept_counts([site("ffn", count)], Fractions(ffn=fraction, round_to=round_to))["ffn"]
    wanted = count - int(count * fraction)
    assert 1 <= wanted <= kept <= count
    assert kept == count or (kept % round_to == 0 and kept - wanted < round_to)


@pytest.mark.parametrize(
    "bad", [{"heads": 1.0}, {"ffn": -0.1}, {"heads": float("nan")}, {"depth": -1}, {"round_to": 0}]
)
def test_impossible_fractions(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Fractions(**bad)


def test_ties_keep_the_lower_index():
    assert choose_units({"a": torch.ones(6)}, {"a": 4})["a"].tolist() == [0, 1, 2, 3]
    assert choose_units({"a": torch.tensor([1.0, 2, 1, 2])}, {"a": 3})["a"].tolist() == [0, 1, 3]
    model = make("bert")
    assert choose_blocks(model, torch.ones(4), 2) == [0, 1]
    assert choose_blocks(model, torch.tensor([3.0, 1, 2, 1]), 1) == [0, 1, 2]
    assert choose_blocks(model, None, 0) is None
    with pytest.raises(ValueError, match="at most 3"):
        choose_blocks(model, torch.ones(4), 4)
    with pytest.raises(ValueError, match="calibration"):
        choose_blocks(model, None, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_told_exactly(kind):
    model = make(kind, attention="eager")
    inputs = sample_inputs(model, 2, 7)
    costs = Costs.of(model, inputs)
    for fractions, blocks in (
        (Fractions(0.4, 0.5, round_to=8), None),
        (Fractions(0, 0.3), [0, 3]),
        (Fractions(0.7, 0), [1]),
    ):
        counts = kept_counts(costs.sites, fractions)
        small = smaller_copy(model, counts, blocks)
        small.config.use_cache = False
        assert costs.after(counts, blocks) == (count_parameters(small), count_macs(small, dict(inputs)))


def timed_by(monkeypatch, seconds):
    """Latencies as a function of a model, and how often one was asked for."""
    asked = []

    def fake(models, inputs, rounds):
        asked.append(rounds)
        times = [seconds(model) for model in models]
        return Latency(tuple(times), tuple(one / times[0] for one in times))

    monkeypatch.setattr(targets, "measured_latency", fake)
    return asked


def wide(**more):
    return make("llama", intermediate_size=160, num_attention_heads=8, num_key_value_heads=8, hidden_size=64, **more)


@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.parametrize("value", [0.9, 0.61, 0.4])
@pytest.mark.parametrize("free", [["heads", "ffn"], ["ffn"], ["heads"]])
def test_counted_targets_are_met_from_below_as_closely_as_can_be(metric, value, free):
    model = wide()
    inputs = sample_inputs(model, 1, 8)
    costs = Costs.of(model, inputs)

    def cost(fractions):
        parameters, macs = costs.after(kept_counts(costs.sites, fractions))
        return parameters / costs.parameters if metric == "params" else macs / costs.macs

    least = Fractions(Fraction(7, 8) if "heads" in free else 0, Fraction(159, 160) if "ffn" in free else 0)
    if cost(least) > value:
        with pytest.raises(ValueError, match="still"):
            solve_target(model, costs, inputs, Target(metric, value), Fractions(), free)
        return
    found = solve_target(model, costs, inputs, Target(metric, value), Fractions(), free)
    assert cost(found) <= value
    if "ffn" in free and found.ffn:
        assert cost(Fractions(found.heads, found.ffn - Fraction(1, 160))) > value
        assert cost(found) > value - 0.02
    assert ("heads" in free) or found.heads == 0
    assert ("ffn" in free) or found.ffn == 0


def test_a_latency_is_met_within_five_percent_by_few_measurements(monkeypatch):
    model = wide()
    inputs = sample_inputs(model, 1, 8)
    costs = Costs.of(model, inputs)
    noise = torch.Generator().manual_seed(0)

    def seconds(one):  # a constant part, a part that follows the work, and noise
        share = count_parameters(one) / costs.parameters
        return (0.2 + 0.8 * share) * (1 + 0.005 * float(torch.randn((), generator=noise)))

    for value in (0.9, 0.7, 0.5):
        asked = timed_by(monkeypatch, seconds)
        found = solve_target(model, costs, inputs, Target("latency", value), Fractions(), ["heads", "ffn"])
        small = smaller_copy(model, kept_counts(costs.sites, found), None)
        assert abs((0.2 + 0.8 * count_parameters(small) / costs.parameters) / value - 1) < 0.05
        assert len(asked) <= 14
    timed_by(monkeypatch, seconds)
    with pytest.raises(ValueError, match="remove blocks too"):
        solve_target(model, costs, inputs, Target("latency", 0.2), Fractions(), ["heads", "ffn"])


def test_a_hasty_measurement_is_corrected(monkeypatch):
    model = wide()
    inputs = sample_inputs(model, 1, 8)
    costs = Costs.of(model, inputs)

    def share(one):
        return count_parameters(one) / costs.parameters

    def fake(models, inputs, rounds):  # short measurements say 10 % less
        return Latency((1.0, 1.0), (1.0, share(models[1]) * (0.9 if rounds < 20 else 1.0)))

    monkeypatch.setattr(targets, "measured_latency", fake)
    found = solve_target(model, costs, inputs, Target("latency", 0.6), Fractions(), ["heads", "ffn"])
    assert abs(share(smaller_copy(model, kept_counts(costs.sites, found), None)) / 0.6 - 1) < 0.05


def test_of_several_corrections_the_closest_is_taken(monkeypatch):
    model = wide()
    inputs = sample_inputs(model, 1, 8)
    costs = Costs.of(model, inputs)
    hasty, reached = [0.9, 1.0, 1.04, 0.8], []  # how far short measurements are off, search by search

    def fake(models, inputs, rounds):
        share = count_parameters(models[1]) / costs.parameters
        if rounds >= 20:
            reached.append(share)
            return Latency((1.0, share), (1.0, share))
        return Latency((1.0, 1.0), (1.0, share * hasty[len(reached)]))

    monkeypatch.setattr(targets, "measured_latency", fake)
    found = solve_target(model, costs, inputs, Target("latency", 0.6), Fractions(), ["heads", "ffn"])
    share = count_parameters(smaller_copy(model, kept_counts(costs.sites, found), None)) / costs.parameters
    assert len(reached) == 4
    assert share == reached[2]
    assert abs(reached[3] / 0.6 - 1) > 0.2


@pytest.mark.parametrize(("metric", "value"), [("energy", 0.5), ("params", 0), ("params", 1.0), ("macs", 2)])
def test_impossible_targets(metric, value):
    with pytest.raises(ValueError, match=r"known: params|must lie in \(0, 1\)"):
        Target(metric, value)


def test_inputs_that_the_model_was_not_made_for_are_refused():
    with pytest.raises(ValueError, match="up to 512"):
        sample_inputs(make("bert"), 1, 513)
    roberta = make("roberta", max_position_embeddings=10)
    assert roberta(**sample_inputs(roberta, 1, 8)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="up to 8"):
        sample_inputs(roberta, 1, 9)


def test_a_model_that_does_not_run_on_plain_tokens_is_refused():
    model = transformers.BertForMultipleChoice(make("bert").config)
    with pytest.raises(ValueError, match="BertForMultipleChoice does not run on token ids"):
        Costs.of(model, sample_inputs(model, 1, 8))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_sensitivity_is_what_removal_gives(kind):
    from resu.integrations.shrink.exactness import random_batch

    model = make(kind)
    batches = [random_batch(model, seed) for seed in range(2)]
    judge = BatchJudge(model, batches)
    scores = score_units(model, "l2")
    ticks = []
    rows = sensitivity(model, scores, judge, progress=lambda *tick: ticks.append(tick))
    assert len(rows) == 4 * 2 + 4
    assert ticks[-1][1] == 4 * 2 * 3 + 4
    assert judge(model) == judge(make(kind))
    row = next(row for row in rows if row["block"] == 2 and row["kind"] == "ffn")
    assert [value["kept"] for value in row["values"]] == [36, 28, 20]
    name = next(s.name for s in sites_of(model) if s.block == 2 and s.kind == "ffn")
    small = make(kind)
    remove(small, choose_units(scores, {name: 28}))
    assert judge(small) == pytest.approx(row["values"][1]["value"], rel=1e-5)
    last = make(kind)
    remove(last, {}, [0, 1, 2])
    assert judge(last) == pytest.approx(rows[-1]["values"][0]["value"], rel=1e-5)
    heads = next(row for row in rows if row["kind"] == "heads")
    assert heads["values"][0]["value"] is None  # a tenth of three or six heads is none
    assert sizes_of(model)["ffn"] == [40] * 4

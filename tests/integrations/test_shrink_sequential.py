"""Layers fitted one after another to the stream of the model as it was: by the book, and what it brings."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from resu.integrations.shrink import sequential
from resu.integrations.shrink.exactness import random_batch
from resu.integrations.shrink.families import sites_of
from resu.integrations.shrink.ridge import Sums
from resu.integrations.shrink.sequential import fit_in_sequence
from resu.integrations.shrink.transform import shrink_transformer
from tests.integrations.shrink_models import make


def batches_of(model, count=8, first=0):
    """Batches of twenty rows of random tokens, half of them padded."""
    found = []
    for number in range(first, first + count):
        some = [random_batch(model, 10 * number + k) for k in range(10)]
        found.append({key: torch.cat([batch[key] for batch in some]) for key in some[0]})
    return found


def last_hidden(model, batches):
    with torch.no_grad():
        outs = [model.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(outs).double()


@pytest.mark.parametrize("centred", [True, False])
def test_a_fit_is_ridge_around_the_weights_that_are_there(centred):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator) + 1
    t = torch.randn(50, 3, generator=generator) - 2
    weight = torch.randn(3, 6, generator=generator).double()
    sums = Sums()
    sums.add(a[:20], t[:20])
    other = Sums()
    other.add(a[20:], t[20:])
    both = sums + other
    fitted, bias = both.fit(weight, 0.3, centred)
    # The same by lstsq: rows that pull towards the weights are added to the data.
    x, y = a.double(), t.double()
    shift = (x.mean(0), y.mean(0)) if centred else (torch.zeros(6).double(), torch.zeros(3).double())
    x, y = x - shift[0], y - shift[1]
    pull = (0.3 * x.square().mean(0).mean() * len(x)).sqrt()
    eye = torch.eye(6, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x, pull * eye]), torch.cat([y, pull * weight.T])).solution.T
    # Products of a batch are summed in float32.
    torch.testing.assert_close(fitted, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, shift[1] - best @ shift[0], rtol=1e-4, atol=1e-5)
    direct = (t.double() - a.double() @ fitted.T - bias).square().sum(1).mean()
    assert both.error(fitted, bias) == pytest.approx(float(direct), rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama", "gemma2", "gpt2", "qwen2"])
@pytest.mark.parametrize("depth", [0, 1])
def test_the_stream_comes_nearer_to_what_it_was(kind, depth):
    model = make(kind, attention="eager")
    batches, others = batches_of(model, 12), batches_of(model, 4, first=100)
    errors = {}
    for update in (None, "least-squares", "sequential"):
        small = copy.deepcopy(model)
        done = shrink_transformer(small, 0.4, 0.5, depth, method="activation", batches=batches, update=update)
        assert done.verified <= 1e-9
        off = last_hidden(small, others) - last_hidden(model, others)
        errors[update] = float(off.square().mean())
        hooks = [m for m in small.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooks
        assert not small.training
    assert errors["sequential"] < errors["least-squares"] < errors[None]


def test_targets_are_the_stream_with_what_came_before(monkeypatch):
    model = make("llama")
    batches = batches_of(model, 4)
    dense = copy.deepcopy(model)
    shrink_transformer(model, ffn=0.5)
    seen = []
    monkeypatch.setattr(sequential, "_fitted", lambda layer, fitting, judging: seen.append((fitting, judging)))
    before = copy.deepcopy(model.state_dict())
    fit_in_sequence(model, dense, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(seen) == len(sites_of(model)) == 8
    real = torch.cat([batch["attention_mask"].bool() for batch in batches])

    def streams(of, index):  # after block `index`
        with torch.no_grad():
            return torch.cat([of.model(**b, output_hidden_states=True).hidden_states[index + 1] for b in batches])[real]

    fitting, judging = seen[3]  # the feed-forward layer of the second block: what it adds, and what is missing before
    inputs, missing = [], []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    below = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(
        lambda m, args: missing.append(args[0])
    )
    wanted = streams(dense, 1).double()
    streams(model, 1)
    handle.remove()
    below.remove()
    a, x = torch.cat(inputs)[real].double(), torch.cat(missing)[real].double()
    both = fitting + judging
    assert both.tokens == int(real.sum())
    every = torch.cat([batch["attention_mask"] for batch in batches])
    assert judging.tokens == int(every[3::4].sum())
    torch.testing.assert_close(both.aa, a.T @ a, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both.ta, (wanted - x).T @ a, rtol=1e-4, atol=1e-3)


def test_a_model_that_lost_nothing_stays():
    model = make("bert")
    dense, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    fit_in_sequence(model, dense, batches_of(model, 8))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)


def test_padding_says_nothing():
    one, two = make("bert"), make("bert")
    batches = batches_of(one, 6)
    odd = [
        {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)} for batch in batches
    ]
    for model, given in ((one, batches), (two, odd)):
        shrink_transformer(model, ffn=0.5, method="l2", batches=given, update="sequential")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_one_text_is_refused_before_anything_changes():
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    one = {key: value[:1] for key, value in batches_of(model, 1)[0].items()}
    with pytest.raises(ValueError, match="two at least, got 1"):
        shrink_transformer(model, ffn=0.5, batches=[one], update="sequential")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="calibration"):
        shrink_transformer(model, ffn=0.5, update="sequential")


@pytest.mark.parametrize("rows", [2, 5])
def test_few_texts_still_have_a_judge(rows, monkeypatch):
    model = make("llama")
    few = {key: value[:rows] for key, value in batches_of(model, 1)[0].items()}
    seen = []
    monkeypatch.setattr(sequential, "_fitted", lambda layer, fitting, judging: seen.append((fitting, judging)))
    fit_in_sequence(model, copy.deepcopy(model), [few])
    lengths = few["attention_mask"].sum(1)
    judges = [index for index in range(rows) if index % 4 == 3 or index == rows - 1]
    assert {judging.tokens for _, judging in seen} == {int(lengths[judges].sum())}
    assert {fitting.tokens for fitting, _ in seen} == {int(lengths.sum() - lengths[judges].sum())}


def test_half_precision():
    model = make("llama").to(torch.bfloat16)
    batches = batches_of(model, 8)
    small = copy.deepcopy(model)
    shrink_transformer(small, ffn=0.5, batches=batches, update="sequential")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())

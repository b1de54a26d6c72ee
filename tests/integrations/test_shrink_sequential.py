"""Layers fitted one after another to the stream of the model as it was: by the book, and what it brings."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from resu.integrations.shrink.exactness import random_batch
from resu.integrations.shrink.families import blocks_of, sites_of
from resu.integrations.shrink.plan import Fractions, choose_units, kept_counts
from resu.integrations.shrink.ridge import Sums
from resu.integrations.shrink.scores import score_units
from resu.integrations.shrink.sequential import sequential_weights
from resu.integrations.shrink.transform import shrink_to, shrink_transformer
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_is_ridge_around_the_weights_that_are_there(centred, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator).to(dtype) + 1
    t = torch.randn(50, 3, generator=generator).to(dtype) - 2
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
    # Products of a batch are summed in the inputs' dtype.
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(fitted, best, **close)
    torch.testing.assert_close(bias, shift[1] - best @ shift[0], **close)
    many = list(both.fits(weight, (0.1, 0.3), centred))
    assert all(torch.equal(x, y) for x, y in zip(many[1], (fitted, bias), strict=True))
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


def passing(model, site, batches):
    """The stream, the inputs and the outputs of a site's layer, of all tokens, by running the whole model."""
    found = {"stream": [], "input": [], "output": [], "written": []}
    base = model.base_model

    def stream(module, args, options):
        found["stream"].append(args[0] if args else options["hidden_states"])

    def layer(module, args, output):
        found["input"].append(args[0])
        found["output"].append(output)

    hooks = [
        base.get_submodule(site.stream).register_forward_pre_hook(stream, with_kwargs=True),
        base.get_submodule(site.outer).register_forward_hook(layer),
        base.get_submodule(site.norm or site.outer).register_forward_hook(
            lambda module, args, output: found["written"].append(output)
        ),
    ]
    with torch.no_grad():
        for batch in batches:
            base(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, 1) for x in parts]) for name, parts in found.items()}


def ridge(a, t, weight, bias, penalty):
    """Least squares with rows that pull towards the weights; the bias is not pulled."""
    mean_a, mean_t = (a.mean(0), t.mean(0)) if bias is not None else (0, 0)
    a, t = a - mean_a, t - mean_t
    pull = (penalty * a.square().mean() * len(a)).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
    found = torch.linalg.lstsq(torch.cat([a, pull]), torch.cat([t, pull @ weight.T])).solution.T
    return found, None if bias is None else mean_t - mean_a @ found.T


@torch.no_grad()
def fit_by_the_book(small, dense, batches, blocks):
    """Each layer by running both models from their beginning, in float64 and in place."""
    masks = torch.cat([batch["attention_mask"] for batch in batches])
    texts = torch.arange(len(masks))[:, None].expand_as(masks).flatten()
    judges = (texts % 4 == 3) | (texts == texts.max())
    real = masks.bool().flatten()
    whole = {(site.block, site.kind): site for site in sites_of(dense)}
    ends = None  # of blocks that give a sum: what comes behind the last one that stays
    if max(blocks) < 3 and type(small).__name__ not in (
        "BertModel",
        "ElectraModel",
        "DistilBertForSequenceClassification",
    ):
        ends = passing(dense, whole[3, "ffn"], batches)
        ends = ends["stream"] + ends["written"]
    for site in sites_of(small):
        was = passing(dense, whole[blocks[site.block], site.kind], batches)
        now = passing(small, site, batches)
        a, y, missing = now["input"], was["output"], was["stream"] - now["stream"]
        norm = {"heads": "post_attention_layernorm", "ffn": "post_feedforward_layernorm"}[site.kind]
        gain, scale = torch.ones(()), torch.ones(())
        if small.config.model_type == "gemma2":
            found = blocks_of(small)[site.block].get_submodule(norm)
            gain, scale = 1 + found.weight, (y.square().mean(1, keepdim=True) + found.eps).sqrt()
            slope = scale * gain / (gain.square() + 0.1 * gain.square().mean())
        if (site.block, site.kind) == (len(blocks) - 1, "ffn") and ends is not None:
            missing = ends - gain * y / scale - now["stream"]
        t = y + missing * (slope if small.config.model_type == "gemma2" else 1)
        layer = small.base_model.get_submodule(site.outer)
        turned = type(layer) is not torch.nn.Linear
        weight, bias = (layer.weight.T if turned else layer.weight).clone(), layer.bias

        def error(found, a=a, t=t):
            off = t - a @ found[0].T - (0 if found[1] is None else found[1])
            return float(off[real & judges].square().sum())

        def fitted(tokens, penalty, a=a, t=t, weight=weight, bias=bias):
            return ridge(a[tokens], t[tokens], weight, bias, penalty)

        errors = {p: error(fitted(real & ~judges, p)) for p in (1e-3, 1e-2, 1e-1, 1.0, 10.0)}
        best = min(errors, key=errors.get)
        if errors[best] < error((weight, bias)):
            weight, bias = fitted(real, best)
            layer.weight.copy_(weight.T if turned else weight)
            if bias is not None:
                layer.bias.copy_(bias)


@pytest.mark.parametrize(
    "kind", ["bert", "distilbert", "electra", "llama", "llama-bias", "mistral", "gpt2", "qwen3", "gemma2"]
)
@pytest.mark.parametrize("blocks", [None, [1, 3], [0, 2]])
def test_blockwise_fits_are_those_of_whole_passes(kind, blocks):
    model = make(kind, attention="eager").double()
    batches = batches_of(model, 3)
    counts = kept_counts(sites_of(model), Fractions(0.4, 0.5))
    options = {"method": "activation", "batches": batches}
    ours, reference = copy.deepcopy(model), copy.deepcopy(model)
    told = []
    shrink_to(ours, counts, blocks, update="sequential", progress=lambda *now: told.append(now), **options)
    shrink_to(reference, counts, blocks, update="least-squares", **options)
    before = copy.deepcopy(reference.state_dict())
    fit_by_the_book(reference, model, batches, range(4) if blocks is None else blocks)
    changed = 0
    for name, value in reference.state_dict().items():
        # Norms of Gemma 2 compute in float32 whatever they are given.
        close = {"rtol": 1e-3, "atol": 1e-4} if kind == "gemma2" else {"rtol": 1e-7, "atol": 1e-9}
        torch.testing.assert_close(ours.state_dict()[name], value, **close)
        changed += not torch.equal(value, before[name])
    assert changed
    sites = 2 * len(blocks_of(ours))
    assert [now[:2] for now in told if now[2] == "fitting layer by layer"] == [(k + 1, sites) for k in range(sites)]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_time_of_a_block_does_not_depend_on_the_depth(kind):
    passes = {}
    for depth in (2, 6):
        model = make(kind, num_hidden_layers=depth)
        batches = batches_of(model, 3)
        layer = blocks_of(model)[0].get_submodule("intermediate.dense" if kind == "bert" else "mlp.up_proj")
        calls = []
        handle = layer.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        sequential_weights(model, {}, batches)
        handle.remove()
        passes[depth] = len(calls)
    assert passes[2] == passes[6] <= 5 * len(batches)


def test_the_model_stays_and_nothing_is_left_on_it():
    model = make("llama").train()
    model.config.use_cache = True
    before = copy.deepcopy(model.state_dict())
    units = choose_units(score_units(model, "l2"), kept_counts(sites_of(model), Fractions(0.4, 0.5)))
    found = sequential_weights(model, units, batches_of(model, 3), [0, 1, 3])
    assert set(found) == {site.outer for site in sites_of(model) if site.block != 2}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.use_cache
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_model_that_lost_nothing_stays():
    model = make("bert")
    found = sequential_weights(model, {}, batches_of(model, 8))
    for name, (weight, bias) in found.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(weight, layer.weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias, layer.bias, rtol=1e-4, atol=1e-4)


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
    monkeypatch.setattr(Sums, "__add__", lambda fitting, judging: seen.append((fitting, judging)) or judging)
    sequential_weights(model, {}, [few])
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

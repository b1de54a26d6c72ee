"""Units and blocks removed from transformers: exactly what masking silences, saved and loaded, or undone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers

import resu.integrations.shrink.removal as removal
from resu.core.io import FileFormatError
from resu.integrations.shrink.exactness import longest_input, random_batch
from resu.integrations.shrink.families import sites_of
from resu.integrations.shrink.loading import load_shrunk_transformer
from resu.integrations.shrink.removal import RemovalError, masked, remove
from resu.integrations.shrink.sizes import resize, sizes_of
from resu.integrations.shrink.transform import shrink_transformer
from tests.integrations.shrink_models import ENCODERS, KINDS, make

CASES = [
    (kind, attention) for kind in KINDS for attention in ("eager", "sdpa") if (kind, attention) != ("gemma2", "sdpa")
]


def some_units(model, heads, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    counts = {"heads": heads, "ffn": width}
    return {
        site.name: torch.randperm(site.count, generator=generator)[: counts[site.kind]].sort().values
        for site in sites_of(model)
    }


def outputs(model, seed=5):
    batch = random_batch(model, seed)
    with torch.no_grad():
        found = model(**batch)
    real = batch["attention_mask"].bool()
    return {
        name: value[real] if value.shape[:2] == real.shape else value
        for name, value in found.items()
        if isinstance(value, torch.Tensor)
    }


def same(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def zeroed(model, units, blocks):
    """The reference: weights of the reading layers at zero, and the list of blocks without those that go."""
    found = copy.deepcopy(model)
    base = found.base_model
    for site in sites_of(found):
        for unit in set(range(site.count)) - set(units[site.name].tolist()):
            layer = base.get_submodule(site.outer)
            columns = slice(unit * site.columns.size, (unit + 1) * site.columns.size)
            with torch.no_grad():
                if type(layer).__name__ == "Conv1D":
                    layer.weight[columns] = 0
                else:
                    layer.weight[:, columns] = 0
    for path in ("encoder.layer", "layers", "transformer.layer", "h"):
        try:
            layers = base.get_submodule(path)
        except AttributeError:
            continue
        for index, block in enumerate(layers):
            if index not in blocks:
                block.forward = lambda hidden_states, *args, **options: hidden_states
    return found


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_the_smaller_model_equals_the_masked_one(kind, attention):
    model = make(kind, attention=attention).double()
    before = outputs(model)
    units, blocks = some_units(model, 2, 24), [0, 2, 3]
    wanted = outputs(zeroed(model, units, blocks))
    with masked(model, units, blocks):
        same(outputs(model), wanted, 1e-9 if kind in ENCODERS else 2e-6)
    same(outputs(model), before, 0)
    difference = remove(model, units, blocks)
    assert difference <= 1e-9
    # Norms and positions of decoders compute in float32 in any case; remove() has compared in float64 throughout.
    same(outputs(model), wanted, 1e-9 if kind in ENCODERS else 2e-6)
    assert max(float((outputs(model)[n] - before[n]).abs().max()) for n in before) > 1e-2
    queries = 1 if kind in (*ENCODERS, "gpt2") else 2
    assert sizes_of(model) == {"heads": [2 * queries] * 3, "ffn": [24] * 3}
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_saved_and_loaded_by_its_configuration(kind, tmp_path):
    model = make(kind, attention="eager")
    remove(model, some_units(model, 2, 24), [0, 1, 3])
    model.save_pretrained(tmp_path / "out")
    loaded = load_shrunk_transformer(tmp_path / "out", attn_implementation="eager")
    assert type(loaded) is type(model)
    same(outputs(loaded), outputs(model), 0)
    if kind in (*ENCODERS, "gpt2"):  # the size of a head follows from their number
        assert model.config.resu_shrunk["heads"] == [2, 2, 2]
        with pytest.raises(RuntimeError, match="mismatch"):
            type(model).from_pretrained(tmp_path / "out")
    else:
        assert not hasattr(model.config, "resu_shrunk")
        assert model.config.num_attention_heads == 4
        stock = type(model).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
        same(outputs(stock), outputs(model), 0)
    again = load_shrunk_transformer(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")
    assert sizes_of(load_shrunk_transformer(tmp_path / "again")) == sizes_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_built_with_the_first_units(kind):
    model, other = make(kind, attention="eager"), make(kind, attention="eager")
    remove(model, {site.name: torch.arange(2 if site.block else 1) for site in sites_of(model)})
    resize(other, model.config.resu_shrunk)  # sizes differ by block, which no configuration of transformers can say
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    same(outputs(other), outputs(model), 0)
    assert [m.extra_repr() for m in other.modules()] == [m.extra_repr() for m in model.modules()]


@pytest.mark.parametrize("kind", [*ENCODERS, "gpt2"])
def test_width_and_depth_need_no_key_of_ours(kind, tmp_path):
    model = make(kind, attention="eager")
    units = {n: kept for n, kept in some_units(model, 2, 24).items() if "attn" not in n and "attention" not in n}
    remove(model, units, [1, 2])
    assert not hasattr(model.config, "resu_shrunk")
    model.save_pretrained(tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    same(outputs(stock), outputs(model), 0)


def test_heads_that_do_not_divide_the_hidden_size_are_ours_to_load(tmp_path):
    model = make("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    remove(model, some_units(model, 3, 24))
    assert model.config.resu_shrunk["heads"] == [6] * 4
    assert model.config.intermediate_size == 24
    model.save_pretrained(tmp_path)
    same(outputs(load_shrunk_transformer(tmp_path)), outputs(model), 0)


def test_sizes_that_differ_by_block_are_ours_to_load(tmp_path):
    model = make("mistral")
    units = some_units(model, 2, 24)
    units["layers.0.mlp"] = units["layers.0.mlp"][:8]
    units["layers.1.self_attn"] = units["layers.1.self_attn"][:1]
    remove(model, units)
    assert model.config.resu_shrunk == {
        "version": 1,
        "heads": [4, 2, 4, 4],
        "ffn": [8, 24, 24, 24],
        "load_with": "resu.load_shrunk_transformer",
    }
    model.save_pretrained(tmp_path)
    same(outputs(load_shrunk_transformer(tmp_path)), outputs(model), 0)
    # Made smaller again, the sizes fit the configuration again.
    again = load_shrunk_transformer(tmp_path)
    remove(again, {name: torch.arange(1 if "attn" in name else 8) for name in units})
    assert not hasattr(again.config, "resu_shrunk")
    assert sizes_of(again) == {"heads": [2] * 4, "ffn": [8] * 4}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_generation_with_a_cache_equals_that_of_the_masked_model(kind, attention):
    model = make(kind, attention=attention)
    prompt = random_batch(model)["input_ids"][:, :5]
    units, blocks = some_units(model, 2, 24), [0, 2, 3]
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 1}
    with masked(model, units, blocks):
        wanted = model.generate(prompt, use_cache=False, **settings)
    remove(model, units, blocks)
    assert torch.equal(model.generate(prompt, use_cache=True, **settings), wanted)
    assert wanted.shape == (2, 21)


@settings(max_examples=25)
@given(st.data())
def test_any_units_and_blocks_can_go(data):
    model = make(data.draw(st.sampled_from(["bert", "llama", "qwen3", "gpt2"])), attention="eager")
    blocks = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
    units = {}
    for site in sites_of(model):
        if data.draw(st.booleans()):
            kept = data.draw(st.sets(st.integers(0, site.count - 1), min_size=1))
            units[site.name] = torch.tensor(sorted(kept))
    assert remove(model, units, blocks) <= 1e-9
    counts = sizes_of(model)
    assert len(counts["ffn"]) == len(blocks)
    for place, block in enumerate(blocks):
        name = next(site.name for site in sites_of(model) if site.kind == "ffn" and site.block == place)
        was = name.replace(f".{place}.", f".{block}.") if "." in name else name
        assert counts["ffn"][place] == len(units.get(was, range(40)))


def snapshot(model):
    return (
        {name: (id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()},
        model.config.to_dict(),
        [(n, {k: v for k, v in vars(m).items() if isinstance(v, int)}) for n, m in model.named_modules()],
    )


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_wrong_removal_is_undone(kind, monkeypatch):
    model = make(kind)
    before, wanted = snapshot(model), outputs(model)
    cut = removal.cut_sites

    def wrong(base, kept):
        return cut(base, [(site, stay.flip(0).sub(site.count - 1).abs()) for site, stay in kept])

    monkeypatch.setattr(removal, "cut_sites", wrong)
    with pytest.raises(RemovalError, match="undone"):
        remove(model, some_units(model, 2, 24), [0, 2])
    assert snapshot(model) == before
    same(outputs(model), wanted, 0)


def test_an_interrupted_removal_is_undone(monkeypatch):
    model = make("llama")
    before = snapshot(model)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(removal, "state_sizes", stop)
    with pytest.raises(KeyboardInterrupt):
        remove(model, some_units(model, 2, 24), [0, 2])
    assert snapshot(model) == before


def test_what_cannot_be_removed_is_refused():
    model = make("llama")
    with pytest.raises(ValueError, match=r"no 'layers\.9\.mlp'"):
        remove(model, {"layers.9.mlp": torch.tensor([0])})
    for kept in ([], [1, 0], [0, 0], [40], [-1]):
        with pytest.raises(ValueError, match=r"units that stay of layers\.0\.mlp"):
            remove(model, {"layers.0.mlp": torch.tensor(kept, dtype=torch.int64)})
    for blocks in ([], [1, 0], [4]):
        with pytest.raises(ValueError, match="blocks that stay"):
            remove(model, {}, blocks)
    with pytest.raises(ValueError, match="'t5' models"):
        sites_of(transformers.T5Model(transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)))
    with pytest.raises(ValueError, match="place in the model"):
        remove(make("gpt2", scale_attn_by_inverse_layer_idx=True), {}, [0, 2])
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="parametrized"):
        sites_of(model)
    shared = make("llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shares its weight"):
        sites_of(shared)
    adapted = make("llama")
    adapted.model.layers[1].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="not a plain linear layer"):
        sites_of(adapted)


def test_what_is_no_model_of_transformers_is_refused():
    for other in (torch.nn.Linear(3, 3), torch.nn.Sequential(make("llama")), None):
        for step in (sites_of, shrink_transformer):
            with pytest.raises(ValueError, match="no model of transformers"):
                step(other)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="merge adapters"):
        shrink_transformer(peft.get_peft_model(make("llama"), config), 0.4)


def test_a_model_that_chooses_among_texts_is_left_as_it_was():
    model = transformers.BertForMultipleChoice(make("bert").config).eval()
    before = snapshot(model)
    with pytest.raises(RemovalError, match="does not run"):
        remove(model, some_units(model, 2, 24))
    assert snapshot(model) == before


def test_a_decoder_that_classifies_needs_no_padding_token(tmp_path):
    model = transformers.LlamaForSequenceClassification(make("llama", pad_token_id=None).config).eval()
    assert remove(model, some_units(model, 2, 24), [0, 3]) <= 1e-9
    model.save_pretrained(tmp_path)
    same(outputs(load_shrunk_transformer(tmp_path)), outputs(model), 0)


def test_as_many_tokens_as_positions_that_are_used():
    model = make("roberta", max_position_embeddings=10)
    assert longest_input(model) == 8  # positions begin behind that of padding, which is 1
    assert random_batch(model)["input_ids"].shape == (2, 8)
    assert remove(model, some_units(model, 2, 24)) <= 1e-9
    assert longest_input(make("bert", max_position_embeddings=10)) == 10
    assert longest_input(make("llama", max_position_embeddings=5)) == 5


@pytest.mark.parametrize(
    "batches",
    [
        [{"input_ids": torch.ones(2, 4, dtype=torch.int64)}],
        {"input_ids": torch.ones(2, 4, dtype=torch.int64), "attention_mask": torch.ones(2, 4, dtype=torch.int64)},
        [{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}],
        [{"input_ids": torch.ones(4, dtype=torch.int64), "attention_mask": torch.ones(4, dtype=torch.int64)}],
        [torch.ones(2, 4, dtype=torch.int64)],
    ],
)
def test_batches_that_cannot_be_looked_at_are_refused(batches):
    model = make("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"mappings with tensors input_ids and attention_mask"):
        shrink_transformer(model, ffn=0.5, method="activation", batches=batches)
    assert snapshot(model) == before


def test_batches_may_come_one_by_one():
    options = {"ffn": 0.5, "depth": 1, "method": "activation", "update": "least-squares"}
    listed, streamed = make("llama"), make("llama")
    batches = [random_batch(listed, seed) for seed in range(3)]
    a = shrink_transformer(listed, **options, batches=batches)
    b = shrink_transformer(streamed, **options, batches=(batch for batch in batches))
    assert a.blocks == b.blocks
    same(outputs(streamed), outputs(listed), 0)


def test_units_are_told_of_the_blocks_that_stay():
    model = make("llama")
    was = make("llama")
    done = shrink_transformer(model, 0.4, 0.5, 2, batches=[random_batch(model)])
    assert sorted({int(name.split(".")[1]) for name in done.units}) == done.blocks
    assert len(done.units) == 4
    for place, block in enumerate(done.blocks):
        kept = done.units[f"layers.{block}.mlp"]
        assert torch.equal(
            model.model.layers[place].mlp.up_proj.weight, was.model.layers[block].mlp.up_proj.weight[kept]
        )


def test_ties_dtype_and_frozen_weights_stay():
    model = make("llama-tied").to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    remove(model, some_units(model, 2, 24))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "stated",
    [
        {"version": 2},
        {"version": 1, "heads": [2, 2]},
        {"version": 1, "heads": ["2"] * 4},
        {"version": 1, "ffn": [0] * 4},
        7,
    ],
)
def test_damaged_sizes_are_refused(stated, tmp_path):
    import json

    model = make("bert")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "resu_shrunk": stated}))
    with pytest.raises(ValueError, match="resu_shrunk"):
        load_shrunk_transformer(tmp_path)


def test_weights_of_other_sizes_than_stated_are_refused(tmp_path):
    import json

    model = make("bert")
    remove(model, some_units(model, 2, 24))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["resu_shrunk"]["heads"] = [3] * 4
    file.write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="another shape"):
        load_shrunk_transformer(tmp_path)


@pytest.mark.parametrize(("kind", "other"), [("llama", "BertModel"), ("bert", "LlamaModel")])
def test_a_class_of_another_architecture_does_not_load_in_silence(kind, other, tmp_path):
    make(kind).save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match="lacks weights"):
        load_shrunk_transformer(tmp_path, getattr(transformers, other))


def test_other_heads_of_a_smaller_model(tmp_path):
    model = make("bert")
    remove(model, some_units(model, 2, 24))
    model.save_pretrained(tmp_path)
    found = load_shrunk_transformer(tmp_path, transformers.AutoModelForSequenceClassification)
    assert type(found) is transformers.BertForSequenceClassification
    assert sizes_of(found) == sizes_of(model)
    same(outputs(found.base_model), {k: v for k, v in outputs(model).items() if k in outputs(found.base_model)}, 0)

"""`resu plan`: its figures are those of the memory formulas, which are those of real layers."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
from resu.cli import plan
from resu.cli._common import CliError
from resu.cli._shapes import parse_layers, read_config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 172,
    "vocab_size": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def document(resu, *args):
    result = resu("plan", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("mode", ["dense", "sparse", "resu", "qresu", "qresu_selective"])
@pytest.mark.parametrize("sparsity", ["0.3", "0.9"])
def test_the_plan_is_what_real_layers_hold_after_a_step(resu, mode, sparsity):
    from resu import RESULinear, memory_report, resurrection_parameters

    model = nn.Sequential(RESULinear(40, 72, bias=False), RESULinear(72, 24, bias=False))
    for layer in model if mode != "dense" else ():
        layer.prune_by_magnitude(float(sparsity))
        if mode != "sparse":
            options = {"bits": 4} if mode.startswith("qresu") else {}
            getattr(layer, f"enter_{mode}_mode")(**options)
    trained = resurrection_parameters(model) or list(model.parameters())
    optimizer = torch.optim.AdamW(trained)
    model(torch.randn(4, 40)).square().mean().backward()
    if mode != "qresu_selective":
        optimizer.step()
    measured = memory_report(model, optimizer)

    rows = document(resu, "--layers", "40x72,72x24", "--sparsity", sparsity, "--theta-dtype", "float32")["modes"]
    (planned,) = (row for row in rows if row["mode"] == mode and row["bits"] in (None, 4))
    assert planned["total"] == pytest.approx(measured.total, rel=0.03)
    for kind, size in planned["bytes"].items():
        assert size == pytest.approx(measured.by_kind[kind], rel=0.03, abs=16), kind


def test_repeats_count(resu):
    once = document(resu, "--layers", "64x64")["modes"]
    often = document(resu, "--layers", "64x64*7")["modes"]
    assert [row["total"] * 7 for row in once] == [row["total"] for row in often]
    assert document(resu, "--layers", "64x64*7")["weights"] == 7 * 64 * 64


def test_fits_is_decided_to_the_byte(resu):
    total = document(resu, "--layers", "64x64")["modes"][0]["total"]
    assert document(resu, "--layers", "64x64", "--memory", str(total))["modes"][0]["fits"] is True
    assert document(resu, "--layers", "64x64", "--memory", str(total - 1))["modes"][0]["fits"] is False
    assert document(resu, "--layers", "64x64")["modes"][0]["fits"] is None


def test_the_table_says_what_does_not_fit(resu):
    result = resu("plan", "--layers", "512x512", "--memory", "2MB")
    assert result.exit_code == 0
    assert "fits in 2 MB" in result.stdout
    assert "no, 2.19 MB over" in result.stdout
    assert "yes" in result.stdout


def test_a_config_gives_the_layers_of_the_real_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        shapes = read_config(path)
        assert (shapes.numel, shapes.others) == (linear, embedding)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_model_made_smaller_is_planned_as_it_is(resu, kind, tmp_path):
    pytest.importorskip("transformers")
    from resu.integrations.shrink.removal import remove
    from resu.integrations.shrink.sizes import sizes_of
    from tests.integrations.shrink_models import make

    model = make(kind, pad_token_id=1)
    paths = {"bert": ("encoder.layer", "attention.self", "output"), "gpt2": ("h", "attn", "mlp")}
    blocks, attention, mlp = paths.get(kind, ("layers", "self_attn", "mlp"))
    kept = {f"{blocks}.{i}.{attention}": torch.arange(2 if i else 1) for i in range(4)}
    remove(model, kept | {f"{blocks}.{i}.{mlp}": torch.arange(24) for i in range(4)})
    model.save_pretrained(tmp_path)
    assert len(set(sizes_of(model)["heads"])) == 2  # which no configuration of transformers can say
    shapes = read_config(tmp_path)
    layers = dict(model.base_model.named_parameters())
    weights = [p for n, p in layers.items() if n.startswith(f"{blocks}.") and n.endswith("weight") and p.ndim == 2]
    planned = [layer for layer in shapes.layers if layer.name != "output layer"]
    assert sum(layer.numel for layer in planned) == sum(weight.numel() for weight in weights)
    steps = document(resu, "--config", tmp_path, "--batch", 1, "--length", 8, "--method", "full")
    assert steps["methods"][0]["trained"] == sum(p.numel() for p in model.parameters())
    config = json.loads((tmp_path / "config.json").read_text())
    config["resu_shrunk"]["heads"] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CliError, match=r"resu_shrunk .* 4 sizes of heads"):
        read_config(tmp_path)


def test_an_output_layer_tied_to_the_embedding_stays_dense(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    tied = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path).numel - tied.numel == tied.others == 512 * 64


def test_gpt2_names_are_known(tmp_path):
    config = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = read_config(tmp_path)
    assert shapes.numel == 2 * (4 * 48 * 48 + 2 * 4 * 48 * 48)
    assert shapes.others == 4800


@pytest.mark.parametrize(
    "text", ["", "784", "784x", "784x300,", "0x3", "3x0", "-3x3", "3x3*0", "3x3x3", "axb", "3.5x2"]
)
def test_what_is_no_layer_is_refused(text):
    with pytest.raises(CliError, match="INxOUT"):
        parse_layers(text)


@pytest.mark.parametrize("sparsity", ["-0.1", "1.0", "0.5abc", "nan", "70"])
def test_bad_sparsity(refused, sparsity):
    assert "--sparsity" in refused("plan", "--layers", "8x8", f"--sparsity={sparsity}")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--layers"),
        (("--layers", "8x8", "--config", "x"), "one of the two"),
        (("--layers", "8x8", "--optimizer", "lion"), "known: adamw"),
        (("--layers", "8x8", "--dtype", "int8"), "known: float32"),
        (("--layers", "8x8", "--theta-dtype", "fp4"), "known: float32"),
        (("--layers", "8x8", "--memory", "many"), "16GB"),
        (("--config", "absent.json"), "absent.json: No such file"),
    ],
)
def test_bad_options(refused, args, says):
    assert says in refused("plan", *args)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no JSON"),
        ("[1]", "holds a list"),
        ("{}", "has none of hidden_size"),
        (json.dumps(LLAMA | {"num_local_experts": 8}), "mixture of experts"),
        (json.dumps(LLAMA | {"num_attention_heads": 0}), "has a size of 0"),
        ("\x00\xff", "no JSON"),
    ],
)
def test_bad_configs(refused, tmp_path, content, says):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert says in refused("plan", "--config", tmp_path)


def test_every_optimizer_the_formulas_know_can_be_asked_for():
    from resu.modules.memory import predict_memory

    for name in plan.OPTIMIZERS:
        predict_memory([("w", (8, 8))], "dense", 0.5, optimizer=name)
    with pytest.raises(ValueError, match="known") as error:
        predict_memory([("w", (8, 8))], "dense", 0.5, optimizer="?")
    known = str(error.value).partition("known: ")[2].split(", ")
    assert sorted(known) == sorted(plan.OPTIMIZERS)


# -- whole steps ---------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 64}))
    return tmp_path


def test_a_whole_step_is_planned_by_method(resu, folder):
    asked = ("--config", str(folder), "--batch", "2", "--length", "32", "--method", "full", "--method", "qresu4")
    found = document(resu, *asked, "--theta-dtype", "float32")
    full, qresu = found["methods"]
    assert (full["method"], qresu["method"]) == ("full", "qresu4")
    for row in (full, qresu):
        assert row["weights"] + row["state"] + row["step"] == row["peak"]
        assert row["fits"] is None
    weights = sum(x.numel for x in read_config(folder).layers) + 512 * 64 + 7 * 64  # and norms
    assert full["trained"] == weights
    assert full["weights"] == pytest.approx(4 * weights, rel=0.01)
    assert full["state"] == pytest.approx(8 * weights, rel=0.01)
    assert qresu["trained"] == pytest.approx((weights - 2 * 512 * 64 - 7 * 64) / 2, rel=0.01)


def test_what_does_not_fit_is_told_with_what_makes_it_fit(resu, folder):
    asked = ("plan", "--config", str(folder / "config.json"), "--batch", "8", "--length", "64", "--method", "full")
    peak = json.loads(resu(*asked, "--json").stdout)["methods"][0]["peak"]
    (row,) = json.loads(resu(*asked, "--memory", str(peak - 1), "--json").stdout)["methods"]
    assert row["fits"] is False
    assert row["fits_with"] in ("in_backward", "gradient_checkpointing", "both")
    result = resu(*asked, "--memory", str(peak))
    assert result.exit_code == 0, result.output
    assert "full fine-tuning" in result.stdout
    assert "yes" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--layers", "8x8", "--batch", "1"), "give its --config"),
        (("--layers", "8x8", "--in-backward"), "--in-backward belongs to a plan of whole steps"),
        (("--batch", "0"), "batch must be 1 or more"),
        (("--batch", "1", "--method", "resnet"), "unknown method 'resnet'; known: full, lora"),
        (("--batch", "1", "--length", "65", "--method", "full"), "max_position_embeddings = 64"),
        (("--batch", "1", "--dtype", "int8"), "unknown --dtype 'int8'"),
        (("--batch", "1", "--optimizer", "lion"), "unknown optimizer 'lion'"),
    ],
)
def test_a_plan_of_steps_that_cannot_be_made_is_one_line(resu, folder, args, message):
    config = () if "--layers" in args else ("--config", str(folder))
    result = resu("plan", *config, *args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_config_that_is_none(resu, folder):
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    result = resu("plan", "--config", str(folder), "--batch", "1")
    assert result.exit_code == 2
    assert "no configuration that transformers reads" in " ".join(result.output.split())

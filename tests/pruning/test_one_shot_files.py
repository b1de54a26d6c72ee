"""Long runs: interrupted anywhere and continued, the result is that of an uninterrupted run, bit for bit."""

import json

import pytest
import torch
from torch import nn

from resu.core.io import FileFormatError
from resu.pruning.one_shot import prune_model
from tests.pruning import hf_models


class Interrupted(Exception):
    pass


def stopping_at(layer):
    def progress(done, total, what):
        if done == layer:
            raise Interrupted

    return progress


def same(model, result, other_model, other):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    assert list(result.masks) == list(other.masks)
    assert all(torch.equal(result.masks[n], other.masks[n]) for n in result.masks)
    a, b = ({k: v for k, v in r.report.items() if k != "seconds"} for r in (result, other))
    assert a == b


CASES = {
    "llama wanda": (hf_models.llama, "wanda", {}),
    "llama sparsegpt": (hf_models.llama, "sparsegpt", {}),
    "llama owl and dsnot": (hf_models.llama, "wanda", {"distribution": "owl", "refine": "dsnot"}),
    "llama magnitude with update": (hf_models.llama, "magnitude", {"update": "sparsegpt", "distribution": "global"}),
    "experts in bf16": (lambda: hf_models.mixtral().bfloat16(), "sparsegpt", {"pattern": "2:4"}),
    "masks differ from block to block": (hf_models.gpt_oss, "wanda", {}),
    "encoder and decoder": (hf_models.t5, "wanda", {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("stop", "anew"), [(2, False), (7, True), (8, False), (10, True)])
@pytest.mark.filterwarnings("ignore::UserWarning")  # experts of tiny models that see no token
def test_a_resumed_run_equals_an_uninterrupted_one(case, stop, anew, tmp_path):
    make, method, options = CASES[case]
    batches = hf_models.padded_and_not()[0] + hf_models.token_batches(1)
    if case == "encoder and decoder":
        batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :6]} for batch in batches]
    options = {"sparsity": 0.5, "method": method, "calibration": batches, **options}
    whole = make()
    expected = prune_model(whole, **options)
    model = make()
    with pytest.raises(Interrupted):
        prune_model(model, **options, checkpoint=tmp_path, progress=stopping_at(stop))
    if anew:  # another process has the dense weights; in the same one the model is pruned in part
        model = make()
    told = []
    result = prune_model(model, **options, checkpoint=tmp_path, progress=lambda *a: told.append(a[:2]))
    same(model, result, whole, expected)
    total = told[-1][1]
    assert told == [(i, total) for i in range(total - len(told) + 1, total + 1)]
    again = prune_model(make(), **options, checkpoint=tmp_path)  # a run that is over is read
    same(model, again, whole, expected)


def interrupted(tmp_path, stop=9, **options):
    model = hf_models.llama()
    options = {"sparsity": 0.5, "method": "wanda", "calibration": hf_models.token_batches(2), **options}
    with pytest.raises(Interrupted):
        prune_model(model, **options, checkpoint=tmp_path, progress=stopping_at(stop))
    return options


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sparsity": 0.6}, r"other settings \(sparsity 0.5, now 0.6\)"),
        ({"method": "ria"}, r"\(method wanda, now ria"),
        ({"pattern": "tensor"}, r"\(pattern row, now tensor\)"),
        ({"distribution": "erk"}, r"\(distribution None, now erk\)"),
        ({"refine": "dsnot"}, r"\(refine None, now dsnot\)"),
        ({"update": "sparsegpt"}, r"\(update None, now sparsegpt\)"),
        ({"exclude": "*.1.*"}, r"\(layers "),
        ({"blocks": "model.layers.*"}, r"\(blocks None, now model"),
        ({"seed": 1}, r"\(seed 0, now 1\)"),
        ({"calibration": hf_models.token_batches(2, seed=5)}, r"\(calibration "),
    ],
)
def test_a_run_with_other_settings_is_refused_by_their_name(change, text, tmp_path):
    options = interrupted(tmp_path)
    model = hf_models.llama()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=text):
        prune_model(model, **{**options, **change}, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.layers.1.mlp.up_proj.weight", "another model: 'model.layers.1.mlp.up_proj.weight' differs"),
        ("model.embed_tokens.weight", "another model: parameters that are not pruned differ"),
    ],
)
def test_another_model_is_refused(name, text, tmp_path):
    options = interrupted(tmp_path)
    model = hf_models.llama()
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1
    with pytest.raises(ValueError, match=text):
        prune_model(model, **options, checkpoint=tmp_path)


def test_damaged_files_are_named(tmp_path):
    options = interrupted(tmp_path)
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"run.json", "unit-0001.safetensors", "activations-0001.safetensors"}
    for name in ("unit-0001.safetensors", "activations-0001.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for bad in (whole[: len(whole) // 2], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
            (tmp_path / name).write_bytes(bad)
            with pytest.raises(FileFormatError, match=name):
                prune_model(hf_models.llama(), **options, checkpoint=tmp_path)
        (tmp_path / name).write_bytes(whole)
    text = (tmp_path / "run.json").read_text()
    for bad in (text[:-20], "[]", "{}", json.dumps(json.loads(text) | {"resu_one_shot": "{}"})):
        (tmp_path / "run.json").write_text(bad)
        with pytest.raises(FileFormatError, match=r"run\.json"):
            prune_model(hf_models.llama(), **options, checkpoint=tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="checkpoint is a folder"):
        prune_model(nn.Linear(4, 4), 0.5, "wanda", calibration=torch.ones(1, 4), checkpoint=tmp_path / "file")


def test_methods_without_calibration_leave_nothing_there(tmp_path):
    prune_model(nn.Sequential(nn.Linear(4, 4)), 0.5, checkpoint=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_warning_that_is_an_error_loses_nothing(tmp_path):
    options = {"sparsity": 0.5, "method": "wanda", "calibration": [{"input_ids": torch.zeros(1, 1, dtype=torch.long)}]}
    whole, model = hf_models.mixtral(), hf_models.mixtral()
    with pytest.warns(UserWarning, match="saw no input"):
        expected = prune_model(whole, **options)
    for _ in range(2):  # one in each block
        with pytest.raises(UserWarning, match="saw no input"):
            prune_model(model, **options, checkpoint=tmp_path)
    same(model, prune_model(model, **options, checkpoint=tmp_path), whole, expected)


def test_blocks_that_share_an_output_are_stored(tmp_path):
    """Two outputs of a block that are views of one tensor."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, pair):
            y = self.fc(pair[0] + pair[1])
            return y[:3], y[3:]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Pair() for _ in range(3))

        def forward(self, x):
            pair = (x, x)
            for block in self.blocks:
                pair = block(pair)
                pair = pair if block is not self.blocks[1] else (torch.cat(pair), torch.cat(pair))
            return pair

    def run(**options):
        torch.manual_seed(0)
        model = Model()
        return model, prune_model(model, 0.5, "wanda", calibration=x, **options)

    x = [torch.randn(6, 6)]
    expected = run()
    with pytest.raises(Interrupted):
        run(checkpoint=tmp_path, progress=stopping_at(2))
    same(*run(checkpoint=tmp_path), *expected)

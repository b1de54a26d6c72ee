"""Masks and resurrection on Cerebras: against a stand-in of its interface, and the real package where it is.

The real package needs Python 3.11 and torch 2.4. To run the checks against it:

    python3.11 -m venv FOLDER && FOLDER/bin/pip install cerebras-pytorch safetensors
    RESU_CEREBRAS_PYTHON=FOLDER/bin/python pytest tests/integrations/test_cerebras.py
"""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resu import SparseMask
from resu.core.mask_files import read_masks, write_masks
from resu.integrations.cerebras import create_sparse_config, sparsity_block, write_cerebras
from resu.integrations.cerebras.export import write_checkpoint
from tests.integrations import cerebras_checks as checks
from tests.integrations import cerebras_stand_in as stand_in


@pytest.fixture
def cstorch(monkeypatch):
    """The stand-in, with "resu" among its algorithms and SparseMaskCallback among its callbacks."""
    found = stand_in.install(monkeypatch)
    for name in ("algorithm", "callback"):
        importlib.import_module(f"resu.integrations.cerebras.{name}")
    yield found
    for name in ("algorithm", "callback"):  # others shall import them without it
        sys.modules.pop(f"resu.integrations.cerebras.{name}", None)


@pytest.fixture
def folder(tmp_path):
    """A pruned model folder under the names of `checks.network`, one kept weight 0, one pruned weight -0."""
    state = checks.network().state_dict()
    keep = torch.rand(16, 8) < 0.5
    keep[0, :2] = torch.tensor([True, False])
    state["0.weight"] = torch.where(keep, state["0.weight"], -0.0)
    state["0.weight"][0, 0] = 0
    (tmp_path / "model").mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model/model.safetensors")
    write_masks({"0.weight": SparseMask(keep)}, tmp_path / "model/masks.safetensors")
    return tmp_path / "model", keep


# -- the algorithm ---------------------------------------------------------------------------------------


def test_the_tournament_is_the_one_written_out(cstorch):
    checks.check_tournament(cstorch)
    checks.check_tournament(cstorch, steps=10, sparsity=0.5, every=1)


def test_overflow_and_resuming(cstorch):
    checks.check_gradients_that_overflow(cstorch)
    checks.check_resuming(cstorch)


def test_masks_of_checkpoints_and_of_zeros(cstorch, folder, tmp_path):
    checks.check_masks_as_tensors(cstorch, tmp_path, lambda path: torch.load(path, weights_only=True))
    write_cerebras(folder[0], tmp_path / "out")
    exported = load_file(tmp_path / "out/model.safetensors")
    checks.check_masks_as_zeros(cstorch, exported["0.weight"], folder[1])


def test_settings_of_the_algorithm(cstorch):
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="theta_lr must be positive"):
            cstorch.sparse.configure({"algorithm": "resu", "sparsity": 0.5, "theta_lr": wrong})


def test_without_the_package_the_class_says_what_it_needs():
    from resu.integrations.cerebras import RESU, SparseMaskCallback

    with pytest.raises(ImportError, match="pip install cerebras-pytorch"):
        RESU(sparsity=0.5)
    assert SparseMaskCallback.__name__ == "SparseMaskCallback"
    assert "cerebras" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        importlib.import_module("resu.integrations.cerebras").Nothing  # noqa: B018


def test_the_real_package(folder, tmp_path):
    python = os.environ.get("RESU_CEREBRAS_PYTHON")
    if python is None:
        pytest.skip("cerebras-pytorch is absent (RESU_CEREBRAS_PYTHON: see the top of this file)")
    write_cerebras(folder[0], tmp_path / "out")
    exported = load_file(tmp_path / "out/model.safetensors")
    torch.save({"weight": exported["0.weight"], "keep": folder[1]}, tmp_path / "exported.pt")
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    call = [python, "-W", "ignore", checks.__file__, tmp_path]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:]  # its version and torch's


# -- the callback ----------------------------------------------------------------------------------------


def masked_run(folder, sparse_mode, steps=6, name="0.weight", model=None):
    keep = torch.rand(16, 8) < 0.5
    path = folder / "masks.safetensors"
    write_masks({name: SparseMask(keep)}, path, overwrite=True)
    config = create_sparse_config({}, str(path), sparse_mode=sparse_mode)
    trainer = stand_in.Trainer(model or checks.network(), config)
    trainer.fit(list(checks.data(steps)))
    return trainer, keep


def test_masks_at_every_step_are_masked_training(cstorch, tmp_path):
    trainer, keep = masked_run(tmp_path, "sparse_to_sparse")
    plain = checks.network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step, (x, y) in enumerate([(None, None), *checks.data(6)]):
        if step:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            plain[0].weight[~keep] = 0
    for name, p in plain.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), p), name
    assert not torch.signbit(trainer.model[0].weight[~keep]).any()
    assert set(trainer.state()["model"]) == set(plain.state_dict())  # masks are not saved


def test_masks_at_the_start_only(cstorch, tmp_path):
    trainer, keep = masked_run(tmp_path, "sparse_to_dense", steps=0)
    assert (trainer.model[0].weight[~keep] == 0).all()
    trainer, keep = masked_run(tmp_path, "sparse_to_dense", steps=3)
    assert (trainer.model[0].weight[~keep] != 0).any()


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = checks.network()

    def forward(self, x):
        return self.model(x)


def test_names_with_the_wrapper_of_modelzoo(cstorch, tmp_path):
    for name, model in (("0.weight", Wrapped()), ("model.0.weight", Wrapped()), ("model.0.weight", None)):
        trainer, keep = masked_run(tmp_path, "sparse_to_sparse", name=name, model=model)
        weight = next(p for n, p in trainer.model.named_parameters() if n.endswith("0.weight"))
        assert (weight[~keep] == 0).all()


def test_nan_does_not_survive_a_mask(cstorch, tmp_path):
    trainer, keep = masked_run(tmp_path, "sparse_to_sparse")
    with torch.no_grad():
        trainer.model[0].weight.fill_(float("nan"))
    trainer.callbacks[0].apply()
    assert (trainer.model[0].weight[~keep] == 0).all()


def test_masks_that_do_not_fit(cstorch, tmp_path):
    with pytest.raises(ValueError, match=r"'7.weight'.*fits no parameter.*0\.weight"):
        masked_run(tmp_path, "sparse_to_sparse", name="7.weight")
    with pytest.raises(ValueError, match=r"has shape \(16, 8\), the parameter \(3, 16\)"):
        masked_run(tmp_path, "sparse_to_sparse", name="2.weight")
    kind = importlib.import_module("resu.integrations.cerebras.callback").SparseMaskCallback
    with pytest.raises(FileNotFoundError, match=r"no file of masks at 'absent\.npz'"):
        kind("absent.npz")
    with pytest.raises(TypeError, match="apply_every_step must be true or false, got 1"):
        kind(str(tmp_path / "masks.safetensors"), 1)


def test_a_restart_with_other_masks_is_noticed(cstorch, tmp_path):
    trainer, _ = masked_run(tmp_path, "sparse_to_sparse")
    state = trainer.state("on_save_trainer_state")
    trainer.call("on_load_trainer_state", copy.deepcopy(state))
    trainer.call("on_load_trainer_state", {})
    other, _ = masked_run(tmp_path, "sparse_to_sparse")
    with pytest.raises(ValueError, match=r"1 differ, '0\.weight' is one"):
        other.call("on_load_trainer_state", state)


# -- configurations --------------------------------------------------------------------------------------

BASE = {
    "trainer": {
        "init": {
            "model": {"name": "llama"},
            "callbacks": [{"ScopedTrainFlags": {"csx.performance.micro_batch_size": "auto"}}, {"CheckLoss": None}],
        },
        "fit": {"ckpt_path": "model.mdl"},
    }
}


def test_a_configuration_gets_its_callbacks():
    before = copy.deepcopy(BASE)
    config = create_sparse_config(BASE, "m.npz", {"r": 16, "alpha": 32}, "sparse_to_sparse")
    assert before == BASE
    callbacks = config["trainer"]["init"].pop("callbacks")
    assert callbacks == [
        *BASE["trainer"]["init"]["callbacks"],
        {"SparseMaskCallback": {"mask_path": "m.npz", "apply_every_step": True}},
        {"Lora": {"lora_params": {"r": 16, "alpha": 32}}},
    ]
    assert config["trainer"]["init"] == {"model": {"name": "llama"}}
    assert config["trainer"]["fit"] == BASE["trainer"]["fit"]


def test_entries_that_are_there_are_changed():
    config = create_sparse_config(BASE, "a.npz", {"r": 8})
    config["trainer"]["init"]["callbacks"][2] = {"sparsemaskcallback": {"mask_path": "old"}}
    again = create_sparse_config(config, "b.npz", {"alpha": 4}, "sparse_to_sparse")
    assert again["trainer"]["init"]["callbacks"][2:] == [
        {"SparseMaskCallback": {"mask_path": "b.npz", "apply_every_step": True}},
        {"Lora": {"lora_params": {"r": 8, "alpha": 4}}},
    ]
    assert create_sparse_config(again, "b.npz", None, "sparse_to_sparse") == again


@pytest.mark.parametrize(
    "base", [{}, {"trainer": None}, {"trainer": {"init": None}}, {"trainer": {"init": {"callbacks": None}}}]
)
def test_configurations_that_lack_places(base):
    config = create_sparse_config(base, "m.npz")
    assert config["trainer"]["init"]["callbacks"] == [
        {"SparseMaskCallback": {"mask_path": "m.npz", "apply_every_step": False}}
    ]


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({"trainer": []}, "trainer must be a mapping, got list"),
        ({"trainer": {"init": 3}}, r"trainer\.init must be a mapping, got int"),
        ({"trainer": {"init": {"callbacks": {}}}}, "list of mappings with one key"),
        ({"trainer": {"init": {"callbacks": [{"a": 1, "b": 2}]}}}, "list of mappings with one key"),
        ({"trainer": {"init": {"callbacks": [{"Lora": {"lora_params": [{"r": 1}]}}]}}}, "several lora_params"),
    ],
)
def test_configurations_of_another_form(base, says):
    with pytest.raises(ValueError, match=says):
        create_sparse_config(base, "m.npz", {"r": 1})
    with pytest.raises(ValueError, match="known: sparse_to_dense, sparse_to_sparse"):
        create_sparse_config({}, "m.npz", sparse_mode="dense")
    with pytest.raises(ValueError, match="mask_path is empty"):
        create_sparse_config({}, "")


def test_blocks_of_native_sparsity():
    assert sparsity_block(0.5) == {"algorithm": "static", "sparsity": 0.5, "init_method": "from_zeros"}
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            sparsity_block(wrong)
    with pytest.raises(ValueError, match="known: from_zeros"):
        sparsity_block(0.5, init_method="zeros")


def test_the_pages_yaml_validates(cstorch, tmp_path):
    """Each YAML block of docs/cerebras.md makes callbacks and algorithms, as the trainer would."""
    yaml = pytest.importorskip("yaml")
    page = (Path(__file__).resolve().parents[2] / "docs/cerebras.md").read_text()
    blocks = [yaml.safe_load(text.partition("```")[0]) for text in page.split("```yaml\n")[1:]]
    assert len(blocks) == 3
    write_masks({"0.weight": SparseMask(torch.ones(16, 8, dtype=torch.bool))}, tmp_path / "masks.safetensors")
    found = []
    for block in blocks:
        init = block["trainer"]["init"]
        for entry in init.get("callbacks", []):
            for arguments in entry.values():
                if "mask_path" in arguments:
                    arguments["mask_path"] = str(tmp_path / arguments["mask_path"])
        found += [type(made).__name__ for made in stand_in.make_callbacks(init.get("callbacks", []))]
        if "sparsity" in init:
            found.append(type(cstorch.sparse.configure(init["sparsity"]).algorithm).__name__)
    assert found == ["Static", "RESU", "SparseMaskCallback", "Lora"]


# -- exports ---------------------------------------------------------------------------------------------


def test_zeros_are_the_masks(cstorch, folder, tmp_path):
    yaml = pytest.importorskip("yaml")
    source, keep = folder
    before = load_file(source / "model.safetensors")
    report = write_cerebras(source, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after["0.weight"] != 0, keep)
    assert report["kept_zeros"] == 1
    assert not torch.signbit(after["0.weight"][~keep]).any()
    assert after["0.weight"][0, 0] == torch.finfo(torch.float32).smallest_normal
    changed = after["0.weight"] != before["0.weight"]
    assert changed.nonzero().tolist() == [[0, 0]]
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight")
    assert read_masks(tmp_path / "out/masks.safetensors")[0]["0.weight"] == SparseMask(keep)
    init = yaml.safe_load((tmp_path / "out/sparsity.yaml").read_text())["trainer"]["init"]
    assert init["checkpoint"] == {"disable_strict_checkpoint_loading": True}
    assert init["sparsity"]["sparsity"] == pytest.approx(1 - keep.float().mean().item())
    model = checks.network()
    group = cstorch.sparse.configure(init["sparsity"])
    group.apply(model)
    model.load_state_dict(after, strict=False)
    group.initialize()
    assert torch.equal(model[0].weight_mask, keep)
    assert model[2].weight_mask.all()


def test_masks_beside_the_weights(cstorch, folder, tmp_path):
    yaml = pytest.importorskip("yaml")
    source, keep = folder
    write_cerebras(source, tmp_path / "out", kind="tensors")
    state = torch.load(tmp_path / "out/checkpoint_0.mdl", weights_only=True)["model"]
    assert set(state) == {*checks.network().state_dict(), "0.weight_mask"}
    init = yaml.safe_load((tmp_path / "out/sparsity.yaml").read_text())["trainer"]["init"]
    assert init["sparsity"]["param_filter"] == ["0.weight"]
    model = checks.network()
    group = cstorch.sparse.configure(init["sparsity"])
    group.apply(model)
    model.load_state_dict(state)
    group.initialize()
    assert torch.equal(model[0].weight_mask, keep)


def test_exports_that_are_refused(folder, tmp_path):
    source, keep = folder
    with pytest.raises(ValueError, match="known: zeros, tensors"):
        write_cerebras(source, tmp_path / "out", kind="bits")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        write_cerebras(tmp_path / "absent", tmp_path / "out")
    (source / "masks.safetensors").unlink()
    with pytest.raises(ValueError, match="has no masks"):
        write_cerebras(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="the state has nothing of that name"):
        write_checkpoint({}, {"0.weight": keep}, tmp_path / "c.mdl")
    with pytest.raises(ValueError, match=r"has shape \(16, 8\), the state has \(3,\)"):
        write_checkpoint({"0.weight": torch.ones(3)}, {"0.weight": keep}, tmp_path / "c.mdl")
    write_checkpoint({"0.weight": torch.ones(16, 8)}, {"0.weight": keep}, tmp_path / "c.mdl")
    with pytest.raises(FileExistsError):
        write_checkpoint({"0.weight": torch.ones(16, 8)}, {"0.weight": keep}, tmp_path / "c.mdl")

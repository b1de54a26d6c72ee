"""Model folders: whole or not there; what lies beside the weights comes along, dense weights do not."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.folders import alone, check_apart, check_free, copy_companions, new_folder


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert names(tmp_path) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "pruning.json").write_text("{}")
    assert names(tmp_path) == ["out", "out/pruning.json"]


def test_only_an_earlier_result_is_replaced_and_only_if_asked(tmp_path):
    for name in ("result", "thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    (tmp_path / "result" / "pruning.json").touch()
    with pytest.raises(FileExistsError, match="overwrite=True"), new_folder(tmp_path / "result"):
        pass
    with pytest.raises(FileExistsError, match="no earlier result"), new_folder(tmp_path / "thesis", overwrite=True):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "result", overwrite=True):
        raise RuntimeError
    assert names(tmp_path / "result") == ["old", "pruning.json"]
    with new_folder(tmp_path / "result", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["result", "result/new", "thesis", "thesis/old"]


def test_an_empty_folder_is_no_obstacle_and_a_file_or_a_missing_parent_is(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").touch()
    assert names(tmp_path / "empty") == ["x"]
    with pytest.raises(FileExistsError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(FileNotFoundError, match="make it first"), new_folder(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == ["empty", "empty/x", "file"]


def test_a_place_that_cannot_be_written_is_known_before_long_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(PermissionError, match="cannot be written; name another place"):
        check_free(tmp_path / "out")


def test_companions_come_along_and_dense_weights_do_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name in (
        *("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "LICENSE", "weird name"),
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "onnx/model.onnx", "other/model.safetensors", "flax_model.msgpack"),
        *(".git/config", ".gitattributes", "masks.safetensors", "pruning.json"),
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "linked.json").symlink_to(source / "config.json")
    target.mkdir()
    (target / "config.json").write_text("mine")
    left_out = copy_companions(source, target)
    assert left_out == ["flax_model.msgpack", "onnx/model.onnx", "other/model.safetensors", "pytorch_model.bin"]
    assert [n for n in names(target) if (target / n).is_file()] == [
        *("1_Pooling/config.json", "LICENSE", "config.json", "linked.json", "modules.json", "tokenizer.json"),
        "weird name",
    ]
    assert (target / "config.json").read_text() == "mine"
    assert not (target / "linked.json").is_symlink()


def test_two_runs_do_not_make_one_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with alone(out), alone(tmp_path / "other"):
        with pytest.raises(FileExistsError, match="another run is making"), alone(out):
            pass
        with monkeypatch.context() as ranks:
            ranks.setenv("RANK", "1")  # another process of the same run
            with alone(out):
                pass
    assert names(tmp_path) == []
    with alone(out):  # as before
        pass


def test_a_killed_run_locks_nothing(tmp_path):
    code = f"import os; from resu.integrations.folders import alone\nwith alone({str(tmp_path / 'out')!r}): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert names(tmp_path) == [".out.lock"]
    with alone(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_writers_with_work_beside_the_result_wait_for_nobody(tmp_path):
    save_file({"fc.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with alone(tmp_path / "out"), pytest.raises(FileExistsError, match="another run is making"):
        prune_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", 0.5)
    prune_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", 0.5)
    assert names(tmp_path)[0] == "model.safetensors"


@pytest.mark.parametrize("file", ["adapter.json", "adapter_config.json", "other.json"])
def test_an_adapter_stays_with_its_model_and_another_folder_of_that_name_comes_along(tmp_path, file):
    (tmp_path / "source" / "adapter").mkdir(parents=True)
    for name in (file, "README.md", "adapter.safetensors"):
        (tmp_path / "source" / "adapter" / name).write_text(name)
    (tmp_path / "target").mkdir()
    left_out = copy_companions(tmp_path / "source", tmp_path / "target")
    ours = file != "other.json"
    assert left_out == ([] if ours else ["adapter/adapter.safetensors"])
    assert (tmp_path / "target" / "adapter").exists() != ours


def test_input_what_is_read_is_never_replaced(tmp_path):
    (tmp_path / "up" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "up")
    source = tmp_path / "up" / "model"
    for out in (source, source / "out", tmp_path / "up", tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="inside or above"):
            check_apart(out, source)
    with pytest.raises(ValueError, match="is read and would be replaced"):
        check_apart(tmp_path / "link", tmp_path / "other", None, tmp_path / "up" / "text.txt")
    check_apart(tmp_path / "up" / "out", source, tmp_path / "up" / "text.txt", None)
    with pytest.raises(ValueError, match=r"is read, and .* lies in it"):  # the dense model of a reconstruction
        check_apart(source / "out", tmp_path / "pruned", source)

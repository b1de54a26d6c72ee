"""`resu train` as a user meets it: alone and with several processes, stopped, lost, resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from resu.core.mask_files import read_masks
from resu.experiments.data import sources
from resu.experiments.models import ResNet
from resu.experiments.tasks import evaluate
from resu.experiments.train import load_config, read_result
from resu.experiments.train.typed import plain

CONFIG = {
    "data": "digits",
    "model": {"name": "mlp", "hidden": [64]},
    "method": {"name": "rigl", "sparsity": 0.8, "interval": 10},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "batch_size": 32,
    "steps": 200,
    "log": {"every": 50},
}
BIN = Path(sys.executable).parent


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_a_run_says_what_came_of_it(resu, config, tmp_path):
    out = tmp_path / "run"
    result = resu("train", config, "--set", "seed=3", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = read_result(out / "result.json")
    assert found.seed == 3
    assert f"test accuracy {found.test:.4g} %" in result.stdout
    assert f"sparsity {found.actual_sparsity:.6g} (exact)" in result.stdout
    assert "resu leaderboard" in result.stdout
    again = resu("train", out / "config.json", "--out", out, "--resume", "--json")  # finished: the same result
    document = json.loads(again.stdout)
    assert (document["test"], document["seed"], document["out"]) == (found.test, 3, str(out))
    assert again.stderr == ""


def test_a_dry_run_prints_a_configuration_that_reads_itself_and_writes_nothing(resu, config, tmp_path):
    text = resu("train", config, "--set", "method=set", "--set", "method.interval=7", "--dry-run").stdout
    (tmp_path / "again.yaml").write_text(text)
    made = load_config(tmp_path / "again.yaml")
    assert (made.method.name, made.method.options["interval"], made.method.sparsity) == ("set", 7, 0.8)
    assert json.loads(resu("train", tmp_path / "again.yaml", "--dry-run", "--json").stdout) == plain(made)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.yaml", "config.yaml"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--out is missing"),
        (("--set", "sed=1", "--out", "o"), "unknown key 'sed' in the configuration (did you mean 'seed'?)"),
        (("--set", "seed", "--out", "o"), "a setting is written section.key=value, got 'seed'"),
        (("--set", "optimizer.lr=fast", "--out", "o"), "optimizer.lr must be a number, got 'fast'"),
        (("--resume", "--force", "--out", "o"), "give one of them"),
        (("--set", "compute.device=cuda:99", "--out", "o"), "compute.device"),
        (("--set", "log.tensorboard=maybe", "--out", "o"), "log.tensorboard must be true or false"),
        (("--out", __file__), "is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line(refused, config, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("train", config, *args)
    assert not (tmp_path / "o").exists()


def test_a_file_that_is_no_configuration_is_one_line(refused, tmp_path):
    assert "No such file" in refused("train", tmp_path / "none.yaml", "--out", tmp_path / "o")
    (tmp_path / "a.yaml").write_text("a: [")
    assert "is not YAML" in refused("train", tmp_path / "a.yaml", "--out", tmp_path / "o")


def test_a_folder_that_is_taken_is_left_alone(resu, refused, config, tmp_path):
    out = tmp_path / "run"
    assert resu("train", config, "--set", "steps=2", "--out", out).exit_code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    said = refused("train", config, "--out", out)
    assert "--resume goes on with it, --force replaces it" in said
    assert "steps was 2, is 200" in refused("train", config, "--out", out, "--resume")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    assert resu("train", config, "--set", "steps=3", "--out", out, "--force").exit_code == 0
    assert read_result(out / "result.json").steps == 3


def test_a_loss_that_is_no_number_is_one_line_and_code_1(resu, config, tmp_path):
    args = ("--set", "optimizer.lr=1e12", "--set", "method=dense", "--set", "method.interval=null")
    values = {**CONFIG, "method": "dense", "optimizer": {"name": "sgd", "lr": 1e12}}
    config.write_text(yaml.safe_dump(values))
    result = resu("train", config, *args[:2], "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.startswith("resu: the loss is ")
    assert result.stderr.count("\n") == 1


# -- processes -----------------------------------------------------------------------------------------

# Runs the command line with something that happens in one process after a step.
SCRIPT = """
import os, signal, time
from resu.experiments import train
from resu.cli.main import main
run = train.run
def watched(config, out, *, on_event, **more):
    def tell(name, about):
        on_event(name, about)
        if name == "step" and about["step"] == {step} and os.environ.get("RANK", "0") == "{rank}":
            os.kill({pid}, {signal})
            time.sleep(0.5)
    return run(config, out, on_event=tell, **more)
train.run = watched
main()
"""


def call(*args, processes=1):
    start = [sys.executable] if processes == 1 else [BIN / "torchrun", "--nproc-per-node", processes]
    if processes > 1:
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    return subprocess.run(
        list(map(str, [*start, *args])),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


def script(tmp_path, **values):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(**{"rank": 0, "pid": "os.getpid()", **values}))
    return path


def plain_script(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from resu.cli.main import main\nmain()\n")
    return path


def same_network(a, b, tolerance=0.0):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=tolerance, msg=name)
    assert read_masks(a / "masks.safetensors")[0] == read_masks(b / "masks.safetensors")[0]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(resu, config, tmp_path):
    out = tmp_path / "run"
    done = call(script(tmp_path, step=60, signal=int(signal.SIGINT)), "train", config, "--out", out)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == (
        f"resu: stopped after step 60 of 200; go on with: resu train {out / 'config.json'} --out {out} --resume\n"
    )
    assert (out / "checkpoint.safetensors").is_file()
    assert resu("train", out / "config.json", "--out", out, "--resume").exit_code == 0
    assert resu("train", config, "--out", tmp_path / "whole").exit_code == 0
    same_network(out, tmp_path / "whole")


@pytest.fixture(scope="module")
def alone(resu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert resu("train", folder / "config.yaml", "--out", folder / "run").exit_code == 0
    return folder / "run"


@pytest.mark.slow
def test_two_processes_train_the_same_network_as_one(config, tmp_path, alone):
    out = tmp_path / "run"
    done = call(plain_script(tmp_path), "train", config, "--out", out, "--json", processes=2)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # the first process alone speaks
    assert document["test"] == pytest.approx(read_result(alone / "result.json").test, abs=0.3)
    same_network(out, alone, tolerance=1e-4)
    environment = json.loads((out / "result.json").read_text())["environment"]
    assert environment["processes"] == 2
    log = (out / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["step", "50", "100", "150", "200"]
    loss = [
        [float(line.split(",")[1]) for line in (folder / "log.csv").read_text().splitlines()[1:]]
        for folder in (out, alone)
    ]
    assert loss[0] == pytest.approx(loss[1], abs=1e-4)


@pytest.mark.slow
def test_where_a_process_is_lost_the_others_say_so_and_all_can_go_on(resu, config, tmp_path, alone):
    out = tmp_path / "run"
    settings = ("--set", "log.checkpoint_every=40")
    killed = script(tmp_path, step=90, rank=1, signal=int(signal.SIGKILL))
    done = call(killed, "train", config, *settings, "--out", out, processes=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("resu: ")]
    assert len(said) == 1, done.stderr
    assert "one of 2 processes was lost at step 9" in said[0]
    assert "--resume" in said[0]
    assert sorted(file.name for file in out.iterdir()) == ["checkpoint.safetensors", "config.json", "log.csv"]
    assert resu("train", config, *settings, "--out", out, "--resume").exit_code == 0  # now alone
    same_network(out, alone, tolerance=1e-4)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_the_same_step(resu, config, tmp_path, alone):
    out = tmp_path / "run"
    # What a terminal does: the launcher and both processes are told, and the launcher tells the processes again.
    told = script(tmp_path, step=50, pid=0, signal=int(signal.SIGINT)).read_text().replace("os.kill(0", "os.killpg(0")
    (tmp_path / "script.py").write_text(told)
    done = call(tmp_path / "script.py", "train", config, "--out", out, processes=2)
    assert done.returncode != 0
    assert "stopped after step" in done.stderr
    assert (out / "checkpoint.safetensors").is_file()
    assert resu("train", config, "--out", out, "--resume").exit_code == 0
    same_network(out, alone, tolerance=1e-4)


def test_several_processes_are_refused_where_they_are_not_wanted(refused, config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = refused("train", config, "--set", "compute.parallel=none", "--out", tmp_path / "run")
    assert "compute.parallel is none, and 2 processes were started" in said
    assert not (tmp_path / "run").exists()


# Coloured images of 8x8, for networks with norms over a batch.
TOY = """
import torch
from resu.cli.main import main
from resu.experiments.data import Images, Split, sources

def images(directory=None):
    generator = torch.Generator().manual_seed(0)
    def split(count):
        y = torch.randint(2, (count,), generator=generator)
        x = 200 * torch.rand(count, 3, 8, 8, generator=generator) + 12 * y.view(-1, 1, 1, 1)
        return Split(x.to(torch.uint8), y)
    return Images("toy", split(200), split(300), split(701), 2, mean=(0.5,) * 3, std=(0.25,) * 3)

sources.datasets.register("toy")(images)
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_measure_the_network_that_they_save(tmp_path):
    """Norms over a batch see another slice in each process, and each measures a part: it must be of one network."""
    (tmp_path / "toy_script.py").write_text(TOY)
    values = {
        **{"data": {"name": "toy", "augment": True}, "model": "resnet20", "batch_size": 20, "steps": 20},
        **{"method": {"name": "set", "sparsity": 0.5}, "optimizer": {"name": "sgd", "lr": 0.05}},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    args = ("train", tmp_path / "config.json", "--out", tmp_path / "run")
    done = call(tmp_path / "toy_script.py", *args, processes=2)
    assert done.returncode == 0, done.stderr
    namespace = {"__name__": "toy"}
    try:
        exec(TOY, namespace)
        data = namespace["images"]()
    finally:
        del sources.datasets._items["toy"]
    model = ResNet(20, 2)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    result = read_result(tmp_path / "run" / "result.json")
    assert (result.val, result.test) == tuple(round(evaluate(model, data, p, "accuracy"), 5) for p in ("val", "test"))

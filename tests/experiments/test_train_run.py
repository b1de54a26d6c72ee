"""Training runs: the loop is the plain one, a stopped run goes on bit for bit, the folder says what happened."""

import csv
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from resu.core.mask_files import read_masks
from resu.core.ranks import Ranks
from resu.experiments import recipes
from resu.experiments.data import Images, Split, load_text, sources
from resu.experiments.methods import Plan
from resu.experiments.tasks import evaluate as plain_evaluate
from resu.experiments.tasks import tasks
from resu.experiments.train import ConfigError, Interrupted, as_config, read_result, run
from resu.experiments.train.evaluation import evaluate
from resu.experiments.train.methods import method_names
from resu.experiments.train.placement import Placement
from resu.experiments.train.state import State
from resu.experiments.train.stream import stream
from resu.formats.files import load_checkpoint

pytest.importorskip("sklearn")

DIGITS = {
    "data": "digits",
    "model": {"name": "mlp", "hidden": [128, 64]},
    "method": {"name": "rigl", "sparsity": 0.9, "interval": 10},
    "optimizer": {"lr": 2e-3},
    "schedule": {"warmup": 0.02},
    "batch_size": 64,
    "steps": 120,
    "compute": {"threads": 1},
    "log": {"every": 25, "evaluate_every": 50, "checkpoint_every": 0},
}
CPU = Placement(torch.device("cpu"), "float32", False, Ranks())


def split(count, generator):
    x = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(x, (x.float().mean((1, 2, 3)) > 127).long())


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    """Small data sets beside the real ones: coloured images of 8x8, and a text."""
    text = tmp_path_factory.mktemp("text") / "toy.txt"
    words = ["ab", "cde", "fg", "hijk"]
    numbers = torch.randint(4, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(words[i] for i in numbers))

    def images(directory=None):
        generator = torch.Generator().manual_seed(0)
        parts = [split(count, generator) for count in (100, 30, 30)]
        return Images("toy", *parts, 2, mean=(0.5,) * 3, std=(0.25,) * 3)

    sources.datasets.register("toy")(images)
    sources.datasets.register("toy-text")(lambda directory=None: load_text(text, "toy-text", context=16))
    yield
    for name in ("toy", "toy-text"):
        del sources.datasets._items[name]


def config(**more):
    return as_config({**DIGITS, **more})


def stop_after(*steps):
    """A listener that interrupts as Ctrl-C does, while one of these steps is reported."""

    def tell(name, about):
        if name == "step" and about["step"] in steps:
            os.kill(os.getpid(), signal.SIGINT)

    return tell


def without_seconds(path):
    with open(path, newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def same_run(a, b):
    """Whether two folders hold the same run: every bit of the network and its masks, every figure but the time."""
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].reshape(-1).view(torch.uint8).equal(two[name].reshape(-1).view(torch.uint8)), name
    if (a / "masks.safetensors").exists():
        assert read_masks(a / "masks.safetensors")[0] == read_masks(b / "masks.safetensors")[0]
    assert without_seconds(a / "log.csv") == without_seconds(b / "log.csv")
    found = [json.loads((folder / "result.json").read_text()) for folder in (a, b)]
    for document in found:
        del document["seconds"]
    assert found[0] == found[1]


# -- the same as the comparison's own loop -------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "static", "gradual", "resu", "set"])
def test_a_run_is_the_run_of_the_comparison_bit_for_bit(method, tmp_path):
    steps = 120
    task = tasks["digits"].shortened(5)
    row = recipes.run(task, method, 0.9, 1)
    made = config(method={"name": method, "sparsity": 0.9}, seed=1, steps=steps)
    result = run(made, tmp_path / "run")
    data = task.dataset()
    model = task.model(data, 1)
    plan = Plan(row.sparsity, steps, "scratch")
    model, masks, _ = recipes.train(task, recipes.methods[method](plan), plan, model, data, 1)
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert value.equal(model.state_dict()[name]), name
    assert (result.val, result.test, result.actual_sparsity) == (row.val, row.test, row.actual_sparsity)
    assert result.exact
    assert result.settings == row.settings
    if masks:
        saved = read_masks(tmp_path / "run" / "masks.safetensors")[0]
        assert saved.keys() == masks.keys()
        assert all(saved[name].mask.equal(masks[name]) for name in masks)


# -- stop and go on ------------------------------------------------------------------------------------

RUNS = {
    "images, crops, momentum, decay, two parts, clipped": {
        "data": {"name": "digits", "augment": True},
        "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-3},
        "accumulate": 2,
        "clip_norm": 1.0,
    },
    "text, dropout, dormant weights": {
        "data": "toy-text",
        "model": {"name": "gpt", "width": 16, "heads": 2, "depth": 1, "dropout": 0.3},
        "method": {"name": "resu", "sparsity": 0.5},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "decay_vectors": False},
        "batch_size": 8,
    },
    "batch norm in half precision": {
        "data": {"name": "toy", "augment": True},
        "model": "resnet20",
        "method": {"name": "ac-dc", "sparsity": 0.8},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "step"},
        "batch_size": 10,
        "steps": 20,
        "compute": {"threads": 1, "precision": "bfloat16", "channels_last": True},
    },
    "dense": {"method": "dense"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, tmp_path):
    made = config(**RUNS[name])
    run(made, tmp_path / "whole")
    steps = made.steps
    for stops in ((1,), (steps // 3, steps - 1)):
        folder = tmp_path / "-".join(map(str, stops))
        for i, stop in enumerate(stops):
            with pytest.raises(Interrupted, match=f"stopped after step {stop} of {steps}"):
                run(made, folder, resume=i > 0, on_event=stop_after(stop))
            assert (folder / "checkpoint.safetensors").is_file()
            assert not (folder / "result.json").exists()
        run(made, folder, resume=True)
        assert not (folder / "checkpoint.safetensors").exists()
        same_run(tmp_path / "whole", folder)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_takes_back_what_it_logged_since(tmp_path):
    made = config(log={"every": 10, "evaluate_every": 0, "checkpoint_every": 40})

    class Killed(Exception):
        pass

    def die(name, about):
        if name == "step" and about["step"] == 75:
            raise Killed

    with pytest.raises(Killed):
        run(made, tmp_path / "a", on_event=die)
    assert without_seconds(tmp_path / "a" / "log.csv")[-1][0] == "70"
    begun = []
    run(made, tmp_path / "a", resume=True, on_event=lambda name, about: begun.append((name, about.get("step"))))
    assert begun[0] == ("start", 40)
    run(made, tmp_path / "b")
    same_run(tmp_path / "a", tmp_path / "b")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(config(), tmp_path / "a", on_event=lambda name, about: 1 / (about["step"] - 5))
    run(config(), tmp_path / "a", resume=True)
    run(config(), tmp_path / "b")
    same_run(tmp_path / "a", tmp_path / "b")


def test_interrupts_outside_a_run_are_as_before(tmp_path):
    before = signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.get_rng_state()
    run(config(steps=2), tmp_path / "a")
    assert before[:2] == (signal.getsignal(signal.SIGINT), torch.get_num_threads())
    assert before[2].equal(torch.get_rng_state())


# -- the folder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, config(), run(config(), folder)


def test_what_lies_in_the_folder(finished):
    folder, made, result = finished
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "log.csv", "result.json", "model.safetensors", "masks.safetensors")
    }
    assert as_config(json.loads((folder / "config.json").read_text())) == made
    assert read_result(folder / "result.json") == result
    rows = without_seconds(folder / "log.csv")
    assert rows[0] == ["step", "loss", "lr", "sparsity", "val"]
    assert [row[0] for row in rows[1:]] == ["25", "50", "75", "100", "120"]
    assert [bool(row[4]) for row in rows[1:]] == [False, True, False, True, True]
    document = json.loads((folder / "result.json").read_text())
    assert document["config"]["method"]["interval"] == 10
    assert sum(layer["keep"] for layer in document["layers"]) == round((1 - 0.9) * 17024) + 1  # 17024 - floor(15321.6)


def test_the_result_is_what_the_saved_network_does(finished):
    folder, _, result = finished
    task = tasks["digits"]
    data = task.dataset()
    model = task.model(data, 99)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert round(plain_evaluate(model, data, "test", "accuracy"), 5) == result.test
    assert result.exact
    assert result.actual_sparsity == pytest.approx(0.9, abs=1e-4)
    assert 0.1 < result.explored < 1
    assert result.inference_flops == pytest.approx(0.1, abs=1e-3)
    masks = read_masks(folder / "masks.safetensors")[0]
    state = load_checkpoint(folder / "model.safetensors").state
    assert sum(mask.n_active for mask in masks.values()) == 1703
    for name, mask in masks.items():
        assert not state[name][mask.mask.logical_not()].any()


def test_a_taken_folder_is_left_alone_unless_told(finished, tmp_path):
    folder, made, result = finished
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds a run \(config.json\)"):
        run(made, folder)
    assert run(made, folder, resume=True) == result  # finished: nothing is trained
    with pytest.raises(ConfigError, match=r"another run.*method\.interval was 10, is 20; seed was 0, is 1"):
        run(config(method={**DIGITS["method"], "interval": 20}, seed=1), folder, resume=True)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    run(config(steps=2), tmp_path / "x")
    run(config(steps=3), tmp_path / "x", force=True)
    assert read_result(tmp_path / "x" / "result.json").steps == 3
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_how_it_is_computed_may_change_when_it_goes_on(tmp_path):
    with pytest.raises(Interrupted):
        run(config(), tmp_path / "a", on_event=stop_after(5))
    other = config(log={"every": 7}, compute={"threads": 1, "channels_last": True})
    assert run(other, tmp_path / "a", resume=True).steps == 120


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"model": "lenet5"}, "model 'lenet5' is for images of 28x28; 'digits' is 1x8x8"),
        ({"model": "resnet20"}, "with 3 channels"),
        ({"model": "gpt"}, "model 'gpt' is for texts"),
        ({"batch_size": 5000}, "batch_size must lie in 1..1257"),
        ({"start": "nowhere/{seed}.safetensors"}, "there is no file nowhere/0.safetensors"),
        ({"method": {"name": "set", "sparsity": 0.9, "include": ["conv*"]}}, "conv"),
        ({"method": {"name": "set", "sparsity": 0.9, "pattern": "2:4"}}, "0.5"),
        ({"data": {"name": "fashion-mnist", "dir": "nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_carried_out_leaves_no_folder(section, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(config(**section), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    made = config(method="dense", optimizer={"name": "sgd", "lr": 1e9}, schedule={"name": "constant"})
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ at step 25: lower optimizer.lr"):
        run(made, tmp_path / "a")
    assert not (tmp_path / "a" / "result.json").exists()


def test_fine_tuning_starts_from_the_trained_network_of_the_seed(finished, tmp_path):
    folder, _, _ = finished
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    made = config(regime="finetune", start=f"{tmp_path}/{{seed}}/model.safetensors", steps=1, optimizer={"lr": 1e-9})
    tuned = run(made, tmp_path / "tuned")
    assert tuned.regime == "finetune"
    assert "start=true" in tuned.recipe
    assert str(tmp_path) not in tuned.recipe
    state = State(made, tasks["digits"].dataset(), CPU)
    trained = load_file(folder / "model.safetensors")
    assert all(value.equal(trained[name]) for name, value in state.model.state_dict().items() if "bias" in name)


# -- every method --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", method_names())
def test_every_method_ends_exact_and_goes_on_bit_for_bit(name, tmp_path):
    short = {"model": {"name": "mlp", "hidden": [32]}, "batch_size": 32, "steps": 24}
    made = config(method={"name": name, "sparsity": 0.8}, log={"every": 6, "checkpoint_every": 9}, **short)
    result = run(made, tmp_path / "whole")
    assert result.exact
    assert result.actual_sparsity == pytest.approx(0.0 if name == "dense" else 0.8, abs=1e-3)
    assert 0 < result.training_flops <= 1
    assert result.inference_flops == pytest.approx(1.0 if name == "dense" else 0.2, abs=1e-3)
    with pytest.raises(ZeroDivisionError):
        run(made, tmp_path / "stopped", on_event=lambda event, about: 1 / (about["step"] - 14))
    run(made, tmp_path / "stopped", resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def test_patterns_and_distributions_reach_the_weights(tmp_path):
    made = config(method={"name": "sr-ste", "sparsity": 0.5, "pattern": "2:4"}, steps=10)
    assert run(made, tmp_path / "nm").exact
    for mask in read_masks(tmp_path / "nm" / "masks.safetensors")[0].values():
        assert set(mask.mask.view(-1, 4).sum(1).tolist()) == {2}
    made = config(method={"name": "set", "sparsity": 0.9, "distribution": {"1.*": 0.9, "3.*": 0.5}}, steps=10)
    result = run(made, tmp_path / "globs")
    masks = read_masks(tmp_path / "globs" / "masks.safetensors")[0]
    assert {name: mask.n_pruned / mask.numel for name, mask in masks.items()} == {
        "1.weight": pytest.approx(0.9, abs=1e-3),
        "3.weight": 0.5,
        "5.weight": 0.0,
    }
    assert "1.*=0.9,3.*=0.5" in result.settings


# -- parts ---------------------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_parts_processes_and_first_step():
    data = sources.load("toy")
    made = config(data={"name": "toy", "augment": True}, model="resnet20", batch_size=12)
    whole = [next(batches) for batches in [stream(data, made, 0, Ranks())] for _ in range(20)]
    plain_places = data.places(0, 12)
    for ((x, y),), places in zip(whole, plain_places, strict=False):
        assert y.equal(data.train.y[places])
        assert x.shape == (12, 3, 8, 8)
    parts = config(data={"name": "toy", "augment": True}, model="resnet20", batch_size=12, accumulate=3)
    for first in (0, 7, 19):
        ranks = [stream(data, parts, first, Ranks(rank, 2)) for rank in (0, 1)]
        for step in range(first, 20):
            pieces = [piece for rank in ranks for piece in next(rank)]
            assert len(pieces) == 6
            for column in (0, 1):
                assert torch.cat([piece[column] for piece in pieces]).equal(whole[step][0][column])
    with pytest.raises(ConfigError, match="batch_size 12 does not divide into 15 pieces"):
        stream(data, parts, 0, Ranks(0, 5))


def test_crops_and_flips_are_moves_of_the_image():
    data = sources.load("toy")
    from torch.nn import functional as F

    from resu.experiments.data.augment import crop_and_flip

    x = data.train.x[:50]
    draws = torch.rand(50, 5, generator=torch.Generator().manual_seed(1))
    moved = crop_and_flip(x, draws)
    assert moved.dtype == torch.uint8
    assert moved.shape == x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    seen = set()
    for i, (u, v, mirror, *_) in enumerate(draws.tolist()):
        row, column = int(u * 9), int(v * 9)
        wanted = padded[i, :, row : row + 8, column : column + 8]
        assert moved[i].equal(wanted.flip(-1) if mirror < 0.5 else wanted)
        seen |= {row, column}
    assert seen == set(range(9))


def test_metrics_in_shares_add_up():
    for name, model in (("digits", None), ("toy-text", None)):
        data = sources.load(name)
        made = config(
            data=name, method="dense", model="mlp" if name == "digits" else {"name": "gpt", "width": 16, "heads": 2}
        )
        model = State(made, data, CPU).model
        metric = "accuracy" if name == "digits" else "loss"
        assert evaluate(model, data, "test", CPU) == pytest.approx(
            plain_evaluate(model, data, "test", metric), rel=1e-6
        )
        for part in ("train", "val", "test"):
            whole = torch.cat([y.flatten() for _, y in data.evaluation(part, chunk=7)])
            shares = [list(data.evaluation(part, chunk=7, share=(rank, 3))) for rank in range(3)]
            assert sum(y.numel() for share in shares for _, y in share) == len(whole)
            assert torch.cat([y.flatten() for _, y in shares[0][:1] + shares[1][:1] + shares[2][:1]]).equal(
                whole[: sum(share[0][1].numel() for share in shares)]
            )
    assert model.training


def test_accumulated_parts_make_the_same_step():
    data = tasks["digits"].dataset()
    weights = []
    for accumulate in (1, 4):
        made = config(accumulate=accumulate, method="dense", optimizer={"name": "sgd", "lr": 0.1})
        state = State(made, data, CPU)
        from resu.experiments.train.loop import _step

        batches = stream(data, made, 0, Ranks())
        for _ in range(5):
            _step(state, next(batches), 0.1)
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_decay_leaves_vectors_alone_where_told():
    data = tasks["digits"].dataset()
    made = config(method="dense", optimizer={"name": "adamw", "weight_decay": 0.1, "decay_vectors": False})
    groups = State(made, data, CPU).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]


def test_tensorboard_gets_the_figures_of_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = config(log={"every": 20, "evaluate_every": 60, "checkpoint_every": 50, "tensorboard": True})
    with pytest.raises(ZeroDivisionError):
        run(made, tmp_path / "a", on_event=lambda name, about: 1 / (about["step"] - 70) if name == "step" else None)
    run(made, tmp_path / "a", resume=True)  # from step 50: what was written of step 60 is taken back
    events = accumulator.EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    rows = without_seconds(tmp_path / "a" / "log.csv")
    for column, name in enumerate(rows[0][1:], start=1):
        logged = {int(row[0]): float(row[column]) for row in rows[1:] if row[column]}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(logged, rel=1e-5), name
        assert len(events.Scalars(name)) == len(logged)
    assert set(logged) == {60, 120}


def test_without_tensorboard_it_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from resu.experiments.train import logs

    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "resu-torch\[tensorboard\]"'):
        run(config(log={"tensorboard": True}), tmp_path / "a")
    assert not (tmp_path / "a").exists()

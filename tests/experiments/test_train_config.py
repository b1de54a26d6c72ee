"""Configurations of training runs: strict, complete, the same from YAML, JSON and the command line."""

import json
import math

import pytest

from resu.experiments.data import datasets
from resu.experiments.methods import Plan, methods
from resu.experiments.networks import networks
from resu.experiments.tasks import tasks
from resu.experiments.train import ConfigError, apply_settings, as_config, load_config
from resu.experiments.train.config import Schedule
from resu.experiments.train.methods import method_names, setting_of
from resu.experiments.train.reading import put, read_mapping
from resu.experiments.train.typed import plain
from resu.training.algorithms import algorithms

DIGITS = {"data": "digits", "model": {"name": "mlp", "hidden": [64]}, "steps": 10}


def config(**more):
    return as_config({**DIGITS, **more})


def refused(values):
    with pytest.raises(ConfigError) as caught:
        as_config(values)
    return str(caught.value)


def test_a_configuration_says_everything_and_reads_itself():
    made = config(method={"name": "rigl", "sparsity": 0.9, "interval": 7}, optimizer={"lr": "2e-3"}, seed=3)
    values = plain(made)
    assert values["method"]["interval"] == 7
    assert values["optimizer"]["lr"] == 0.002
    assert as_config(json.loads(json.dumps(values))) == made
    assert values["data"] == {"name": "digits", "dir": None, "augment": False}


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (
            {"setps": 3},
            "unknown key 'setps' in the configuration (did you mean 'steps'?); known: accumulate, batch_size",
        ),
        ({"method": {"name": "rigl", "sparsty": 0.9}}, "unknown key 'sparsty' in method (did you mean 'sparsity'?)"),
        ({"method": {"name": "rigl", "sparsity": 0.9, "intreval": 1}}, "did you mean 'interval'?"),
        ({"model": {"name": "mlp", "hiden": [3]}}, "unknown key 'hiden' in model (did you mean 'hidden'?)"),
        ({"data": {"name": "digits", "context": 3}}, "unknown key 'context' in data"),
        ({"optimizer": {"rate": 1}}, "unknown key 'rate' in optimizer"),
        ({"compute": {"precison": "bfloat16"}}, "did you mean 'precision'?"),
    ],
)
def test_an_unknown_key_names_the_known_ones(section, text):
    said = refused({**DIGITS, **section})
    assert text in said
    assert "known: " in said


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"steps": "10"}, "steps must be a whole number, got '10'"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epochs": 2}, "by steps or by epochs, got 'steps 10, epochs 2.0'"),
        ({"data": "cifar"}, "unknown data set 'cifar'; known: "),
        ({"model": "resnet"}, "unknown model 'resnet'; known: "),
        ({"method": "rigl"}, "method.sparsity must be above 0 for 'rigl'"),
        ({"method": {"name": "rigl", "sparsity": 1}}, "method.sparsity must lie in [0, 1), got 1"),
        ({"method": {"name": "rigg", "sparsity": 0.5}}, "unknown method 'rigg'; known: "),
        ({"method": {"name": "inline", "sparsity": 0.5}}, "method 'inline' trains in cycles of its own"),
        ({"method": {"name": "dense", "interval": 3}}, "method 'dense' has no options, got interval"),
        ({"method": {"name": "rigl", "sparsity": 0.5, "pattern": "2x4"}}, "2x4"),
        ({"model": {"name": "mlp", "hidden": 64}}, "model.hidden must be a list, got 64"),
        ({"model": {"name": "mlp", "hidden": ["a"]}}, "model.hidden[0] must be a whole number, got 'a'"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name must be one of sgd, adam, adamw, got 'lion'"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr must be above 0, got 0.0"),
        ({"optimizer": {"lr": ".nan"}}, "optimizer.lr must be a number, got '.nan'"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must be two numbers in [0, 1), got [0.9]"),
        ({"schedule": {"milestones": [0.7, 0.5]}}, "schedule.milestones must be rising fractions"),
        ({"compute": {"device": "tpu"}}, "compute.device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"log": {"every": -1}}, "log.every must be at least 0, got -1"),
        ({"batch_size": 10, "accumulate": 3}, "accumulate must be a divisor of batch_size 10, got 3"),
        ({"regime": "finetune"}, "start must be given for regime 'finetune'"),
        ({"data": 3}, "data must be a mapping with the keys name"),
        ({"data": {"dir": "x"}}, "data lacks the key 'name'"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_with_what_is_allowed(section, text):
    assert text in refused({**DIGITS, **section})


def test_files_in_yaml_and_json_say_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data: digits\nmodel: {name: mlp, hidden: [64]}\nsteps: 10\noptimizer: {lr: 2e-3}\n"
    )
    (tmp_path / "a.json").write_text(json.dumps({**DIGITS, "optimizer": {"lr": 0.002}}))
    assert load_config(tmp_path / "a.yaml") == load_config(tmp_path / "a.json") == config(optimizer={"lr": 0.002})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "steps: 1\nsteps: 2\n", "has the key 'steps' twice"),
        ("a.json", '{"steps": 1, "steps": 2}', "has the key 'steps' twice"),
        ("a.yaml", "a: [1\n", "is not YAML"),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "- 1\n", "must hold a mapping of keys to values, got list"),
        ("a.toml", "a = 1", "must end in .yaml, .yml or .json"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_mapping(tmp_path / name)


def test_settings_go_over_the_file():
    values = {"data": "digits", "method": {"name": "set", "sparsity": 0.9}, "model": "mlp", "steps": 5}
    texts = ["method=rigl", "method.interval=3", "model.hidden=[8, 4]", "optimizer.lr=1e-3", "seed=4"]
    made = as_config(apply_settings(values, [*texts, "clip_norm=null"]))
    assert (made.method.name, made.method.sparsity, made.method.options) == ("rigl", 0.9, {"interval": 3})
    assert made.model.options == {"hidden": (8, 4)}
    assert made.optimizer.lr == 1e-3
    assert made.seed == 4
    assert values == {"data": "digits", "method": {"name": "set", "sparsity": 0.9}, "model": "mlp", "steps": 5}
    for text in ("seed", "=3"):
        with pytest.raises(ConfigError, match=r"a setting is written section\.key=value"):
            apply_settings({}, [text])
    with pytest.raises(ConfigError, match="'seed' is no section"):
        apply_settings({"seed": 1}, ["seed.a=1"])


def test_a_mapping_goes_over_a_section_and_replaces_what_is_no_section():
    values = {"method": {"name": "set", "sparsity": 0.9, "distribution": {"a": 0.5}}}
    assert put(values, "method", {"name": "rigl", "interval": 2})["method"] == {
        **{"name": "rigl", "sparsity": 0.9, "distribution": {"a": 0.5}, "interval": 2}
    }
    assert put(values, "method.distribution", {"b": 0.5})["method"]["distribution"] == {"b": 0.5}


def test_every_method_that_needs_no_cycles_is_known_and_options_reach_its_algorithm():
    assert set(algorithms) <= set(method_names())
    for name in method_names():
        if name == "dense":
            continue
        made = config(method={"name": name, "sparsity": 0.5, "begin_step": 0, "label": "x"}, steps=200)
        setting = setting_of(made.method, Plan(0.5, 200, "scratch"))
        assert setting.options["begin_step"] == 0
        assert algorithms[setting.algorithm](**setting.options).sparsity == 0.5
        if name in methods:
            usual = methods[name](Plan(0.5, 200, "scratch"))
            assert {**usual.options, "begin_step": 0} == setting.options
            assert (usual.distribution, usual.pattern) == (setting.distribution, setting.pattern)


def test_the_method_s_place_can_be_changed():
    made = config(method={"name": "set", "sparsity": 0.5, "distribution": "uniform", "pattern": "2:4"})
    setting = setting_of(made.method, Plan(0.5, 10, "scratch"))
    assert (setting.distribution, setting.pattern) == ("uniform", "2:4")
    made = config(method={"name": "set", "sparsity": 0.5, "distribution": {"1.*": 0.9}})
    assert setting_of(made.method, Plan(0.5, 10, "scratch")).distribution == "1.*=0.9"


def test_dense_has_no_sparsity_whatever_a_grid_says():
    assert config(method={"name": "dense", "sparsity": 0.9}).method.sparsity == 0.0


def test_schedules():
    task = tasks["digits"]
    cosine = Schedule("cosine", warmup=task.warmup)
    assert [task.lr * cosine.factor(t, task.steps) for t in range(task.steps)] == pytest.approx(
        [task.learning_rate("scratch", t) for t in range(task.steps)], rel=1e-12
    )
    step = Schedule("step", milestones=(0.5, 0.75))
    assert [round(step.factor(t, 8), 6) for t in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [Schedule("linear").factor(t, 4) for t in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [Schedule("constant", warmup=0.5).factor(t, 8) for t in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_epochs_count_whole_batches():
    made = as_config({"data": "digits", "model": "mlp", "epochs": 1.5, "batch_size": 100})
    assert made.total_steps(1257) == 18
    assert math.isclose(1.5 * 12, 18)


def test_without_pyyaml_json_still_works(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "a.json").write_text(json.dumps(DIGITS))
    assert load_config(tmp_path / "a.json") == config()
    (tmp_path / "a.yaml").write_text("data: digits\n")
    with pytest.raises(ImportError, match=r'needs PyYAML: pip install "resu-torch\[train\]"'):
        load_config(tmp_path / "a.yaml")


def test_the_shipped_configurations_are_configurations(repo):
    files = sorted((repo / "examples" / "configs").glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        if not file.name.startswith("sweep"):
            load_config(file)


def test_the_page_names_every_data_set_and_model(repo):
    page = (repo / "docs" / "train.md").read_text()
    for name in (*datasets, *networks):
        if not name.startswith("toy"):
            assert f"`{name}`" in page, name

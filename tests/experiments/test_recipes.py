from dataclasses import replace

import pytest
import torch

from resu.core.counting import keep_count
from resu.experiments import recipes
from resu.experiments.data import Images, Split
from resu.experiments.methods import Plan, methods
from resu.experiments.models import mlp
from resu.experiments.recipes import dense_start, plan_key, run, train
from resu.experiments.tasks import Task, evaluate, loss_of, tasks

SPARSE = sorted(set(methods) - {"dense"})


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """One thread, so that rows repeat; no trained networks of other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(recipes, "_trained", {})
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    """Four classes in 16 dimensions, easy to tell apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(4, 16, generator=generator) * 200

    def split(count):
        y = torch.arange(count) % 4
        noise = 20 * torch.randn(count, 16, generator=generator)
        x = (centres[y] + noise).clamp(0, 255).to(torch.uint8)
        return Split(x.view(count, 1, 4, 4), y)

    return Images("toy", split(256), split(64), split(64), 4, mean=(0.4,), std=(0.25,))


@pytest.fixture(scope="module")
def task():
    return Task("toy", "toy", lambda data: mlp(16, 24, 4), 60, 20, 32, lr=1e-2, finetune_lr=5e-3)


@pytest.mark.parametrize("regime", ["scratch", "finetune"])
@pytest.mark.parametrize("method", SPARSE)
def test_every_method_reaches_the_exact_count_with_exact_zeros(task, data, method, regime):
    plan = Plan(0.77, task.steps_of(regime), regime)
    model, masks, held = train(task, methods[method](plan), plan, task.model(data, 0), data, 0)
    total = 16 * 24 + 24 * 4
    assert sum(int(mask.sum()) for mask in masks.values()) == keep_count(total, 0.77)
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        assert (weights[name][~mask] == 0).all()
    assert held >= 8 * total  # weights and something of the optimizer, even where sampling misses the most


@pytest.mark.parametrize("method", ["dense", "static", "gradual", "resu"])
def test_the_same_seed_gives_the_same_row(task, data, method):
    rows = [replace(run(task, method, 0.8, 3, "finetune", data=data), seconds=0.0) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0].zeros_exact
    assert replace(run(task, method, 0.8, 4, "finetune", data=data), seconds=0.0) != rows[0]
    assert rows[0].key == plan_key(task, method, rows[0].sparsity, 3, "finetune")


def test_dense_learns_and_counts_as_sparsity_0(task, data):
    row = run(task, "dense", 0.9, 0, data=data)
    assert row.test > 90
    assert (row.sparsity, row.actual_sparsity, row.zeros_exact) == (0.0, 0.0, True)


def test_every_method_sees_the_same_batches_and_learning_rates(task, data, monkeypatch):
    seen = {}

    def spied(model, x, y):
        seen[method].append((x.sum().item(), y.tolist()))
        return loss_of(model, x, y)

    monkeypatch.setattr(recipes, "loss_of", spied)
    for method in ("dense", "one-shot", "resu"):
        seen[method] = []
        plan = Plan(0.5, task.finetune_steps, "finetune")
        train(task, methods[method](plan), plan, task.model(data, 0), data, 0)
    assert len(seen["dense"]) == 20
    assert seen["dense"] == seen["one-shot"] == seen["resu"]


def test_a_run_leaves_the_global_random_state_alone(task, data):
    before = torch.get_rng_state()
    run(task, "gradual", 0.5, 0, "finetune", data=data)
    assert torch.equal(before, torch.get_rng_state())


def test_the_dense_start_is_trained_once_and_kept_on_disk(task, data, tmp_path, monkeypatch):
    first = dense_start(task, 0, data, tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr(recipes, "_trained", {})
    monkeypatch.setattr(recipes, "train", None)  # a second training would fail
    again = dense_start(task, 0, data, tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert dense_start(task, 0, data) is again


def test_the_learning_rate_warms_up_and_ends_at_zero(task):
    rates = [task.learning_rate("scratch", step) for step in range(task.steps)]
    assert max(rates) <= task.lr
    assert rates[-1] < 0.01 * task.lr
    slow = replace(task, warmup=0.5)
    assert slow.learning_rate("scratch", 0) == pytest.approx(task.lr / 30)


def test_unknown_names_list_the_known_ones(task, data):
    with pytest.raises(ValueError, match=r"unknown method 'magic'.*gradual"):
        run(task, "magic", 0.5, 0, data=data)
    with pytest.raises(ValueError, match=r"unknown task 'x'.*mlp"):
        run("x", "dense", 0.5, 0)
    with pytest.raises(ValueError, match="regime must be"):
        run(task, "dense", 0.5, 0, "transfer", data=data)  # type: ignore[arg-type]


def test_steps_are_called_back_in_order(task, data):
    steps = []
    run(task, "resu", 0.5, 0, data=data, on_step=lambda step, loss: steps.append((step, loss.requires_grad)))
    assert steps == [(i, False) for i in range(60)]


def test_evaluation_keeps_the_mode_and_matches_by_hand(task, data):
    model = task.model(data, 0).train()
    found = evaluate(model, data, "test", "accuracy")
    assert model.training
    logits = model(data.scaled(data.test.x))
    assert found == pytest.approx(100 * (logits.argmax(1) == data.test.y).float().mean().item())
    loss = torch.nn.functional.cross_entropy(logits, data.test.y).item()
    assert evaluate(model, data, "test", "loss") == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_real_tasks_build_and_prune(name, data_folder):
    folder = data_folder("tinyshakespeare" if name == "gpt" else "fashion_mnist")
    row = run(tasks[name].shortened(500), "resu", 0.9, 0, "scratch", directory=folder)
    assert row.zeros_exact
    assert row.actual_sparsity == pytest.approx(0.9, abs=1e-4)

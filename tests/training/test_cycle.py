"""Cycles: exact sparsity, exact zeros, frozen actives, resume in the middle of any phase."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resu.modules.base import RESUMode
from resu.training import RESUConfig, RESUTrainer
from tests.training.helpers import batches, convnet, loss_of, mlp

KINDS: dict[str, dict[str, Any]] = {
    "resu": {"use_selective": False, "resu_lr": 0.01},
    "resu-selective": {"use_selective": True, "resu_lr": 0.1},
    "qresu": {"use_selective": False, "quantize_bits": 4, "resu_lr": 0.01},
    "qresu-8-tensor": {"use_selective": False, "quantize_bits": 8, "qscheme": "per_tensor", "resu_lr": 0.01},
    "qresu-selective": {"use_selective": True, "quantize_bits": 4, "resu_lr": 0.1},
    "free-actives": {"use_selective": False, "freeze_active_during_resu": False},
    "wanda": {"pruning_method": "wanda", "commit_strategy": "wanda_reprune", "use_amnesty": False},
    "gradient": {"pruning_method": "gradient", "amnesty_score_type": "gradient", "use_selective": False},
    "wanda-amnesty": {"amnesty_score_type": "wanda", "distribution": "erk"},
    "random": {"pruning_method": "random", "sparsity_schedule": "constant"},
    "dormant": {"resurrection": "dormant", "tournament_interval": 2, "theta_damping": 1.0},
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
}


def build(kind: str, optimizer: str = "adamw", image: bool = False, **more: Any) -> RESUTrainer:
    model = convnet() if image else mlp()
    config = RESUConfig(**{"target_sparsity": 0.8, "num_cycles": 2, "steps_per_cycle": 20, **KINDS[kind]})
    return RESUTrainer(model, config, OPTIMIZERS[optimizer](model.parameters()), loss_of, progress=False, **more)


def assert_exact(trainer: RESUTrainer, sparsity: float) -> None:
    total = sum(layer.weight.numel() for layer in trainer.layers.values())
    zeros = 0
    for layer in trainer.layers.values():
        assert layer.mode is RESUMode.SPARSE
        pruned = layer.mask.get_pruned(layer.weight.detach())
        assert torch.equal(pruned, torch.zeros_like(pruned))
        zeros += pruned.numel()
    assert zeros == int(total * sparsity + 1e-9)
    assert trainer.get_training_summary()["final_sparsity"] == zeros / total


@pytest.mark.parametrize("image", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_sparsity_is_exact_to_one_weight_and_zeros_are_zero(kind: str, optimizer: str, image: bool) -> None:
    trainer = build(kind, optimizer, image)
    history = trainer.train(batches(7, image=image))
    assert [s.cycle for s in history] == [0, 1]
    assert_exact(trainer, 0.8)
    assert history[-1].actual_sparsity == trainer.sparsity
    assert sum(s.train_steps + s.resu_steps for s in history) == trainer.step == 40
    trainer.model.train()
    for batch in batches(5, image=image):  # trap 28: still sparse in the next fine-tuning
        trainer.optimizer.zero_grad()
        loss_of(trainer.model, batch).backward()
        trainer.optimizer.step()
    assert_exact(trainer, 0.8)


@pytest.mark.parametrize("cut", [1, 12, 13, 14, 17, 19, 20, 27, 33, 39])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_in_the_middle_of_a_cycle_is_bit_exact(kind: str, cut: int) -> None:
    data = batches(7)

    def loader(seed: int = 3) -> Any:
        return torch.utils.data.DataLoader(
            data, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )

    whole = build(kind)
    torch.manual_seed(5)
    whole.train(loader())

    first = build(kind)
    torch.manual_seed(5)
    first.train(loader(), max_steps=cut)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    second = build(kind)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.train(loader(seed=4))
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    same = [[replace(s, duration_seconds=0.0) for s in run.history] for run in (whole, second)]
    assert same[0] == same[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["resu", "resu-selective"])
def test_active_weights_are_bit_identical_through_the_resu_phase(kind: str, optimizer: str) -> None:
    seen: list[dict[str, Tensor]] = []

    def watch(trainer: RESUTrainer, event: str, info: dict[str, Any]) -> None:
        if event == "step" and info["phase"] == "resu":
            seen.append(
                {n: x.mask.get_active(x.weight.detach()) for n, x in trainer.layers.items() if x.is_resu_active}
            )

    trainer = build(kind, optimizer, callbacks=[watch])
    trainer.train(batches(7))
    seen = [s for s in seen if s]
    assert len(seen) >= 8
    by_count: dict[int, dict[str, Tensor]] = {}
    for snapshot in seen:
        key = sum(v.numel() for v in snapshot.values())
        for name, value in by_count.setdefault(key, snapshot).items():
            assert torch.equal(value, snapshot[name])


def test_theta_learns_and_the_tournament_keeps_its_budget() -> None:
    trainer = build("resu")
    stats = trainer.train(batches(7))
    for s in stats:
        keep = round(1000 * (1 - s.actual_sparsity))
        assert s.n_resurrected + s.n_active_kept == keep
        assert 0 < s.n_resurrected <= round(s.resurrection_budget * keep) + 2
    assert [s.resurrection_budget for s in stats] == pytest.approx([0.10, 0.06])


def test_sparsity_follows_the_schedule() -> None:
    trainer = build("resu")
    stats = trainer.train(batches(7))
    assert [s.actual_sparsity for s in stats] == [0.4, 0.8]
    assert [s.target_sparsity for s in stats] == [0.4, 0.8]


def test_densification_leaves_no_mask() -> None:
    model = mlp()
    config = RESUConfig(
        initial_sparsity=0.7, target_sparsity=0.0, densify=True, steps_per_cycle=10, use_selective=False
    )
    trainer = RESUTrainer(model, config, torch.optim.Adam(model.parameters()), loss_of, progress=False)
    stats = trainer.train(batches(7))
    assert [s.actual_sparsity for s in stats] == [0.7, 0.5, 0.3, 0.1, 0.0]
    assert all(layer.mask is None and layer.mode is RESUMode.DENSE for layer in trainer.layers.values())
    assert all((p != 0).all() for n, p in model.named_parameters() if n.endswith("weight"))


def test_simple_commit_merges_all_theta() -> None:
    model = mlp()
    config = RESUConfig(
        target_sparsity=0.8, num_cycles=1, steps_per_cycle=20, commit_strategy="simple", use_amnesty=False
    )
    trainer = RESUTrainer(model, config, torch.optim.Adam(model.parameters()), loss_of, progress=False)
    (stats,) = trainer.train(batches(7))
    assert stats.actual_sparsity == 0.0
    assert stats.resurrection_rate == 1.0


def test_wanda_prunes_within_rows_and_knows_groups() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 5))
    seen = []

    def watch(trainer: RESUTrainer, event: str, info: dict[str, Any]) -> None:
        if event == "phase" and info["phase"] == "resu":
            seen.extend(x.mask.mask.flatten(1).sum(1) for x in trainer.layers.values())

    config = RESUConfig(target_sparsity=0.5, num_cycles=1, steps_per_cycle=20, pruning_method="wanda")
    data = [(torch.randn(4, 2, 6, 6), torch.randint(5, (4,))) for _ in range(5)]
    trainer = RESUTrainer(
        model, config, torch.optim.Adam(model.parameters()), loss_of, callbacks=[watch], progress=False
    )
    trainer.train(data)
    assert len(seen) == 3
    for counts in seen:
        assert counts.max() - counts.min() <= 1
    assert_exact(trainer, 0.5)


def test_without_a_resu_phase_a_cycle_is_masked_training() -> None:
    model = mlp()
    config = RESUConfig(
        target_sparsity=0.8, num_cycles=2, steps_per_cycle=10, train_fraction=0.5, stabilize_fraction=0.5,
        resu_fraction=0.0,
    )  # fmt: skip
    trainer = RESUTrainer(model, config, torch.optim.Adam(model.parameters()), loss_of, progress=False)
    stats = trainer.train(batches(7))
    assert [s.n_resurrected for s in stats] == [0, 0]
    assert_exact(trainer, 0.8)
    assert sum(int((x.weight != 0).sum()) for x in trainer.layers.values()) == 200


def test_accumulation_scaler_scheduler_and_evaluation() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t))
    config = RESUConfig(target_sparsity=0.8, num_cycles=2, steps_per_cycle=10, use_selective=False)
    read = 0

    def train_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal read
        read += 1
        return loss_of(model, batch)

    modes = []

    def eval_fn(model: nn.Module) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return 0.5

    trainer = RESUTrainer(
        model, config, optimizer, train_fn, eval_fn, scheduler=scheduler, accumulate=3,
        scaler=torch.amp.GradScaler("cpu", init_scale=4.0), progress=False,
    )  # fmt: skip
    trainer.train(batches(7))
    assert read == 60
    assert scheduler.last_epoch == 20
    assert modes == [(False, False)] * 2
    assert model.training
    assert trainer.get_training_summary()["best_eval"] == 0.5
    assert_exact(trainer, 0.8)


def test_dormant_cycles_are_counted_and_evaluated_before_the_next_pruning() -> None:
    seen = []
    model = mlp()
    config = RESUConfig(target_sparsity=0.9, num_cycles=3, steps_per_cycle=10, resurrection="dormant")
    trainer = RESUTrainer(
        model, config, torch.optim.Adam(model.parameters()), loss_of,
        lambda m: seen.append(sum(int((x.weight == 0).sum()) for x in trainer.layers.values())) or 0.0,
        progress=False,
    )  # fmt: skip
    stats = trainer.train(batches(7))
    assert [s.actual_sparsity for s in stats] == [0.3, 0.6, 0.9]
    assert seen == [300, 600, 900]
    assert stats[0].resu_steps == 10
    assert all(s.n_resurrected > 0 for s in stats[:2])


def test_a_users_own_score_gets_the_inputs_it_needs() -> None:
    from resu.pruning.importance import register_importance

    @register_importance("inputs-squared", needs=("inputs",), replace=True)
    def score(weight: Tensor, stats: Any) -> Tensor:
        return weight.abs() * stats.input_norm**2

    model = mlp()
    config = RESUConfig(target_sparsity=0.5, num_cycles=1, steps_per_cycle=10, pruning_method="inputs-squared")
    RESUTrainer(model, config, torch.optim.Adam(model.parameters()), loss_of, progress=False).train(batches(7))


def test_a_frozen_module_stays_in_eval_mode() -> None:
    model = convnet()
    model.train()
    model[1].eval()
    config = RESUConfig(target_sparsity=0.5, num_cycles=2, steps_per_cycle=5)
    trainer = RESUTrainer(model, config, torch.optim.Adam(model.parameters()), loss_of, lambda m: 0.0, progress=False)
    trainer.train(batches(7, image=True))
    assert not model[1].training
    assert model.training
    assert trainer.model[0].training


def test_users_own_pruner_stabilizer_and_globs() -> None:
    model = mlp()
    calls = []

    def pruner(trainer: RESUTrainer, sparsity: float) -> None:
        calls.append(("prune", sparsity))
        for layer in trainer.layers.values():
            layer.prune_by_magnitude(sparsity)

    config = RESUConfig(target_sparsity=0.5, num_cycles=1, steps_per_cycle=10)
    trainer = RESUTrainer(
        model, config, torch.optim.Adam(model.parameters()), loss_of, pruner=pruner,
        stabilizer=lambda t: calls.append(("stabilize", t.sparsity)), exclude="2", progress=False,
    )  # fmt: skip
    trainer.train(batches(7))
    assert calls == [("prune", 0.5), ("stabilize", 0.5)]
    assert list(trainer.layers) == ["0"]


def test_clear_errors() -> None:
    model = mlp()
    trainer = RESUTrainer(model, RESUConfig(), torch.optim.Adam(model.parameters()), loss_of, progress=False)
    with pytest.raises(ValueError, match="can be read only once"):
        trainer.train(iter(batches(3)))
    with pytest.raises(ValueError, match="is empty"):
        trainer.train([])
    config = RESUConfig()
    config.target_sparsity = 1.5
    with pytest.raises(ValueError, match=r"target_sparsity must lie in \[0, 1\)"):
        RESUTrainer(model, config, torch.optim.Adam(model.parameters()), loss_of)
    with pytest.raises(ValueError, match="none of the layers' weights belongs to the optimizer"):
        RESUTrainer(mlp(), RESUConfig(), torch.optim.Adam(mlp().parameters()), loss_of)
    with pytest.raises(ValueError, match="neither a pruner nor a stabilizer"):
        RESUTrainer(
            model, RESUConfig(resurrection="dormant"), torch.optim.Adam(model.parameters()), loss_of,
            pruner=lambda t, s: None,
        )  # fmt: skip
    another = mlp()
    other = RESUTrainer(another, RESUConfig(seed=1), torch.optim.Adam(another.parameters()), loss_of, progress=False)
    with pytest.raises(ValueError, match="seed: saved 0, here 1"):
        other.load_state_dict(trainer.state_dict())

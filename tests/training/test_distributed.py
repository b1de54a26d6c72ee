"""Several gloo processes, DDP and FSDP2: ranks agree, agree with one process, and resume on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import distributed_runs as runs

CUT = 9
RESUMED = ["rigl", "top-kast", "snfs", "resu", "mest-soft"]
ON_FOUR = ["rigl", "set", "srigl", "top-kast", "granet"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two and then four processes do, in one start each: starting them is most of the time."""
    folder = tmp_path_factory.mktemp("distributed")
    two, four = ["ddp", "fsdp"], ["ddp", "fsdp", "hsdp"]
    runs.launch(
        2,
        folder,
        (runs.train_all, (two, list(runs.RULES))),
        (runs.train_all, (["fsdp-bf16"], ["rigl", "resu"])),
        (runs.accumulate, (two, ["rigl", "snfs"])),
        (runs.freeze, (two, ["rigl", "rigl-2:4"])),
        (runs.save_at, (two, RESUMED, CUT)),
        (runs.all_is_sharded, ()),
        (runs.disagree, ()),
    )
    runs.launch(4, folder, (runs.train_all, (four, ON_FOUR)), (runs.resume_elsewhere, (two, RESUMED, CUT)))
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {rule: runs.Run(rule).go().result() for rule in runs.RULES}


def assert_alike(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, mask in expected["masks"].items():
        assert torch.equal(result["masks"][name], mask), name
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=2e-6)
    assert result["report"] == expected["report"]


@pytest.mark.parametrize("rule", runs.RULES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_trap_26_two_ranks_are_one_process_with_the_same_batch(
    results: Path, alone: dict[str, Any], kind: str, rule: str
) -> None:
    assert_alike(torch.load(results / f"{kind}-2-{rule}.pt", weights_only=True), alone[rule])


@pytest.mark.parametrize("rule", ON_FOUR)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_trap_26_so_are_four(results: Path, alone: dict[str, Any], kind: str, rule: str) -> None:
    assert_alike(torch.load(results / f"{kind}-4-{rule}.pt", weights_only=True), alone[rule])


@pytest.mark.parametrize("rule", ["rigl", "snfs"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_trap_23_micro_batches_of_all_ranks_count(results: Path, alone: dict[str, Any], kind: str, rule: str) -> None:
    assert_alike(torch.load(results / f"{kind}-micro-{rule}.pt", weights_only=True), alone[rule])


@pytest.mark.parametrize("rule", ["rigl", "rigl-2:4"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_layer_without_a_gradient_keeps_its_mask_on_every_rank(results: Path, kind: str, rule: str) -> None:
    alone = runs.frozen(rule).go().result()
    assert_alike(torch.load(results / f"{kind}-frozen-{rule}.pt", weights_only=True), alone)


@pytest.mark.parametrize("rule", RESUMED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_trap_27_two_ranks_resume_on_four(results: Path, kind: str, rule: str) -> None:
    assert_alike(
        torch.load(results / f"{kind}-resumed-{rule}.pt", weights_only=True),
        torch.load(results / f"{kind}-saved-{rule}.pt", weights_only=True),
    )


def test_trap_25_mixed_precision_shards_are_masked(results: Path) -> None:
    for rule in ("rigl", "resu"):
        result = torch.load(results / f"fsdp-bf16-2-{rule}.pt", weights_only=True)
        assert result["report"]["sparsity"] == pytest.approx(0.8, abs=2e-4)
        fresh = sum(layer["grown"] for layer in result["report"]["layers"])  # the last step grew them, at 0
        zeros = sum(int((result["weights"][n] == 0).sum()) for n in result["masks"])
        assert zeros == sum(int((~mask).sum()) for mask in result["masks"].values()) + (fresh if rule == "rigl" else 0)
        assert not any(result["weights"][n][~mask].any() for n, mask in result["masks"].items())


def test_a_rank_that_dies_is_said_and_not_waited_for(tmp_path: Path) -> None:
    runs.launch(2, tmp_path, (runs.die, ()))
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("another process of this run is gone")
    assert said.endswith("start the run again from its last checkpoint")

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from resu.core.counting import pruned_count
from resu.core.io import FileFormatError
from resu.pruning.holding import hold_masks
from resu.pruning.mask_ops import load_mask
from resu.pruning.pruners import MagnitudePruner
from resu.pruning.snapshots import model_checksum
from resu.pruning.stages import plan_stages, prune_iteratively


def _model():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def _finetune(model, steps=4, make=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)):
    model.train()
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 12)).square().mean().backward()  # the global generator: part of what resumes
        optimizer.step()


def _zeros(model):
    return sum(int((model[i].weight == 0).sum()) for i in (0, 3))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_stages_are_cumulative_exact_and_nested(scope):
    model, seen = _model(), []

    def finetune(model, stage):
        seen.append((stage, {i: (model[i].weight != 0).clone() for i in (0, 3)}))
        _finetune(model)

    result = prune_iteratively(model, plan_stages(0.7, 4), finetune, pruner=MagnitudePruner(0.7, scope=scope))
    assert [stage for stage, _ in seen] == [1, 2, 3, 4]
    for (stage, kept), planned in zip(seen, plan_stages(0.7, 4).sparsities, strict=True):
        if scope == "global":
            assert sum(int((~k).sum()) for k in kept.values()) == pruned_count(256, planned)
        else:
            assert [int((~k).sum()) for k in kept.values()] == [pruned_count(n, planned) for n in (192, 64)]
        if stage > 1:
            assert all(not bool((kept[i] & ~seen[stage - 2][1][i]).any()) for i in (0, 3))
    assert [x.sparsity for x in result.stages] == list(plan_stages(0.7, 4).sparsities)
    for i, name in ((0, "0.weight"), (3, "3.weight")):
        assert torch.equal(result.masks[name], seen[-1][1][i])
        assert (model[i].weight[~result.masks[name]] == 0).all()
    assert result.stages[-1].layers["0.weight"]["numel"] == 192
    assert result.stats.kept == result.stages[-1].kept
    result.release()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, lr=0.1),
    ],
)
def test_masks_hold_under_any_optimizer_inside(make):
    model = _model()

    def finetune(model):
        optimizer = make(model.parameters())
        pruned = model[0].weight == 0

        def closure():
            optimizer.zero_grad()
            loss = model(torch.randn(32, 12)).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
            assert (model[0].weight[pruned] == 0).all()

    prune_iteratively(model, [0.5, 0.5], finetune).release()
    assert _zeros(model) == 192


def test_trap_28_masks_hold_after_the_last_stage_until_released():
    model = _model()
    result = prune_iteratively(model, 2, _finetune, target=0.75)
    _finetune(model)
    assert _zeros(model) == 192
    result.release()
    _finetune(model)
    assert _zeros(model) < 192


def test_optimizers_that_are_none_are_found_out():
    def by_hand(model):
        model(torch.randn(32, 12)).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)

    model = _model()
    with pytest.warns(UserWarning, match=r"128 pruned weights were not 0 after stage 1"):
        result = prune_iteratively(model, [0.5], by_hand)
    assert _zeros(model) == 128
    result.release()


def test_rollback_to_the_last_good_stage_in_memory_and_on_disk(tmp_path):
    for folder in (None, tmp_path / "run"):
        model, scores, good = _model(), iter([0.9, 0.88, 0.7]), []

        def evaluate(model, scores=scores, good=good):
            model.eval()
            good.append(model_checksum(model))
            return next(scores)

        result = prune_iteratively(
            model, [0.3, 0.3, 0.3], _finetune, eval_fn=evaluate, max_drop=0.05, checkpoint_dir=folder
        )
        assert [x.accepted for x in result.stages] == [True, False]
        assert result.rolled_back
        assert model_checksum(model) == good[1]
        assert model.training
        assert _zeros(model) == pruned_count(192, 0.3) + pruned_count(64, 0.3)
        assert result.stats.numel - result.stats.kept == _zeros(model)
        _finetune(model)  # the masks of the good stage hold
        assert _zeros(model) == pruned_count(192, 0.3) + pruned_count(64, 0.3)
        assert "taken back" in str(result)
        result.release()


def test_a_first_stage_that_hurts_leaves_the_dense_model():
    model = _model()
    before = model_checksum(model)
    result = prune_iteratively(
        model, [0.9], _finetune, eval_fn=lambda m: float(_zeros(m)), max_drop=1, higher_is_better=False
    )
    assert model_checksum(model) == before
    assert result.masks == {}
    assert result.rolled_back
    hold_masks(model, {"0.weight": torch.ones(16, 12, dtype=torch.bool)}).release()  # nothing holds it


def test_nan_scores_are_a_drop():
    scores = iter([1.0, math.nan])
    result = prune_iteratively(_model(), [0.5], None, eval_fn=lambda m: next(scores), max_drop=10.0)
    assert result.rolled_back


def test_an_error_in_fine_tuning_leaves_the_last_good_stage():
    model, after = _model(), []

    def finetune(model, stage):
        if stage == 2:
            with torch.no_grad():
                model[0].weight.fill_(9)
                model[1].running_mean.fill_(9)
            raise KeyboardInterrupt
        _finetune(model)

    with pytest.raises(KeyboardInterrupt):
        prune_iteratively(model, [0.5, 0.5], finetune, eval_fn=lambda m: after.append(model_checksum(m)) or 0.0)
    assert model_checksum(model) == after[-1]
    _finetune(model)  # and lets go
    assert _zeros(model) < 128


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 3])
@pytest.mark.parametrize("fresh", [True, False])
def test_trap_27_resume_after_an_interrupt_equals_the_uninterrupted(tmp_path, stop_at, fresh):
    def run(model, folder, stop=None):
        def finetune(model, stage):
            _finetune(model, steps=2)
            if stage == stop:
                raise _Stop
            _finetune(model, steps=2)

        def evaluate(model):
            model.eval()
            return model(torch.randn(16, 12)).square().mean()

        return prune_iteratively(
            *(model, [0.3, 0.3, 0.2], finetune),
            eval_fn=evaluate,
            checkpoint_dir=folder,
            pruner=MagnitudePruner(0.6, scope="global"),
        )

    torch.manual_seed(5)
    whole = _model()
    expected = run(whole, tmp_path / "whole")
    torch.manual_seed(5)
    model = _model()
    with pytest.raises(_Stop):
        run(model, tmp_path / "cut", stop_at)
    torch.manual_seed(77)  # another process would have another state
    model = _model() if fresh else model
    result = run(model, tmp_path / "cut")
    assert model_checksum(model) == model_checksum(whole)
    assert all(torch.equal(result.masks[n], expected.masks[n]) for n in expected.masks)
    assert [x.score for x in result.stages] == [x.score for x in expected.stages]
    assert result.baseline == expected.baseline
    result.release()
    expected.release()
    again = run(_model(), tmp_path / "cut")  # a finished run is loaded, not run
    assert again.history == result.history
    again.release()


def test_killed_in_the_middle_goes_on(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        torch.set_num_threads({torch.get_num_threads()})  # sums depend on it
        from tests.pruning.test_stages import _finetune, _model, prune_iteratively
        torch.manual_seed(5)
        def finetune(model, stage):
            _finetune(model)
            if stage == 2:
                os._exit(9)
        prune_iteratively(_model(), [0.5, 0.5, 0.5], finetune, checkpoint_dir=sys.argv[1])
        """
    )
    died = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    for folder in "ab":
        torch.manual_seed(5)
        prune_iteratively(_model(), [0.5] * 3, lambda m: _finetune(m), checkpoint_dir=tmp_path / folder).release()
    for file in ("stage-03.safetensors", "stage-03.masks.safetensors"):
        a, b = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert not [p.name for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]


def test_checkpoints_are_plain_files(tmp_path):
    model = _model()
    result = prune_iteratively(model, [0.5, 0.5], _finetune, checkpoint_dir=tmp_path / "x" / "y")
    names = sorted(p.name for p in (tmp_path / "x" / "y").iterdir())
    assert names == [
        *("run.json", "stage-00.safetensors", "stage-01.masks.safetensors", "stage-01.safetensors"),
        *("stage-02.masks.safetensors", "stage-02.safetensors"),
    ]
    state = load_file(tmp_path / "x" / "y" / "stage-02.safetensors")
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    masks, metadata = load_mask(tmp_path / "x" / "y" / "stage-02.masks.safetensors")
    assert all(torch.equal(masks[n], m) for n, m in result.masks.items())
    assert metadata == {"stage": 2}
    result.release()


def test_a_folder_of_another_run_is_not_touched(tmp_path):
    prune_iteratively(_model(), [0.5, 0.5], None, checkpoint_dir=tmp_path).release()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(sparsities \[0\.5, 0\.75\], now \[0\.5\]"):
        prune_iteratively(_model(), [0.5], None, checkpoint_dir=tmp_path)
    other = _model()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(ValueError, match="began with other weights"):
        prune_iteratively(other, [0.5, 0.5], None, checkpoint_dir=tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        prune_iteratively(_model(), [0.5], None, checkpoint_dir=tmp_path, resume=False)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    prune_iteratively(other, [0.5], None, checkpoint_dir=tmp_path, resume=False, overwrite=True).release()
    assert not (tmp_path / "stage-02.safetensors").exists()


@pytest.mark.parametrize("name", ["stage-01.safetensors", "stage-01.masks.safetensors", "run.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path, name, how):
    prune_iteratively(_model(), [0.5], None, checkpoint_dir=tmp_path).release()
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-4 if name != "run.json" else len(content) // 2] ^= 1
    file.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[how])
    model = _model()
    before = model_checksum(model)
    with pytest.raises(FileFormatError, match=name.replace(".", r"\.")):
        prune_iteratively(model, [0.5], None, checkpoint_dir=tmp_path)
    assert model_checksum(model) == before


def test_progress_and_tables():
    said = []
    result = prune_iteratively(
        *(_model(), 2, _finetune), target=0.5, eval_fn=lambda m: 1.0, progress=lambda *a: said.append(a)
    )
    assert [s[:2] for s in said] == [(0, 2), (1, 2), (1, 2), (2, 2)]
    text = str(result)
    assert "0.5000" in text
    assert "int4+bitmask" in text
    assert json.loads(json.dumps(result.history)) == result.history
    result.release()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (([0.2, 0.2, 0.15, 0.15], None), {"target": 0.7}, ValueError, r"reaches only 53\.8 %"),
        ((4, None), {}, ValueError, "to which sparsity"),
        ((plan_stages(0.5, 2), None), {"target": 0.6}, ValueError, "leave target out"),
        (([0.5], None), {"max_drop": 0.1}, ValueError, "pass eval_fn"),
        (([0.5], None), {"max_drop": -1, "eval_fn": lambda m: 0}, ValueError, "a number >= 0"),
        (([0.5], None), {"resume": False}, ValueError, "checkpoint_dir"),
        (([0.5], 3), {}, TypeError, "must be a function"),
        (([0.5], None), {"pruner": "magnitude"}, TypeError, "expected a pruner"),
        (([0.5], lambda a, b, c: None), {}, TypeError, "needs 3 arguments"),
    ],
)
def test_wrong_input(arguments, options, error, said):
    model = _model()
    before = model_checksum(model)
    with pytest.raises(error, match=said):
        prune_iteratively(model, *arguments, **options)
    assert model_checksum(model) == before

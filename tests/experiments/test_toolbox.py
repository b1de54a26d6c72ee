import pytest
import torch
from torch import nn

from resu.experiments import rows, toolbox
from resu.experiments.data import Images, Split
from resu.experiments.toolbox import Result, jobs, main, recalibrate
from resu.experiments.toolbox_page import markdown, render


def _result(score="magnitude", allocation="erk", sparsity=0.5, accuracy=70.0, seed=0, **more):
    values = {
        **{"score": score, "allocation": allocation, "sparsity": sparsity, "seed": seed},
        **{"accuracy": accuracy, "recalibrated": accuracy + 5, "kept": 1, "numel": 2, "exact": True},
        **{"images": 10, "seconds": 1.0, "recipe": "r", "torch": "2"},
    }
    return Result(**(values | more))


def test_trap_24_recalibration_is_the_mean_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    model.train()
    batches = [(torch.randn(8, 3, 8, 8) * 3 + 1, torch.zeros(8)) for _ in range(3)]
    before = [p.clone() for p in model.parameters()]
    recalibrate(model, batches)
    outputs = [model[0](x).detach().double() for x, _ in batches]
    mean = sum(y.mean(dim=(0, 2, 3)) for y in outputs) / 3
    variance = sum(y.transpose(0, 1).flatten(1).var(dim=1) for y in outputs) / 3
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert model[1].momentum == 0.1
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_jobs_cover_every_combination_once():
    found = jobs(("magnitude", "random"), ("uniform", "global"), (0.5, 0.9), (0, 1))
    assert len(found) == len(set(found)) == 1 + 2 * (2 + 4) + 2
    assert found[0] == ("dense", "dense", 0.0, 0)


def test_a_study_is_exact_and_goes_on_where_it_stopped(data_folder, cifar_test, tmp_path, monkeypatch):
    folder = str(data_folder("model_resnet_cifar10"))
    # Decoded already: the test images stand for the training images too.
    some = torch.arange(0, 10_000, 50)
    part = Split(cifar_test.x[some], cifar_test.y[some])
    images = Images("cifar10", part, part, part, 10, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    monkeypatch.setattr(toolbox, "load", lambda name, directory: images)
    csv, wanted = tmp_path / "a.csv", [("dense", "dense", 0.0, 0), ("taylor", "global", 0.5, 0), ("ria", "erk", 0.8, 0)]
    assert toolbox.study(csv, wanted[:1], images=50, calibration=100, directory=folder) == 1
    assert toolbox.study(csv, wanted, images=50, calibration=100, directory=folder) == 2
    assert toolbox.study(csv, wanted, images=50, calibration=100, directory=folder) == 0
    found = rows.read(csv, Result)
    assert [(r.score, r.allocation) for r in found] == [("dense", "dense"), ("taylor", "global"), ("ria", "erk")]
    assert all(r.exact for r in found)
    assert [r.kept for r in found[1:]] == [134168, 268336 - 214668]
    assert found[0].accuracy > 60


def test_a_page_gets_its_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    results = [_result("dense", "dense", 0.0, 80.0), _result(accuracy=60.0, recipe="old")]
    results += [
        _result(s, a, x, 60.0 - 10 * i)
        for i, s in enumerate(("magnitude", "wanda"))
        for a in ("erk", "global")
        for x in (0.5, 0.9)
    ]
    results += [_result("random", "erk", 0.5, accuracy, seed) for seed, accuracy in enumerate((10.0, 20.0))]
    page = tmp_path / "pruners.md"
    page.write_text("# Mine\n\n<!-- tables: begin -->\nold\n<!-- tables: end -->\nafter\n")
    render(results, page)
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("<!-- tables: end -->\nafter\n")
    assert "old" not in text
    assert "| magnitude | erk | **60.0** / **65.0** |" in text
    assert "| random | erk | 15.0 / 20.0 | – / – |" in text
    assert "Dense: 80.0 / 85.0." in text
    assert (tmp_path / "resnet20_pruning.png").read_bytes()[:4] == b"\x89PNG"
    assert markdown(results).count("\n") == 2 + 5 - 1
    with pytest.raises(ValueError, match="no result"):
        render([], page)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    for arguments, said in (
        (["--scores", "wonda"], "unknown importance 'wonda'"),
        (["--sparsities", "1.5"], "must lie in [0, 1)"),
        (["--calibration", "10"], "batches of 100"),
        (["--data-dir", str(tmp_path / "none")], "is not a folder"),
    ):
        assert main([*arguments, "--csv", str(tmp_path / "a.csv")]) == 2
        assert said in capsys.readouterr().err
    assert main(["--csv", str(tmp_path / "a.csv"), "--page", str(tmp_path / "a.md")]) == 2

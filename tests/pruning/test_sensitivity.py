import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu.core.counting import keep_count, pruned_count
from resu.core.io import FileFormatError
from resu.pruning.allocation import allocate
from resu.pruning.mask_generator import MaskGenerator
from resu.pruning.pruners import MagnitudePruner
from resu.pruning.sensitivity import Point, Sensitivity, allocate_by_sensitivity, sensitivity_scan
from resu.pruning.snapshots import model_checksum


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def _evaluate(model):
    """Distance from the unpruned network's own output."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
    return (model(x) - _model()(x)).square().mean()


LEVELS = (0.25, 0.5, 0.75, 0.9)


def test_each_loss_is_that_of_one_layer_pruned_alone():
    scan = sensitivity_scan(_model(), _evaluate, LEVELS)
    assert scan.baseline == 0
    assert list(scan.points) == ["0.weight", "2.weight", "4.weight"]
    for name, row in scan.points.items():
        for point in row:
            model = _model()
            masks = MagnitudePruner({name: point.sparsity}).prune(model)
            with torch.no_grad():
                assert point.loss == float(_evaluate(model))
            assert point.keep == int(masks[name].sum())
            assert point.numel == masks[name].numel()
    assert scan.losses["2.weight"][0.5] == scan.points["2.weight"][1].loss


def test_weights_come_back_bit_for_bit_also_after_an_error():
    model = _model().train()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    model[2].weight.requires_grad_(False)
    before = model_checksum(model)
    sensitivity_scan(model, _evaluate, LEVELS)
    assert model_checksum(model) == before
    assert model.training
    assert model[0].weight.requires_grad
    assert model[0].weight.grad is None
    calls = itertools.count()

    def fails(model):
        assert not model.training
        if next(calls) == 6:
            raise KeyboardInterrupt
        return _evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        sensitivity_scan(model, fails, LEVELS)
    assert model_checksum(model) == before
    assert model.training


def test_patterns_scores_and_globs():
    x = torch.randn(16, 8)
    scan = sensitivity_scan(
        *(_model(), _evaluate, [0.5]), method="wanda", pattern="2:4", include=["0", "4"], calibration=[x]
    )
    assert list(scan.points) == ["0.weight", "4.weight"]
    with pytest.raises(ValueError, match="2:4 has sparsity"):
        sensitivity_scan(_model(), _evaluate, [0.6], pattern="2:4")
    blocks = sensitivity_scan(_model(), _evaluate, [0.5], pattern="block:4x4", include="2")
    assert blocks.points["2.weight"][0].keep == 96


def test_a_cached_scan_goes_on_where_it_was_interrupted(tmp_path):
    file, calls = tmp_path / "scan.json", []

    def counted(model, stop=None):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return _evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        sensitivity_scan(_model(), lambda m: counted(m, 7), LEVELS, cache=file)
    calls.clear()
    scan = sensitivity_scan(_model(), counted, LEVELS, cache=file)
    assert len(calls) == 1 + 2 * 4  # the baseline and the layers that were missing
    assert scan == sensitivity_scan(_model(), _evaluate, LEVELS)
    calls.clear()
    assert sensitivity_scan(_model(), counted, LEVELS, cache=file) == scan
    assert len(calls) == 1


def test_a_stale_cache_is_computed_again_and_said(tmp_path):
    file = tmp_path / "scan.json"
    sensitivity_scan(_model(), _evaluate, LEVELS, cache=file)
    with pytest.warns(UserWarning, match="is of other sparsities"):
        assert sensitivity_scan(_model(), _evaluate, [0.5], cache=file).points["0.weight"][0].sparsity == 0.5
    other = _model()
    with torch.no_grad():
        other[4].bias.add_(1)
    with pytest.warns(UserWarning, match="is of other weights"):
        scan = sensitivity_scan(other, _evaluate, [0.5], cache=file)
    assert scan == sensitivity_scan(other, _evaluate, [0.5])
    with pytest.warns(UserWarning, match="loss of the unpruned model"):
        sensitivity_scan(other, lambda m: 2 * _evaluate(m), [0.5], cache=file)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"a": 1}'])
def test_a_file_that_is_no_scan_is_refused_and_left(tmp_path, content):
    file = tmp_path / "scan.json"
    file.write_text(content)
    with pytest.raises(FileFormatError):
        sensitivity_scan(_model(), _evaluate, [0.5], cache=file)
    assert file.read_text() == content


def test_a_flipped_bit_in_the_cache_is_refused(tmp_path):
    file = tmp_path / "scan.json"
    sensitivity_scan(_model(), _evaluate, [0.5], cache=file)
    file.write_text(file.read_text().replace("magnitude", "magnitudf"))
    with pytest.raises(FileFormatError, match="does not match its checksum"):
        sensitivity_scan(_model(), _evaluate, [0.5], cache=file)


def test_losses_that_overflow_are_infinite_and_survive_the_cache(tmp_path):
    def evaluate(model):
        return math.nan if (model[2].weight == 0).sum() > 100 else 1.0

    file = tmp_path / "scan.json"
    scan = sensitivity_scan(_model(), evaluate, LEVELS, cache=file)
    assert [p.loss for p in scan.points["2.weight"]] == [1.0, 1.0, math.inf, math.inf]
    assert sensitivity_scan(_model(), evaluate, LEVELS, cache=file) == scan
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert allocate_by_sensitivity(scan, 0.6)["2.weight"] >= 96
    with pytest.raises(ValueError, match="must return a finite loss"):
        sensitivity_scan(_model(), lambda m: math.nan, LEVELS)


# -- the budget -----------------------------------------------------------------------------------------


def _scan(sizes, losses, levels=LEVELS):
    points = {}
    for i, (n, row) in enumerate(zip(sizes, losses, strict=True)):
        points[f"l{i}.weight"] = tuple(Point(s, keep_count(n, s), n, loss) for s, loss in zip(levels, row, strict=True))
    return Sensitivity(1.0, points)


SCANS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.floats(0, 8), min_size=4, max_size=4)), min_size=1, max_size=4
).map(lambda rows: _scan([n for n, _ in rows], [row for _, row in rows]))


@settings(max_examples=80)
@given(SCANS, st.integers(0, 99))
def test_budgets_are_exact_and_what_the_scan_knows(scan, percent):
    sparsity = percent / 100
    sizes = {name: row[0].numel for name, row in scan.points.items()}
    deepest = {name: row[-1].keep for name, row in scan.points.items()}
    if sum(sizes.values()) - sum(deepest.values()) < pruned_count(sum(sizes.values()), sparsity):
        with pytest.raises(ValueError, match="scan to higher sparsities"):
            allocate_by_sensitivity(scan, sparsity)
        return
    keeps = allocate_by_sensitivity(scan, sparsity)
    assert sum(keeps.values()) == keep_count(sum(sizes.values()), sparsity)
    assert all(max(1, deepest[name]) <= keep <= sizes[name] for name, keep in keeps.items())
    each = scan.sparsities(sparsity)
    assert {name: keep_count(sizes[name], s) for name, s in each.items()} == keeps


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=6, max_size=6)), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_budgets_minimize_the_predicted_loss_over_all_others(rows, tenths):
    levels = [i / 7 for i in range(1, 7)]
    scan = Sensitivity(
        0.0,
        {
            f"l{i}.weight": tuple(
                Point(s, n * 7 - n * (j + 1), n * 7, float(loss))
                for j, (s, loss) in enumerate(zip(levels, row, strict=True))
            )
            for i, (n, row) in enumerate(rows)
        },
    )
    sizes = [row[0].numel for row in scan.points.values()]
    budget = keep_count(sum(sizes), tenths / 10)
    lowest = [n // 7 for n in sizes]
    if budget < sum(lowest):
        return
    keeps = allocate_by_sensitivity(scan, tenths / 10)
    found = sum(scan.increase(name, keep) for name, keep in keeps.items())
    best = min(
        sum(scan.increase(name, keep) for name, keep in zip(scan.points, choice, strict=True))
        for choice in itertools.product(*(range(low, n + 1) for low, n in zip(lowest, sizes, strict=True)))
        if sum(choice) == budget
    )
    assert found == pytest.approx(best, abs=1e-9)


def test_the_envelope_is_monotone_and_convex():
    scan = _scan([100], [[0.4, 3.0, 2.0, 5.0]])  # better than unpruned, then noise
    found = [scan.increase("l0.weight", keep) for keep in range(100, 9, -1)]
    slopes = [b - a for a, b in itertools.pairwise(found)]
    assert found[0] == found[25] == 0.0
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(slopes))
    assert min(slopes) >= 0
    assert found[75] == pytest.approx(2.0)  # the running maximum at 75 %
    assert found[50] == pytest.approx(1.0)  # on the line below it
    assert found[-1] == pytest.approx(4.0)
    with pytest.raises(ValueError, match="scanned down to 10 kept, not to 9"):
        scan.increase("l0.weight", 9)


def test_sensitive_layers_keep_more():
    scan = _scan([100, 100], [[2.0, 3.0, 4.0, 5.0], [1.1, 1.2, 1.3, 1.4]])
    keeps = allocate_by_sensitivity(scan, 0.6)
    assert keeps == {"l0.weight": 70, "l1.weight": 10}


def test_it_is_a_distribution_everywhere():
    scan = sensitivity_scan(_model(), _evaluate, (0.3, 0.6, 0.9))
    expected = allocate_by_sensitivity(scan, 0.7)
    shapes = {name: _model().get_parameter(name).shape for name in scan.points}
    assert allocate(scan.allocation, shapes, 0.7) == expected
    masks = MaskGenerator(_model(), 0.7, distribution=scan.allocation).generate_masks()
    assert {n: int(m.sum()) for n, m in masks.items()} == expected
    masks = MagnitudePruner(0.7, distribution=scan.allocation).prune(_model())
    assert {n: int(m.sum()) for n, m in masks.items()} == expected
    masks = MagnitudePruner(scan.sparsities(0.7)).prune(_model())
    assert {n: int(m.sum()) for n, m in masks.items()} == expected
    with pytest.raises(ValueError, match=r"'9\.weight' was not scanned"):
        allocate(scan.allocation, {"9.weight": torch.Size([2, 2])}, 0.7)
    with pytest.raises(ValueError, match="has 4 weights, the scanned one 128"):
        allocate(scan.allocation, {"0.weight": torch.Size([2, 2])}, 0.7)


def test_mistakes_are_found_before_the_work(tmp_path):
    with pytest.raises(TypeError, match="must return one number, got NoneType"):
        sensitivity_scan(_model(), lambda m: None)
    with pytest.raises(TypeError, match="must return one number, got Tensor"):
        sensitivity_scan(_model(), lambda m: torch.ones(2))
    with pytest.raises(FileNotFoundError, match="make it first"):
        sensitivity_scan(_model(), lambda m: pytest.fail("too late"), cache=tmp_path / "none" / "a.json")


def test_progress_table_and_plot(tmp_path):
    said = []
    scan = sensitivity_scan(_model(), _evaluate, LEVELS, progress=lambda *a: said.append(a))
    assert said == [(1, 3, "0.weight"), (2, 3, "2.weight"), (3, 3, "4.weight")]
    assert "2.weight" in str(scan)
    assert "0.75" in str(scan)
    pytest.importorskip("matplotlib")
    figure = scan.plot(tmp_path / "scan.png")
    assert (tmp_path / "scan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = figure.axes[0].get_lines()
    assert list(lines[1].get_xdata()) == [0, 25, 50, 75, 90]
    assert list(lines[1].get_ydata()) == [0.0, *(p.loss for p in scan.points["2.weight"])]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsities": []}, ValueError, "no sparsity above 0"),
        ({"sparsities": [0.0]}, ValueError, "no sparsity above 0"),
        ({"sparsities": [1.0]}, ValueError, "must lie"),
        ({"sparsities": ["0.5"]}, TypeError, "must be a number"),
        ({"method": "wonda"}, ValueError, "unknown importance 'wonda'"),
        ({"include": "nothing"}, ValueError, "matches no weight"),
        ({"method": "wanda"}, ValueError, "needs"),
    ],
)
def test_wrong_input(options, error, said):
    model = _model()
    before = model_checksum(model)
    with pytest.raises(error, match=said):
        sensitivity_scan(model, _evaluate, **options)
    assert model_checksum(model) == before

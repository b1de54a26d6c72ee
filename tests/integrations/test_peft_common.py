"""What PEFT's own tests ask of every method, asked of ours: merging, saving, loading, switching, several adapters."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from resu.integrations.peft import QRESUAdapterConfig, RESUAdapterConfig, SparseLoRAAdapterConfig
from tests.integrations.peft_models import IGNORED, MODELS, TARGETS, adapted, base_model, example, masks, run, trained

pytestmark = pytest.mark.filterwarnings(IGNORED)

METHODS = {
    "resu": (RESUAdapterConfig, {"sparsity": 0.3}),
    "qresu4": (QRESUAdapterConfig, {"sparsity": 0.3}),
    "qresu8": (QRESUAdapterConfig, {"sparsity": 0.3, "bits": 8, "qscheme": "per_tensor"}),
    "lora-masked": (SparseLoRAAdapterConfig, {"r": 3, "dropout": 0.0}),
    "lora-scale": (SparseLoRAAdapterConfig, {"r": 3, "dropout": 0.0, "sparsity_mode": "scale"}),
    "lora-dense": (
        SparseLoRAAdapterConfig,
        {"r": 3, "dropout": 0.0, "sparsity_mode": "sparse_to_dense", "preserve_sparsity_on_merge": False},
    ),
}
# The base weight, so that adapters can be several, and taken off.
KEEPING = ["resu", "lora-masked", "lora-scale", "lora-dense"]
ADAPTER_PARTS = ("resu_", "qresu_", "sparse_lora_")


def config_of(method, kind, **options):
    make, own = METHODS[method]
    given = {"masks": masks(kind)} if "lora" in method else {}
    return make(**{"target_modules": list(TARGETS[kind]), **given, **own, **options})


def other_config(method, kind, **options):
    """Of the same method, but another size."""
    size = {"r": 2, "alpha": 8} if "lora" in method else {"sparsity": 0.6}
    return config_of(method, kind, **size, **options)


@pytest.fixture(params=list(METHODS))
def method(request):
    return request.param


@pytest.fixture(params=KEEPING)
def keeping(request):
    return request.param


@pytest.fixture(params=list(MODELS))
def kind(request):
    return request.param


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- what is there --------------------------------------------------------------------------------------
def test_only_adapters_train(method, kind):
    model = get_peft_model(base_model(kind), config_of(method, kind))
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(name.split(".")[-2].startswith(ADAPTER_PARTS) for name in names)
    run(model, example(kind)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    assert model.get_model_status().enabled is True


def test_adapter_name(method):
    model = get_peft_model(base_model("llama"), config_of(method, "llama"), adapter_name="other-name")
    assert any(name.endswith(".other-name") for name, _ in model.named_parameters())
    assert run(model, example("llama")).requires_grad


def test_nothing_is_lost_at_the_start(keeping, kind):
    model = get_peft_model(base_model(kind), config_of(keeping, kind)).eval()
    close(run(model, example(kind)), run(base_model(kind), example(kind)))


# -- files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("safe", [True, False])
def test_saved_and_loaded(method, kind, safe, tmp_path):
    model = adapted(kind, config_of(method, kind))
    expected = run(model, example(kind))
    model.save_pretrained(tmp_path, safe_serialization=safe)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"README.md", "adapter_config.json", "adapter_model." + ("safetensors" if safe else "bin")}
    loaded = PeftModel.from_pretrained(base_model(kind), tmp_path)
    assert torch.equal(run(loaded, example(kind)), expected)
    state, other = model.state_dict(), loaded.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    onward = PeftModel.from_pretrained(base_model(kind), tmp_path, is_trainable=True)
    trains = {name for name, parameter in onward.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_loaded_without_memory_for_empty_adapters(method, kind, tmp_path):
    model = adapted(kind, config_of(method, kind))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(kind), tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(run(loaded, example(kind)), run(model, example(kind)))
    injected = inject_adapter_in_model(config_of(method, kind), base_model(kind), low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in injected.parameters())


def test_loaded_with_a_given_config(method, tmp_path):
    model = adapted("llama", config_of(method, "llama"))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is METHODS[method][0]
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert torch.equal(run(loaded, example("llama")), run(model, example("llama")))
    if "lora" not in method:  # a recipe of another count makes room for what the file holds
        other = PeftModel.from_pretrained(base_model("llama"), tmp_path, config=other_config(method, "llama"))
        assert torch.equal(run(other, example("llama")), run(model, example("llama")))


def test_auto_class(method, tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config_of(method, "llama", task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(run(loaded, example("llama")), run(model, example("llama")))


def test_state_of_the_adapter_alone(method, kind, tmp_path):
    model = adapted(kind, config_of(method, kind))
    state = get_peft_model_state_dict(model)
    assert all(key.split(".")[-1].startswith(ADAPTER_PARTS) for key in state)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(state)
    fresh = get_peft_model(base_model(kind), config_of(method, kind)).eval()
    result = peft.set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert torch.equal(run(fresh, example(kind)), run(model, example(kind)))


def test_whole_state_dict_comes_back(method, kind):
    model = adapted(kind, config_of(method, kind))
    fresh = get_peft_model(base_model(kind), config_of(method, kind)).eval()
    run(fresh, example(kind))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, example(kind)), run(model, example(kind)))


# -- merging --------------------------------------------------------------------------------------------
def test_merged_and_unmerged(method, kind):
    model = adapted(kind, config_of(method, kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model, example(kind))
    model.merge_adapter()
    assert all(layer.merged for layer in tuner_layers(model))
    close(run(model, example(kind)), expected)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    close(run(model, example(kind)), expected)
    model.unmerge_adapter()
    assert torch.equal(run(model, example(kind)), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_for_good(method, kind, dtype):
    base = base_model(kind)
    names = [name for name, _ in base.named_parameters()]
    model = trained(get_peft_model(base.to(dtype), config_of(method, kind))).eval()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in example(kind).items()}
    expected = run(model, inputs)
    merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    assert [name for name, _ in merged.named_parameters()] == names
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(run(merged, inputs), expected, rtol=2e-2, atol=2e-2)
    if dtype == torch.float32:
        close(run(merged, inputs), expected)


def test_broken_values_are_not_merged_safely(method):
    model = adapted("llama", config_of(method, "llama"))
    layer = tuner_layers(model)[0]
    theta = next(parameter for parameter in layer.parameters() if parameter.requires_grad)
    with torch.no_grad():
        theta[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        theta[0] = 0.0
    close(run(model, example("llama")), run(model.merge_and_unload(safe_merge=True), example("llama")))


def test_merged_model_is_saved_as_a_plain_one(method, tmp_path):
    model = adapted("llama", config_of(method, "llama"))
    expected = run(model, example("llama"))
    model.merge_and_unload().save_pretrained(tmp_path)
    close(run(AutoModelForCausalLM.from_pretrained(tmp_path), example("llama")), expected)


# -- switching ------------------------------------------------------------------------------------------
def test_switched_off_is_the_base_model_exactly(keeping, kind):
    expected = run(base_model(kind), example(kind))
    model = adapted(kind, config_of(keeping, kind))
    moved = run(model, example(kind))
    assert not torch.equal(moved, expected)
    with model.disable_adapter():
        assert torch.equal(run(model, example(kind)), expected)
    assert torch.equal(run(model, example(kind)), moved)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, example(kind)), expected)
    close(run(model, example(kind)), moved)


def test_unloaded_is_the_base_model_exactly(keeping, kind):
    unloaded = adapted(kind, config_of(keeping, kind)).unload()
    assert not tuner_layers(unloaded)
    assert torch.equal(run(unloaded, example(kind)), run(base_model(kind), example(kind)))


def test_base_model_state(keeping):
    model = adapted("llama", config_of(keeping, "llama"))
    state, expected = peft.get_base_model_state_dict(model), base_model("llama").state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


# -- several adapters -----------------------------------------------------------------------------------
def two(keeping, kind="llama"):
    model = adapted(kind, config_of(keeping, kind))
    first = run(model, example(kind))
    model.add_adapter("another", other_config(keeping, kind))
    trained(model, "another", scale=0.3)
    assert torch.equal(run(model, example(kind)), first)  # it is not active yet
    model.set_adapter("another")
    second = run(model, example(kind))
    assert not torch.equal(first, second)
    return model.eval(), first, second


def test_adapters_are_switched(keeping, kind):
    model, first, second = two(keeping, kind)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".another" in name for name in trains)
    model.set_adapter("default")
    assert torch.equal(run(model, example(kind)), first)
    model.set_adapter("another")
    assert torch.equal(run(model, example(kind)), second)


def test_each_adapter_has_its_files(keeping, tmp_path):
    model, first, second = two(keeping)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert torch.equal(run(loaded, example("llama")), first)
    loaded.load_adapter(tmp_path / "another", "other")
    loaded.set_adapter("other")
    assert torch.equal(run(loaded, example("llama")), second)
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["another"])
    assert {path.name for path in (tmp_path / "chosen").iterdir()} == {"README.md", "another"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "conv"])
def test_adapters_are_merged_together(keeping, kind):
    model, _, _ = two(keeping, kind)
    model.base_model.set_adapter(["default", "another"])
    both = run(model, example(kind))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    close(run(model, example(kind)), both)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    changes = [layer.get_delta_weight("default") + layer.get_delta_weight("another") for layer in tuner_layers(model)]
    bases = [layer.get_base_layer().weight.detach().clone() for layer in tuner_layers(model)]
    merged = model.merge_and_unload(adapter_names=["default", "another"])
    close(run(merged, example(kind)), both)
    weights = [parameter for name, parameter in merged.named_parameters() if name.endswith("weight")]
    for base, change in zip(bases, changes, strict=True):
        assert any(w.shape == base.shape and torch.allclose(w, base + change, atol=1e-6) for w in weights)


def test_adapters_are_merged_one_after_the_other(keeping):
    model, first, _ = two(keeping)
    model.base_model.set_adapter(["default", "another"])
    both = run(model, example("llama"))
    model.merge_adapter(["default"])
    close(run(model, example("llama")), first)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["another"])
    close(run(model, example("llama")), both)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, example("llama")), run(base_model("llama"), example("llama")))


def test_adapters_for_each_sample_are_refused(method):
    model = adapted("llama", config_of(method, "llama"))
    with pytest.raises(ValueError, match="adapter_names"):
        model(**example("llama"), adapter_names=["default", "default"])


def test_adapters_are_deleted(keeping):
    model, _, second = two(keeping)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter("default")
    assert torch.equal(run(model, example("llama")), second)
    assert not any(".default" in key for key in model.state_dict())
    model.add_adapter("default", config_of(keeping, "llama"))
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["another"]
    assert torch.equal(run(model, example("llama")), second)


def test_adapters_of_other_modules(keeping):
    model = adapted("llama", config_of(keeping, "llama"))
    expected = run(model, example("llama"))
    others = {"target_modules": ["o_proj"]}
    if "lora" in keeping:
        weights = dict(base_model("llama").named_parameters())
        others["masks"] = {name: weight != 0 for name, weight in weights.items() if "o_proj" in name}
    model.add_adapter("other", other_config(keeping, "llama", **others))
    assert torch.equal(run(model, example("llama")), expected)
    model.set_adapter("other")
    close(run(model, example("llama")), run(base_model("llama"), example("llama")))
    trained(model, "other")
    assert not torch.allclose(run(model, example("llama")), run(base_model("llama"), example("llama")))


def test_one_adapter_with_biases(keeping):
    model = get_peft_model(base_model("gpt2"), config_of(keeping, "gpt2", bias="all"))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("another", config_of(keeping, "gpt2", bias="all"))


# -- training -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", ["all", "only"])
def test_biases_train_and_are_saved(method, bias, tmp_path):
    prefix = get_peft_model(base_model("bert"), config_of(method, "bert")).base_model.prefix
    config = config_of(method, "bert", bias=bias if bias == "all" else f"{prefix}only")
    model = get_peft_model(base_model("bert"), config).eval()
    biases = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name]
    assert biases
    assert (bias == "all") == any("LayerNorm" in name for name in biases)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in biases:
                parameter.add_(0.1)
    trained(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    assert torch.equal(run(loaded, example("bert")), run(model, example("bert")))


def test_head_trains_and_is_saved(method, tmp_path):
    config = config_of(method, "bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = trained(get_peft_model(base_model("bert"), config)).eval()
    head = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    assert head
    assert all(parameter.requires_grad for parameter in head)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    assert torch.equal(run(loaded, example("bert")), run(model, example("bert")))
    close(run(model.merge_and_unload(), example("bert")), run(loaded, example("bert")))


def test_only_some_layers(method):
    model = get_peft_model(base_model("llama"), config_of(method, "llama", layers_to_transform=[1]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(method, kind, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(kind, config_of(method, kind)).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.config.use_cache = False
        torch.manual_seed(0)
        run(model, example(kind)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert set(plain) == set(checkpointed)
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name])


def test_an_optimizer_lowers_the_loss_and_keeps_the_base(keeping):
    model = get_peft_model(base_model("llama"), config_of(keeping, "llama"))
    inputs = {**example("llama"), "labels": example("llama")["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(10):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(run(model.unload(), example("llama")), run(base_model("llama"), example("llama")))


# -- use ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generates(method, kind):
    model = adapted(kind, config_of(method, kind, task_type="CAUSAL_LM"))
    ids = example(kind)["input_ids"]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] <= 12
    merged = model.merge_and_unload()
    assert torch.equal(
        merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False), tokens
    )


def test_takes_embeddings_as_input(method):
    model = adapted("llama", config_of(method, "llama"))
    embeddings = model.get_input_embeddings()(example("llama")["input_ids"])
    assert torch.equal(run(model, {"inputs_embeds": embeddings}), run(model, example("llama")))


def test_copied_deeply(method, kind):
    model = adapted(kind, config_of(method, kind))
    expected = run(model, example(kind))
    other = copy.deepcopy(model)
    assert torch.equal(run(other, example(kind)), expected)
    trained(other)
    assert torch.equal(run(model, example(kind)), expected)
    assert not torch.equal(run(other, example(kind)), expected)
    model.merge_adapter()
    again = copy.deepcopy(model)
    again.unmerge_adapter()
    assert torch.equal(run(again, example(kind)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_cast(method, kind, dtype):
    model = adapted(kind, config_of(method, kind))
    expected = run(model, example(kind))
    model = model.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in example(kind).items()}
    y = run(model, inputs)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_low_precision_base_with_wide_adapter(method, tmp_path):
    model = trained(get_peft_model(base_model("llama").bfloat16(), config_of(method, "llama"))).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    narrow = get_peft_model(
        base_model("llama").bfloat16(), config_of(method, "llama"), autocast_adapter_dtype=False
    ).eval()
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama").bfloat16(), tmp_path)
    assert torch.equal(run(loaded, example("llama")), run(model, example("llama")))
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_autocast(method):
    model = adapted("llama", config_of(method, "llama"))
    with torch.autocast("cpu", torch.bfloat16):
        y = run(model, example("llama"))
    torch.testing.assert_close(y.float(), run(model, example("llama")), rtol=0.05, atol=0.05)
    with torch.inference_mode():
        close(run(model, example("llama")), run(model, example("llama")))

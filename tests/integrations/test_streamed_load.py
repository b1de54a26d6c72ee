"""Models built block by block: the same weights as loaded whole, and never dense as a whole."""

import copy

import pytest
import torch

from resu.core.io import FileFormatError
from resu.core.peak_memory import measure_memory
from resu.modules.convert import get_resu_modules, resurrection_parameters
from resu.modules.settings import RESUMode

pytest.importorskip("transformers")
import transformers

from resu.integrations.hf import load_model
from resu.integrations.streamed_load import block_names, load_streamed, to_qresu
from tests.pruning import hf_models


def _leave(block, name):
    """Prepare nothing."""


def _llama_config(**options):
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4}
    return transformers.LlamaConfig(vocab_size=256, architectures=["LlamaForCausalLM"], **sizes, **options)


def _bert():
    config = transformers.BertConfig(**hf_models.SIZES, num_hidden_layers=2)
    return hf_models._random(transformers.BertForMaskedLM, config)


MODELS = {"llama": hf_models.llama, "gpt2": hf_models.gpt2, "bert": _bert}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path, max_shard_size="8kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_the_same_model_as_loaded_whole(folder):
    seen = []
    model = load_streamed(folder, _leave, progress=lambda done, of, name: seen.append((done, of, name)))
    whole, _ = load_model(folder)
    assert model.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ids = torch.arange(9).view(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert seen == [(i + 1, 2, name) for i, name in enumerate(block_names(model))]


def test_ties_are_kept(tmp_path):
    hf_models.llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_streamed(tmp_path, _leave, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_blocks_go_to_qresu_as_a_whole_model_would(tmp_path):
    hf_models.llama().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load_streamed(tmp_path, to_qresu(0.5, theta_dtype=torch.bfloat16, exclude="*mlp.up_proj*"))
    whole, _ = load_model(tmp_path)
    torch.manual_seed(0)
    for block in whole.model.layers:
        to_qresu(0.5, theta_dtype=torch.bfloat16, exclude="*mlp.up_proj*")(block, "")
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    modes = {name.rpartition(".")[2]: layer.mode for name, layer in get_resu_modules(model).items()}
    assert modes.pop("down_proj") is RESUMode.QRESU
    assert "up_proj" not in modes
    ids = torch.arange(9).view(1, 9)
    model(ids, labels=ids).loss.backward()
    trained = {id(p) for p in resurrection_parameters(model)}
    inside = [p for block in model.model.layers for p in block.parameters()]
    assert all((p.grad is not None) == (id(p) in trained) for p in inside)


def test_the_dense_model_never_exists_whole():
    config = _llama_config()
    dense = sum(p.nbytes for p in load_streamed(config, _leave).parameters())
    with measure_memory() as used:
        model = load_streamed(config, to_qresu(0.5, theta_dtype=torch.bfloat16))
    block = (4 * 128**2 + 3 * 128 * 344) * 4
    assert used.current < 0.45 * dense
    assert used.peak < used.current + 1.5 * block
    assert len(get_resu_modules(model)) == 6 * 7


def test_generated_weights_are_those_of_the_seed():
    config = _llama_config()
    first, second, other = (load_streamed(copy.deepcopy(config), _leave, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_what_is_missing_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_models.llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    cut = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"no weight 'model.layers.1.mlp.down_proj.weight'.*save_pretrained"):
        load_streamed(tmp_path, _leave)
    save_file({**tensors, name: cut[1:].contiguous()}, file, {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"down_proj.weight' has shape"):
        load_streamed(tmp_path, _leave)
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_streamed(tmp_path / "nothing", _leave)

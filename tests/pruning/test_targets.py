"""What pruning a whole model means, by modules and by names."""

import pytest
import torch
from torch import nn

from resu.pruning.targets import pruning_targets, state_dict_targets
from tests.core.test_layers import Block, Conv1D, Experts, Net


def shapes_of(model):
    return {name: value.shape for name, value in model.state_dict().items()}


BODY = [f"blocks.{i}.fc{j}.weight" for i in (0, 1) for j in (1, 2)]


@pytest.mark.parametrize("tied", [False, True])
def test_trap_10_and_13_embedding_head_and_norms_are_left_out_and_said(tied):
    targets, skipped = pruning_targets(Net(tied=tied))
    assert list(targets) == BODY
    if tied:
        assert skipped["lm_head.weight"] == "output head tied to wte.weight"
    else:
        assert skipped["lm_head.weight"] == "output head"
    assert skipped["wte.weight"] == "embedding"
    assert skipped["norms and biases"].startswith("8 vectors")


def test_names_and_modules_agree():
    names, skipped = state_dict_targets(shapes_of(Net()))
    assert names == BODY
    assert skipped == pruning_targets(Net())[1]


def test_names_and_modules_agree_about_a_tie():
    expected = pruning_targets(Net(tied=True))[1]
    stored_once = {name: shape for name, shape in shapes_of(Net()).items() if name != "lm_head.weight"}
    for shapes in (stored_once, shapes_of(Net())):
        assert state_dict_targets(shapes, tied=True)[1] == expected
    assert "lm_head.weight" not in state_dict_targets(stored_once)[1]
    skipped = pruning_targets(Net(tied=True), "blocks.*")[1]
    assert skipped["wte.weight"] == skipped["lm_head.weight"] == "not named by include"
    assert pruning_targets(Net(tied=True), exclude="wte")[1]["wte.weight"] == "excluded"


def test_what_hugging_face_calls_the_output_is_left_out_under_any_name():
    class WithHead(Net):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(4, 10)

        def get_output_embeddings(self):
            return self.decoder

    targets, skipped = pruning_targets(WithHead(), exclude="blocks.1.*")
    assert list(targets) == BODY[:2]
    assert skipped["decoder.weight"] == "output head"
    assert skipped["blocks.1.fc1.weight"] == "excluded"


# A body has blocks; what stands beside it is the head. Names of transformers.
HEADS_OF_TASKS = {
    "BertForSequenceClassification": (["bert.encoder.layer.0.output.dense", "bert.pooler.dense"], ["classifier"]),
    "RobertaForTokenClassification": (["roberta.encoder.layer.0.output.dense"], ["classifier.dense", "classifier.out"]),
    "DistilBertForSequenceClassification": (
        ["distilbert.transformer.layer.0.ffn.lin1"],
        ["pre_classifier", "classifier"],
    ),
    "LlamaForSequenceClassification": (["model.layers.0.mlp.up_proj"], ["score"]),
    "GPT2ForSequenceClassification": (["transformer.h.0.mlp.c_fc"], ["score"]),
    "BertForQuestionAnswering": (["bert.encoder.layer.0.output.dense"], ["qa_outputs"]),
    "ResNetForImageClassification": (["resnet.encoder.stages.0.layers.0.layer.0.convolution"], ["classifier.1"]),
    "BlipForQuestionAnswering": (
        ["vision_model.encoder.layers.0.mlp.fc1", "text_decoder.bert.encoder.layer.0.x.y"],
        [],
    ),
    "BertForMaskedLM": (["bert.encoder.layer.0.output.dense", "cls.predictions.transform.dense"], []),
    "": (["bert.encoder.layer.0.output.dense", "classifier"], []),
}


@pytest.mark.parametrize("architecture", HEADS_OF_TASKS)
def test_the_head_of_a_task_is_left_out_by_the_name_of_its_class(architecture):
    body, head = ([f"{name}.weight" for name in names] for names in HEADS_OF_TASKS[architecture])
    shapes = dict.fromkeys([*head, *body], torch.Size([8, 8]))
    names, skipped = state_dict_targets(shapes, architecture=architecture)
    assert names == body
    assert skipped == dict.fromkeys(head, "head of the task")
    if head:  # asked for by name it is pruned
        assert state_dict_targets(shapes, head[0], architecture=architecture)[0] == head[:1]


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Llama", "GPT2", "Electra", "Roberta"])
def test_the_head_of_a_task_is_left_out_of_a_model_too(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    small |= {"intermediate_size": 16, "n_layers": 1, "n_heads": 2, "dim": 8, "hidden_dim": 16, "embedding_size": 8}
    config = getattr(transformers, f"{kind}Config")(**small)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    targets, skipped = pruning_targets(model)
    prefix = f"{model.base_model_prefix}."
    assert all(name.startswith(prefix) for name in targets)
    heads = [name for name, p in model.named_parameters() if not name.startswith(prefix) and p.ndim > 1]
    assert heads == [name for name, why in skipped.items() if why == "head of the task"]
    by_name = state_dict_targets(shapes_of(model), architecture=type(model).__name__)
    assert by_name[0] == list(targets)
    assert by_name[1].keys() == skipped.keys()
    assert list(pruning_targets(model, heads[0])[0]) == heads[:1]
    assert pruning_targets(model, exclude=heads[0])[1][heads[0]] == "excluded"


def test_include_takes_exactly_what_it_names():
    targets, skipped = pruning_targets(Net(), ["lm_head", "wte"])
    assert list(targets) == ["wte.weight", "lm_head.weight"]
    assert set(BODY) < set(skipped)
    names, skipped = state_dict_targets(shapes_of(Net()), ["lm_head", "wte"])
    assert names == ["wte.weight", "lm_head.weight"]
    assert skipped[BODY[0]] == "not named by include"


def test_trap_12_stacks_are_targets():
    targets, skipped = pruning_targets(Experts())
    assert list(targets) == ["up", "router.weight"]
    assert targets["up"].stacked
    assert "not known to multiply" in skipped["position"]
    assert state_dict_targets(shapes_of(Experts()))[0] == ["up", "router.weight"]


@pytest.mark.parametrize("glob", ["lm_head.", "LM_HEAD", "head", "blocks.0.norm"])
@pytest.mark.parametrize("where", ["include", "exclude"])
def test_trap_13_a_glob_that_matches_nothing_is_an_error(glob, where):
    with pytest.raises(ValueError, match="matches no weight of the model"):
        pruning_targets(Net(), **{where: glob})
    with pytest.raises(ValueError, match=r"matches no weight of the file; weights are: wte.weight"):
        state_dict_targets(shapes_of(Net()), **{where: glob})


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="only the output head is left"):
        pruning_targets(Net(), exclude="blocks.*")
    with pytest.raises(ValueError, match=r"Left out: wte.weight \(embedding\); blocks.0.fc1.weight \(excluded\)"):
        state_dict_targets(shapes_of(Net()), exclude="blocks.*")
    with pytest.raises(ValueError, match="only vectors"):
        state_dict_targets({"norm.weight": torch.Size([3])})


# Names as real checkpoints have them: GPT-2, Llama, BERT, T5, OPT, GPT-NeoX, ViT, CLIP, ResNet, Mixtral, ALBERT.
KEPT = {
    "transformer.h.0.attn.c_attn.weight": (768, 2304),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "encoder.layer.0.attention.self.query.weight": (8, 8),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
    "model.decoder.project_in.weight": (8, 4),
    "embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4),
    "vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4),
    "layer1.0.conv1.weight": (8, 8, 3, 3),
    "layer1.0.downsample.0.weight": (8, 8, 1, 1),
    "block_sparse_moe.experts.0.w1.weight": (8, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 16, 8),
    "encoder.embedding_hidden_mapping_in.weight": (8, 4),
    "pooler.dense.weight": (8, 8),
    "in_proj_weight": (24, 8),
    "gru.weight_ih_l0": (24, 8),
    "head.weight": (1, 8),
}
LEFT = {
    "transformer.wte.weight": (10, 8),
    "transformer.wpe.weight": (10, 8),
    "transformer.h.0.attn.bias": (1, 1, 10, 10),
    "model.embed_tokens.weight": (10, 8),
    "bert.embeddings.token_type_embeddings.weight": (2, 8),
    "tok_embeddings.weight": (10, 8),
    "shared.weight": (10, 8),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
    "model.decoder.embed_positions.weight": (10, 8),
    "gpt_neox.embed_in.weight": (10, 8),
    "embed_out.weight": (10, 8),
    "lm_head.weight": (10, 8),
    "lm_head.dense.weight": (8, 8),
    "embeddings.position_ids": (1, 10),
    "embeddings.cls_token": (1, 1, 8),
    "embeddings.position_embeddings": (1, 10, 8),
    "pos_embed": (1, 10, 8),
    "q_norm.weight": (4, 8),
    "transformer.h.0.ln_1.weight": (8, 1),
    "conv.weight_g": (8, 1, 1),
}


def test_names_of_real_checkpoints():
    shapes = {name: torch.Size(shape) for name, shape in {**KEPT, **LEFT}.items()}
    names, skipped = state_dict_targets(shapes)
    assert names == list(KEPT)
    assert list(skipped) == list(LEFT)


def test_trap_11_conv1d_among_the_targets():
    model = nn.ModuleDict({"block": Block(), "c_fc": Conv1D(8, 4)})
    assert pruning_targets(model)[0]["c_fc.weight"].transposed

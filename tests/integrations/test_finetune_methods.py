"""What each method lets train, what it holds, and what it merges: elementwise, on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from resu.core.mask import SparseMask
from resu.core.mask_files import write_masks
from resu.core.quantization import dequantize, quantize
from resu.core.resurrection import gather_theta
from resu.integrations.finetune.batches import Collator
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.data import Examples, rows_of
from resu.integrations.finetune.masks import settle_masks, target_names
from resu.integrations.finetune.model import LoadedModel, load_for_task, settle_task
from resu.integrations.finetune.optimizers import make_optimizer, trained
from resu.integrations.finetune.prepared import Prepared, prepare, trained_values
from resu.modules.settings import RESUMode
from resu.pruning.amnesty import Amnesty, AmnestyConfig
from tests.integrations.finetune_models import directory, sentences

THETA = ["resu", "qresu", "qresu-selective"]
MASKED = ["masked", "sparse-lora", *THETA]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    above = tmp_path_factory.mktemp("models")
    return {kind: directory(above / kind, kind) for kind in ("llama", "bert", "bert-body", "gpt2")}


def config(folders: dict[str, Path], kind: str = "llama", **changes: Any) -> FinetuneConfig:
    task = {"llama": "causal-lm", "gpt2": "causal-lm"}.get(kind, "classification")
    given = {"source": folders[kind], "data": Path("x"), "task": task, "method": "resu", **changes}
    if given["method"] in MASKED and not {"mask", "sparsity", "pattern"} & set(given):
        given["sparsity"] = 0.6
    return FinetuneConfig(**given)


def loaded_for(settings: FinetuneConfig) -> LoadedModel:
    names = ["neg", "pos"] if settings.task == "classification" else []
    return load_for_task(settings.source, settings.task, names=names)


def batch_of(loaded: LoadedModel, settings: FinetuneConfig, n: int = 8) -> dict[str, torch.Tensor]:
    pairs, names = sentences(n), ["neg", "pos"]
    labels = [y for _, y in pairs] if settings.task == "classification" else None
    rows = rows_of(loaded.tokenizer, Examples([t for t, _ in pairs], labels), 24, names=names, strung=False)
    return Collator(loaded.tokenizer, settings.task)(rows)


def ready(settings: FinetuneConfig) -> tuple[LoadedModel, dict[str, SparseMask], Prepared, dict[str, torch.Tensor]]:
    """A prepared model, its masks, and the weights it had before."""
    loaded = loaded_for(settings)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    rows = rows_of(loaded.tokenizer, Examples([t for t, _ in sentences(16)]), 24, strung=False)
    masks = settle_masks(loaded, settings, rows, Collator(loaded.tokenizer, "causal-lm")) if settings.masks else {}
    targets = target_names(loaded, settings)[0]
    return loaded, masks, prepare(loaded, masks, targets, settings), before


def train(prepared: Prepared, settings: FinetuneConfig, batch: dict[str, torch.Tensor], steps: int = 4) -> None:
    own = [layer.theta for layer in prepared.self_updating if layer.theta is not None]
    optimizer = make_optimizer(trained(prepared.model, own), settings)
    prepared.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        prepared.model(**batch).loss.backward()
        optimizer.step()
    prepared.model.eval()


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return found


# -- masks -----------------------------------------------------------------------------------------------


def test_heads_embeddings_and_norms_are_no_targets(folders: dict[str, Path]) -> None:
    settings = config(folders, "bert-body")
    names, skipped = target_names(loaded_for(settings), settings)
    assert all(name.startswith("bert.") for name in names)
    assert len(names) == 2 * 6 + 1  # the pooler has weights in the source
    assert skipped["classifier.weight"] == "head of the task"
    assert skipped["bert.embeddings.word_embeddings.weight"] == "embedding"
    settings = config(folders, "llama", exclude=("*.0.*",))
    names, skipped = target_names(loaded_for(settings), settings)
    assert len(names) == 7
    assert skipped["lm_head.weight"] == "output head"


def test_a_pooler_without_weights_is_a_head(folders: dict[str, Path]) -> None:
    settings = config(folders, "bert", task="masked-lm")
    assert loaded_for(settings).new == ()
    settings = config(folders, "bert")  # a masked language model has no pooler
    loaded = loaded_for(settings)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(loaded.new)
    assert "bert.pooler.dense.weight" not in target_names(loaded, settings)[0]


def test_masks_are_exact_and_the_weakest_go(folders: dict[str, Path]) -> None:
    settings = config(folders, sparsity=0.6)
    loaded = loaded_for(settings)
    for name, mask in settle_masks(loaded, settings, [], Collator(loaded.tokenizer, "causal-lm")).items():
        weight = loaded.model.get_parameter(name).detach().abs()
        assert mask.n_pruned == int(weight.numel() * 0.6)
        assert weight[~mask.mask].max() <= weight[mask.mask].min()


@pytest.mark.parametrize(("method", "pattern"), [("wanda", None), ("fisher", None), ("magnitude", "2:4")])
def test_other_scores_and_patterns(folders: dict[str, Path], method: str, pattern: str | None) -> None:
    sparsity = None if pattern else 0.5
    settings = config(folders, prune_method=method, pattern=pattern, sparsity=sparsity)
    loaded, masks, prepared, before = ready(settings)
    assert {mask.sparsity for mask in masks.values()} == {0.5}
    if method == "wanda":
        assert all((m.mask.sum(dim=1) == m.shape[1] // 2).all() for m in masks.values())
    if pattern:
        assert all((m.mask.view(-1, 4).sum(dim=1) == 2).all() for m in masks.values())
    for name in masks:  # nothing was pruned away for good
        assert torch.equal(loaded.model.get_parameter(name), before[name])
    assert prepared.constraints == []


def test_masks_of_the_source_are_used_with_and_without_prefix(folders: dict[str, Path], tmp_path: Path) -> None:
    source = directory(tmp_path / "pruned", "bert-body")
    kept = SparseMask.random((16, 16), 0.3, torch.Generator().manual_seed(0))
    other = SparseMask.random((32, 16), 0.3, torch.Generator().manual_seed(1))
    own = {"encoder.layer.0.attention.self.query.weight": kept, "encoder.layer.1.intermediate.dense.weight": other}
    write_masks(own, source / "masks.safetensors")
    settings = config({"bert-body": source}, "bert-body", sparsity=None)
    loaded = loaded_for(settings)
    assert settle_masks(loaded, settings, [], None) == {f"bert.{name}": mask for name, mask in own.items()}  # type: ignore[arg-type]
    some = config({"bert-body": source}, "bert-body", sparsity=None, include=("*query*",))
    assert list(settle_masks(loaded, some, [], None)) == ["bert.encoder.layer.0.attention.self.query.weight"]  # type: ignore[arg-type]
    named = config(folders, "bert-body", mask=str(source / "masks.safetensors"))
    assert settle_masks(loaded, named, [], None) == settle_masks(loaded, settings, [], None)  # type: ignore[arg-type]


def test_zeros_are_a_mask_only_if_said(tmp_path: Path) -> None:
    source = directory(tmp_path / "zeros", "llama")
    settings = config({"llama": source}, sparsity=None)
    loaded = loaded_for(settings)
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[::2] = 0
    with pytest.raises(ValueError, match=r"give a sparsity, or a mask: .* has no masks.safetensors"):
        settle_masks(loaded, settings, [], None)  # type: ignore[arg-type]
    masks = settle_masks(loaded, config({"llama": source}, mask="zeros"), [], None)  # type: ignore[arg-type]
    assert torch.equal(masks["model.layers.0.mlp.up_proj.weight"].mask, weight != 0)


def test_masks_of_another_model_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    write_masks({"model.layers.0.mlp.up_proj.weight": SparseMask.random((3, 3), 0.5)}, tmp_path / "a.safetensors")
    settings = config(folders, mask=str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match=r"has shape \(3, 3\), the weight has \(32, 16\)"):
        settle_masks(loaded_for(settings), settings, [], None)  # type: ignore[arg-type]
    write_masks({"other": SparseMask.random((3, 3), 0.5)}, tmp_path / "b.safetensors")
    settings = config(folders, mask=str(tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="has no mask of a weight of this model"):
        settle_masks(loaded_for(settings), settings, [], None)  # type: ignore[arg-type]


# -- θ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert-body"])
def test_resu_starts_as_the_dense_model_and_moves_theta_alone(folders: dict[str, Path], kind: str) -> None:
    settings = config(folders, kind, learning_rate=1e-2, weight_decay=0.1)
    loaded, masks, prepared, before = ready(settings)
    batch = batch_of(loaded, settings)
    assert torch.equal(logits(prepared.model, batch), logits(loaded_for(settings).model, batch))
    train(prepared, settings, batch)
    head = ["classifier.weight", "classifier.bias"] if kind == "bert-body" else []
    pruned = sum(mask.n_pruned for mask in masks.values())
    assert trained_values(prepared) == pruned + sum(before[name].numel() for name in head)
    for name, value in loaded.model.named_parameters():
        if name in masks:
            mask = masks[name].mask
            assert torch.equal(value[mask], before[name][mask]), name
            assert not torch.equal(value[~mask], before[name][~mask]), name
        else:
            assert torch.equal(value, before[name]) == (name not in head), name
    acting = logits(prepared.model, batch)
    model, kept = prepared.finish()
    assert kept == {}
    assert torch.equal(logits(model, batch), acting)
    assert list(model.state_dict()) == list(loaded_for(settings).model.state_dict())


@pytest.mark.parametrize("method", ["qresu", "qresu-selective"])
@pytest.mark.parametrize(("bits", "theta_dtype"), [(4, None), (8, "bfloat16")])
def test_qresu_keeps_codes_and_merges_what_acted(
    folders: dict[str, Path], method: str, bits: int, theta_dtype: str | None
) -> None:
    settings = config(folders, method=method, bits=bits, theta_dtype=theta_dtype, learning_rate=1e-2)
    loaded, masks, prepared, before = ready(settings)
    batch = batch_of(loaded, settings)
    start = {name: loaded.model.get_submodule(name[:-7]).theta.detach().clone() for name in masks}
    for name, mask in masks.items():
        dtype = torch.bfloat16 if theta_dtype else torch.float32
        assert torch.equal(start[name], gather_theta(before[name], mask).to(dtype))
    names = {n for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert names == {f"{name[:-7]}.theta" for name in masks}
    train(prepared, settings, batch)
    moved = [not torch.equal(loaded.model.get_submodule(name[:-7]).theta, start[name]) for name in masks]
    assert all(moved) if method == "qresu" else any(moved)
    acting = logits(prepared.model, batch)
    thetas = {name: loaded.model.get_submodule(name[:-7]).theta.detach().clone() for name in masks}
    model, _ = prepared.finish()
    for name, mask in masks.items():
        active = mask.mask
        codes = quantize(before[name], bits, "per_channel", active)
        expected = dequantize(codes.codes, codes.scale, codes.zero)
        weight = model.get_parameter(name)
        assert torch.equal(weight[active], expected[active])
        assert torch.equal(weight[~active], thetas[name].float())
    torch.testing.assert_close(logits(model, batch), acting, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["zeros", "normal"])
def test_other_starts(folders: dict[str, Path], start: str) -> None:
    _, masks, prepared, before = ready(config(folders, theta_init=start, epsilon=0.5))
    for name, mask in masks.items():
        theta = prepared.model.get_submodule(name[:-7]).theta_values()
        if start == "zeros":
            assert not theta.any()
        else:
            sigma = before[name][mask.mask].std(correction=0)
            assert float(theta.std() / sigma) == pytest.approx(0.5, rel=0.3)


@pytest.mark.parametrize("method", ["resu", "qresu"])
@pytest.mark.parametrize("commit", ["sparse", "amnesty"])
def test_a_sparse_commit_keeps_the_count_and_the_strongest(folders: dict[str, Path], method: str, commit: str) -> None:
    settings = config(folders, method=method, commit=commit, resurrected=0.05, learning_rate=0.1)
    loaded, masks, prepared, _ = ready(settings)
    train(prepared, settings, batch_of(loaded, settings))
    acting = {name: loaded.model.get_submodule(name[:-7]).effective_weight().detach().clone() for name in masks}
    model, kept = prepared.finish()
    assert list(kept) == list(masks)
    back = sum(int((mask.mask & ~masks[name].mask).sum()) for name, mask in kept.items())
    assert prepared.notes[0].startswith(f"{back} of {sum(m.n_pruned for m in masks.values())} pruned positions came")
    assert back > 0
    for name, mask in kept.items():
        assert mask.n_active == masks[name].n_active
        weight, bits = model.get_parameter(name), mask.mask
        assert torch.equal(weight[bits], acting[name][bits])
        assert not weight[~bits].any()
        if commit == "amnesty":
            share = Amnesty(AmnestyConfig(r_start=0.05, r_end=0.05, total_cycles=1))
            assert torch.equal(bits, share.tournament(acting[name].abs(), masks[name], mask.n_active, 0))
        else:
            assert acting[name][~bits].abs().max() <= acting[name][bits].abs().min()
        assert model.get_submodule(name[:-7]).mode is RESUMode.DENSE


def test_a_sparse_commit_keeps_the_pattern(folders: dict[str, Path]) -> None:
    settings = config(folders, pattern="2:4", commit="sparse", learning_rate=0.1)
    loaded, _, prepared, _ = ready(settings)
    train(prepared, settings, batch_of(loaded, settings))
    for mask in prepared.finish()[1].values():
        assert (mask.mask.view(-1, 4).sum(dim=1) == 2).all()


def test_layers_that_cannot_hold_theta_are_named_with_what_can(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"c_attn.*Of GPT2LMHeadModel, masked and sparse-lora can train these layers"):
        ready(config(folders, "gpt2"))


# -- the others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-body"])
def test_masked_training_moves_everything_but_what_is_pruned(folders: dict[str, Path], kind: str) -> None:
    settings = config(folders, kind, method="masked", learning_rate=1e-2, weight_decay=0.1)
    loaded, masks, prepared, before = ready(settings)
    train(prepared, settings, batch_of(loaded, settings))
    model, kept = prepared.finish()
    assert kept == masks
    total = sum(p.numel() for p in model.parameters()) - sum(mask.n_pruned for mask in masks.values())
    assert trained_values(prepared) == total
    for name, value in model.named_parameters():
        if name in masks:
            assert not value[~masks[name].mask].any()
            assert not torch.equal(value[masks[name].mask], before[name][masks[name].mask])
        elif "position" not in name and "wpe" not in name and "key.bias" not in name:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-body"])
def test_lora_trains_low_ranks_and_the_head_and_merges_what_acted(folders: dict[str, Path], kind: str) -> None:
    pytest.importorskip("peft")
    settings = config(folders, kind, method="lora", rank=2, dropout=0.0, learning_rate=1e-2)
    loaded, _, prepared, before = ready(settings)
    batch = batch_of(loaded, settings)
    names = {n for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in names)
    assert any("classifier" in name for name in names) == (kind == "bert-body")
    train(prepared, settings, batch)
    acting = logits(prepared.model, batch)
    model, kept = prepared.finish()
    assert kept == {}
    assert list(model.state_dict()) == list(loaded_for(settings).model.state_dict())
    torch.testing.assert_close(logits(model, batch), acting, rtol=1e-4, atol=1e-5)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    targets = set(target_names(loaded_for(settings), settings)[0])
    assert moved == targets | ({"classifier.weight", "classifier.bias"} if kind == "bert-body" else set())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-body"])
@pytest.mark.parametrize("mode", ["sparse_to_sparse", "scale", "sparse_to_dense"])
def test_sparse_lora_keeps_the_mask_and_merges_what_acted(folders: dict[str, Path], kind: str, mode: str) -> None:
    settings = config(folders, kind, method="sparse-lora", lora_mode=mode, rank=2, dropout=0.0, learning_rate=1e-2)
    loaded, masks, prepared, before = ready(settings)
    batch = batch_of(loaded, settings)
    train(prepared, settings, batch)
    acting = logits(prepared.model, batch)
    model, kept = prepared.finish()
    assert kept == masks
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask.mask].any()
    assert list(model.state_dict()) == list(loaded_for(settings).model.state_dict())
    if mode == "sparse_to_dense":
        assert "takes away up to" in prepared.notes[0]
    else:
        torch.testing.assert_close(logits(model, batch), acting, rtol=1e-4, atol=1e-5)
        assert prepared.notes == []
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(masks) | ({"classifier.weight", "classifier.bias"} if kind == "bert-body" else set())


@pytest.mark.parametrize("method", ["resu", "qresu", "sparse-lora", "lora"])
def test_norms_biases_and_heads_train_where_asked(folders: dict[str, Path], method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    settings = config(folders, "llama", method=method, train_norms=True, train_head=True, learning_rate=1e-2)
    loaded, _, prepared, before = ready(settings)
    train(prepared, settings, batch_of(loaded, settings))
    model, _ = prepared.finish()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if "norm" in n} | {"lm_head.weight"} == moved - set(target_names(loaded, settings)[0])
    settings = config(folders, "bert-body", method=method, train_biases=True, learning_rate=1e-2)
    loaded, _, prepared, before = ready(settings)
    biases = {n for n in before if n.endswith("bias")}
    train(prepared, settings, batch_of(loaded, settings))
    model, _ = prepared.finish()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in biases if "key" not in n} <= moved  # a key's bias has no gradient: softmax takes it out


def test_what_a_model_was_made_for(folders: dict[str, Path], tmp_path: Path) -> None:
    assert settle_task("auto", folders["llama"], labelled=False) == "causal-lm"
    assert settle_task("auto", folders["bert"], labelled=False) == "masked-lm"
    assert settle_task("auto", folders["llama"], labelled=True) == "classification"
    assert settle_task("masked-lm", folders["llama"], labelled=True) == "masked-lm"
    with pytest.raises(ValueError, match="has no head for masked-lm"):
        load_for_task(folders["llama"], "masked-lm")


def test_weights_that_are_missing_in_the_body_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from resu.core.io import FileFormatError

    source = directory(tmp_path / "cut", "bert-body")
    state = load_file(source / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"lacks weights of BertForSequenceClassification.*layer.1.output.dense"):
        load_for_task(source, "classification", names=["a", "b"])
    other = directory(tmp_path / "headless", "llama")
    state = load_file(other / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"lacks weights of LlamaForCausalLM"):
        load_for_task(other, "causal-lm")

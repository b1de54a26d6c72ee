"""Perplexity counts every token once; embeddings are those of mean pooling without padding."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from resu.experiments.llama2c import GREEDY_TEXT
from resu.integrations.hf import load_model
from resu.integrations.hf_evaluate import _windows, embedding_cosine, perplexity, sentence_embeddings


@pytest.fixture(scope="module")
def loaded(stories):
    return load_model(stories)


def one_by_one(model, ids, start, scored):
    """Sum of -log p of the scored positions, given what lies from `start` on; a call per token, in float64."""
    total = 0.0
    for position in scored:
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1].double()
        total -= float(F.log_softmax(logits, dim=-1)[ids[position]])
    return total


def test_the_documented_loss(loaded, tmp_path):
    model, tokenizer = loaded
    ids = tokenizer(GREEDY_TEXT)["input_ids"][:62]
    (tmp_path / "a.txt").write_text(tokenizer.decode(ids, skip_special_tokens=True))
    found = perplexity(model, tokenizer, tmp_path / "a.txt")
    assert found.tokens == 61
    assert found.nll == pytest.approx(0.386, abs=5e-4)
    assert found.perplexity == math.exp(found.nll)


def test_every_token_counts_once_also_over_texts_of_different_length(loaded, tmp_path):
    model, tokenizer = loaded
    texts = [GREEDY_TEXT[:90], "Tom", GREEDY_TEXT[100:160]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    total = count = 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 16):
            stop = min(start + 16, len(ids))
            total += one_by_one(model, ids, start, range(start + 1, stop))
            count += stop - start - 1
    for batch_size in (1, 3):
        found = perplexity(model, tokenizer, tmp_path / "a.jsonl", length=16, batch_size=batch_size)
        assert found.tokens == count
        assert found.nll == pytest.approx(total / count, rel=1e-5)


def test_a_smaller_stride_scores_each_token_once_with_more_context(loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "a.txt").write_text(GREEDY_TEXT[:150])
    ids = tokenizer(GREEDY_TEXT[:150])["input_ids"]
    total, done = 0.0, 1
    for start in range(0, len(ids), 4):
        stop = min(start + 12, len(ids))
        total += one_by_one(model, ids, start, range(done, stop))
        done = max(done, stop)
    found = perplexity(model, tokenizer, tmp_path / "a.txt", length=12, stride=4)
    assert found.tokens == len(ids) - 1
    assert found.nll == pytest.approx(total / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 1), (8, 5), (2, 1), (2, 2), (200, 200)])
def test_windows_cover_all_and_nothing_twice(count, length, stride):
    scored = []
    for start, stop, first in _windows(count, length, stride):
        assert 0 < stop - start <= length
        assert start < first < stop
        scored += range(first, stop)
    assert len(scored) == len(set(scored))
    missing = set(range(1, count)) - set(scored)
    assert missing <= ({k for k in range(1, count) if k % length == 0} if stride == length else set())


def test_impossible_requests_are_refused(loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "a.txt").write_text("Lily")
    for length, stride in ((1, None), (8, 0), (8, 9)):
        with pytest.raises(ValueError, match="stride between"):
            perplexity(model, tokenizer, tmp_path / "a.txt", length=length, stride=stride)
    with pytest.raises(FileNotFoundError):
        perplexity(model, tokenizer, tmp_path / "b.txt")


def test_a_model_that_overflows_is_named(stories, tmp_path):
    model, tokenizer = load_model(stories)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    (tmp_path / "a.txt").write_text("Lily went home")
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, tokenizer, tmp_path / "a.txt")


def test_embeddings_do_not_depend_on_padding_or_order(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    sentences = ["a b c", "a", "c " * 40, "b b"]

    class Letters:
        sep_token_id = 2
        pad_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [[1, *(ord(w) - 90 for w in t.split()), 2] for t in texts]}

    found = sentence_embeddings(model, Letters(), sentences, length=20, batch_size=4)
    assert found.shape == (4, 16)
    for sentence, vector in zip(sentences, found, strict=True):
        ids = Letters()([sentence])["input_ids"][0]
        ids = [*ids[:19], 2] if len(ids) > 20 else ids
        with torch.no_grad():
            pooled = model(input_ids=torch.tensor([ids])).last_hidden_state.mean(dim=1)
        assert torch.allclose(vector, F.normalize(pooled, dim=-1)[0], atol=1e-6)
    assert embedding_cosine(found, found) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no sentences"):
        sentence_embeddings(model, Letters(), [])

"""Files, labels, batches and the evaluation of fine-tuning, against plain restatements."""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from resu.integrations.finetune.batches import IGNORED, Collator, mask_tokens
from resu.integrations.finetune.data import Examples, has_labels, label_names, read_examples, rows_of, split
from resu.integrations.finetune.evaluate import evaluate
from resu.integrations.finetune.model import load_for_task
from tests.integrations.finetune_models import directory, labelled_file, sentences, text_file, tokenizer

PAIRS = Examples(["a good film", 'it, "is" dull'], ["1", "0"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", '1 a good film\n\n0 it, "is" dull\n'),
        ("a.all", '1 a good film\r\n0 it, "is" dull'),
        ("a.csv", 'id,label,text\n7,1,a good film\n8,0,"it, ""is"" dull"\n'),
        ("a.CSV", 'a good film,1\n"it, ""is"" dull", 0\n'),
        ("a.tsv", 'text\tlabel\na good film\t1\n"it, ""is"" dull"\t0\n'),
        ("a.jsonl", '{"text": "a good film", "label": 1}\n\n{"label": "0", "text": "it, \\"is\\" dull"}\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_labelled_files(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    path = tmp_path / (name + (".xz" if packed else ""))
    path.write_bytes(lzma.compress(content.encode()) if packed else content.encode())
    assert read_examples(path, labelled=True) == PAIRS
    assert has_labels(path) == (not name.startswith(("a.txt", "a.all")))


def test_a_quoted_field_may_run_over_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"two\nlines",x\nplain,y\n')
    assert read_examples(tmp_path / "a.csv", labelled=True).texts == ["two\nlines", "plain"]


def test_unlabelled_files_and_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9 one\n\ntwo\n".encode("latin-1"))
    assert read_examples(tmp_path / "a.txt", labelled=False, lines=True, encoding="latin-1").texts == [
        "café one",
        "two",
    ]
    with pytest.raises(ValueError, match=r"a.txt is no UTF-8 text"):
        read_examples(tmp_path / "a.txt", labelled=False)
    with pytest.raises(ValueError, match=r"unknown encoding 'klingon'"):
        read_examples(tmp_path / "a.txt", labelled=False, encoding="klingon")


def test_the_sentence_sets_of_the_data_folder(data_folder) -> None:
    folder = data_folder("sentence_classification")
    train = read_examples(folder / "stsa.binary.train.xz", labelled=True)
    assert (len(train), Counter(train.labels)) == (6920, Counter({"1": 3610, "0": 3310}))
    trec = read_examples(folder / "TREC.train.all.xz", labelled=True, encoding="latin-1")
    assert (len(trec), len(label_names(trec.labels or []))) == (5452, 6)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "1 fine\nlonely\n", r"line 2 of .*a.txt is no label, space and text: 'lonely'"),
        ("a.jsonl", '{"text": "x"}', r'line 1 of .* is not like \{"text": "…", "label": "…"\}'),
        ("a.jsonl", "{", r"line 1 of .* is no JSON"),
        ("a.csv", "only one\n", r"line 1 of .* has no text and label"),
        ("a.csv", "sentence,label\nx,1\n", r"the columns of .* are sentence, label; they must be named text and label"),
        ("a.csv", 'x,"y\n', r"line 1 of .* cannot be read"),
        ("a.txt", "\n", r"a.txt holds no text"),
        ("a.txt.xz", "not xz", r"is damaged, or no xz"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        read_examples(tmp_path / name, labelled=True)


def test_labels_keep_a_models_order_or_have_their_own() -> None:
    assert label_names(["b", "a"], {"LABEL_0": 0, "LABEL_1": 1}) == ["a", "b"]
    assert label_names(["b"], {"c": 1, "b": 0}) == ["b", "c"]
    assert label_names(["10", "-1", "2"]) == ["-1", "2", "10"]
    with pytest.raises(ValueError, match="the data has one label only, 'x'"):
        label_names(["x", "x"])


def test_split_is_a_partition_by_seed() -> None:
    examples = Examples([str(i) for i in range(50)], [str(i % 3) for i in range(50)])
    train, held = split(examples, 0.2, seed=3)
    assert (len(train), len(held)) == (40, 10)
    assert sorted([*train.texts, *held.texts], key=int) == examples.texts
    assert all(
        int(t) % 3 == int(label) for part in (train, held) for t, label in zip(part.texts, part.labels, strict=True)
    )
    assert split(examples, 0.2, seed=3) == (train, held)
    assert split(examples, 0.2, seed=4) != (train, held)
    with pytest.raises(ValueError, match="1 samples are too few"):
        split(examples.take([0]), 0.5, 0)


def test_masked_tokens_are_chosen_and_replaced_as_in_the_paper() -> None:
    ids = torch.arange(5, 25).repeat(2000)
    special = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(1)) < 0.2
    inputs, labels = mask_tokens(ids, special, 4, 25, torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    assert not (chosen & special).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    share = chosen.sum() / (~special).sum()
    replaced = (inputs[chosen] == 4).double().mean()
    other = ((inputs[chosen] != 4) & (inputs[chosen] != ids[chosen])).double().mean()
    assert abs(share - 0.15) < 0.01
    assert abs(replaced - 0.8) < 0.02
    assert abs(other - 0.1 * 24 / 25) < 0.02
    assert int(inputs.max()) < 25
    for seed in range(20):  # a short text has one masked token at least
        _, labels = mask_tokens(
            torch.tensor([5, 6]), torch.tensor([True, False]), 4, 25, torch.Generator().manual_seed(seed)
        )
        assert labels.tolist() == [IGNORED, 6]


def test_batches_depend_on_seed_epoch_and_sample_alone() -> None:
    words = tokenizer(encoder=True)
    rows = rows_of(words, Examples([text for text, _ in sentences(6)]), 16, strung=False)
    one = Collator(words, "masked-lm", seed=1, epoch=2)(rows)
    again = Collator(words, "masked-lm", seed=1, epoch=2)(rows[::-1])
    for name in one:
        assert torch.equal(one[name], again[name].flip(0))
    other = Collator(words, "masked-lm", seed=1, epoch=3)(rows)
    assert not torch.equal(one["labels"], other["labels"])
    special = torch.isin(one["input_ids"], torch.tensor([0, 2, 3])) & (one["labels"] == IGNORED)
    assert special.any()
    assert not torch.isin(one["labels"], torch.tensor([0, 2, 3])).any()
    with pytest.raises(ValueError, match="no mask token"):
        Collator(tokenizer(encoder=False), "masked-lm")


def test_strung_texts_are_cut_and_nothing_is_padded() -> None:
    words = tokenizer(encoder=False)
    texts = [text for text, _ in sentences(9)]
    rows = rows_of(words, Examples(texts), 8, strung=True)
    every = [i for text in texts for i in words(text)["input_ids"]]
    assert [i for row in rows for i in row["input_ids"]] == every[: len(every) // 8 * 8]
    assert {len(row["input_ids"]) for row in rows} == {8}
    short = rows_of(words, Examples(["the film"]), 8, strung=True)
    assert [len(row["input_ids"]) for row in short] == [2]
    with pytest.raises(ValueError, match="fewer than two tokens"):
        rows_of(words, Examples(["film"]), 8, strung=True)


def test_unknown_labels_are_named() -> None:
    with pytest.raises(ValueError, match="labels that the training data does not have: q; it has x, y"):
        rows_of(tokenizer(encoder=True), Examples(["a film"], ["q"]), 8, names=["x", "y"], strung=False)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_accuracy_is_that_of_samples_one_by_one(tmp_path: Path, kind: str) -> None:
    loaded = load_for_task(directory(tmp_path / kind, kind), "classification", names=["neg", "pos"])
    pairs = sentences(21)
    rows = rows_of(
        loaded.tokenizer, Examples([t for t, _ in pairs], [y for _, y in pairs]), 32, names=["neg", "pos"], strung=False
    )
    found = evaluate(loaded.model, rows, Collator(loaded.tokenizer, "classification"), 4)
    losses, right = [], 0
    for row in rows:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits
        losses.append(float(F.cross_entropy(logits, torch.tensor([row["labels"]]))))
        right += int(logits.argmax()) == row["labels"]
    assert found["accuracy"] == right / 21
    assert found["loss"] == pytest.approx(sum(losses) / 21, rel=1e-5)
    assert found["count"] == 21


def test_perplexity_is_that_of_pieces_one_by_one(tmp_path: Path) -> None:
    loaded = load_for_task(directory(tmp_path / "llama", "llama"), "causal-lm")
    texts = read_examples(text_file(tmp_path / "a.txt", 12), labelled=False)
    rows = rows_of(loaded.tokenizer, texts, 8, strung=True)
    found = evaluate(loaded.model, rows, Collator(loaded.tokenizer, "causal-lm"), 3)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            total += float(F.cross_entropy(loaded.model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
    assert found["count"] == 7 * len(rows)
    assert found["perplexity"] == pytest.approx(math.exp(total / found["count"]), rel=1e-5)


def test_the_evaluation_of_masked_tokens_is_the_same_each_time(tmp_path: Path) -> None:
    loaded = load_for_task(directory(tmp_path / "bert", "bert"), "masked-lm")
    rows = rows_of(loaded.tokenizer, Examples([t for t, _ in sentences(10)]), 32, strung=False)
    collator = Collator(loaded.tokenizer, "masked-lm", epoch=5)
    first = evaluate(loaded.model, rows, collator, 4)
    assert evaluate(loaded.model, rows, collator, 3) == pytest.approx(first, rel=1e-5)
    assert collator.epoch == 5
    loaded.model.train()
    evaluate(loaded.model, rows, collator, 4)
    assert loaded.model.training


def test_json_lines_say_by_themselves_whether_they_have_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n")
    assert not has_labels(path)
    assert not has_labels(labelled_file(tmp_path / "b.txt"))

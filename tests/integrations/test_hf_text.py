"""Calibration text: what is drawn, how it is cut and padded, and what is refused."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from resu.integrations.hf_text import calibration_batches, cut_text, default_length, read_texts


class Words:
    """A tokenizer of words: `<s>` (1) in front, `</s>` (2) behind for encoders; the ids are those of the words."""

    model_max_length = 10**30
    pad_token_id = 0

    def __init__(self, closing=False):
        self.sep_token_id = 2 if closing else None
        self.closing = closing
        self.words = {}

    def __call__(self, texts, **_):
        ids = [[1, *(self.words.setdefault(w, len(self.words) + 3) for w in text.split())] for text in texts]
        return {"input_ids": [[*row, 2] if self.closing else row for row in ids]}


@pytest.fixture
def write(tmp_path):
    def call(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return call


def rows(batches):
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_a_text_is_cut_into_pieces_and_drawn_without_repetition(write):
    file = write("a.txt", " ".join(f"w{i}" for i in range(101)))
    stream = [1, *range(3, 104)]
    pieces = {tuple(stream[at : at + 10]) for at in range(0, 100, 10)}
    found = rows(calibration_batches(Words(), file, samples=10, length=10, seed=3, batch_size=4))
    assert len(found) == 10
    assert set(found) == pieces
    few = rows(calibration_batches(Words(), file, samples=4, length=10, seed=3))
    assert few == found[:4]
    assert rows(calibration_batches(Words(), file, samples=10, length=10, seed=4)) != found


def test_texts_of_a_jsonl_are_strung_together_each_with_its_own_beginning(write):
    file = write("a.jsonl", "\n".join(json.dumps({"text": f"a{i} b{i} c{i}"}) for i in range(8)) + "\n\n")
    found = rows(calibration_batches(Words(), file, samples=16, length=2, seed=0))
    assert len(found) == 16
    assert sum(row[0] == 1 for row in found) == 8


def test_lines_are_samples_of_their_own_and_padding_is_marked(write):
    file = write("a.txt", "one\n\n two three \nfour five six\n" + "long " * 30 + "\n")
    batches = calibration_batches(Words(closing=True), file, samples=4, length=6, lines=True, batch_size=2)
    assert sorted(map(len, rows(batches))) == [3, 4, 5, 6]
    assert all(row[0] == 1 and row[-1] == 2 for row in rows(batches))
    assert [b["input_ids"].shape[1] for b in batches] == [4, 6]
    for batch in batches:
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_a_file_that_is_too_short_says_how_much_it_has(write):
    file = write("a.txt", "a b c d e f g")
    with pytest.raises(ValueError, match=r"too short: 5 samples are asked for, it has 2 pieces of 4 tokens"):
        calibration_batches(Words(), file, samples=5, length=4)
    with pytest.raises(ValueError, match=r"it has 1 texts"):
        calibration_batches(Words(), file, samples=2, lines=True)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}, {"batch_size": 0}])
def test_impossible_numbers_are_refused(write, wrong):
    with pytest.raises(ValueError, match="or more"):
        calibration_batches(Words(), write("a.txt", "a b c"), **wrong)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{', "line 2 .* no JSON"),
        ("a.jsonl", '{"txt": "x"}', 'line 1 .* no "text"'),
        ("a.jsonl", "[1]", 'no "text"'),
        ("a.txt", " \n\n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
    ],
)
def test_files_that_hold_no_text_are_refused(write, name, content, says):
    with pytest.raises(ValueError, match=says):
        read_texts(write(name, content))


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_texts(tmp_path / "absent.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8"):
        read_texts(tmp_path / "b.txt")


def test_a_text_longer_than_the_model_draws_no_warning(stories, write):
    from resu.integrations.hf import load_tokenizer

    tokenizer = load_tokenizer(stories)
    assert default_length(tokenizer) == 512
    batches = calibration_batches(tokenizer, write("a.txt", "Lily went to the park. " * 400), samples=3)
    assert batches[0]["input_ids"].shape == (3, 512)


def test_default_length_is_the_smallest_limit():
    class Model:
        class config:
            max_position_embeddings = 77

    assert default_length(Words()) == 2048
    assert default_length(Words(), Model) == 77


def test_a_cut_text_keeps_its_closing_token():
    assert cut_text(Words(closing=True), [1, 5, 6, 7, 2], 3) == [1, 5, 2]
    assert cut_text(Words(), [1, 5, 6, 7], 3) == [1, 5, 6]
    assert cut_text(Words(), [1, 5], 3) == [1, 5]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 100_000, r"line 2 of .* is no JSON"),
        ("1" * 5000, r"line 2 of .* is no JSON"),
        ('{"text": "\\ud800 half"}', r"line 2 of .* surrogate"),
    ],
)
def test_input_odd_json_is_refused_by_its_line(write, line, says):
    with pytest.raises(ValueError, match=says):
        read_texts(write("a.jsonl", '{"text": "one"}\n' + line + "\n"))


def test_input_folders_and_texts_in_utf16(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; give a \.txt"):
        read_texts(tmp_path)
    (tmp_path / "a.txt").write_bytes("hello".encode("utf-16-le"))
    with pytest.raises(ValueError, match="no UTF-8 text: it holds NUL"):
        read_texts(tmp_path / "a.txt")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}', encoding="utf-8-sig")
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == ["hello"]

"""stories260K through Hugging Face says what llama2.c documents, character for character."""

import struct

import numpy as np
import pytest
import torch

from resu.core.io import FileFormatError
from resu.experiments.data import DataError
from resu.experiments.llama2c import GREEDY_TEXT, read_checkpoint, read_pieces, write_hf_directory


@pytest.fixture(scope="module")
def stories(data_folder, tmp_path_factory):
    pytest.importorskip("transformers")
    return write_hf_directory(data_folder("model_stories260K"), tmp_path_factory.mktemp("hf") / "stories")


@pytest.fixture(scope="module")
def loaded(stories):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)


def test_greedy_text_is_the_documented_one(loaded):
    model, tokenizer = loaded
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=260, do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(GREEDY_TEXT)
    own = tokenizer(GREEDY_TEXT)["input_ids"]
    assert own == ids[: len(own)].tolist()


def test_loss_on_the_first_61_tokens_is_the_documented_one(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(GREEDY_TEXT)["input_ids"][:62]])
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) == pytest.approx(0.386, abs=5e-4)


def test_ties_and_grouped_heads_survive(loaded, stories):
    from safetensors import safe_open

    model, _ = loaded
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)
    with safe_open(stories / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("text", ["héllo  ☃ x", "a\nb", " leading", "", "\t<s>"])
def test_any_text_comes_back(loaded, text):
    _, tokenizer = loaded
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False).lstrip(" ") == text.lstrip(" ")


def merge_by_score(text, pieces, scores):
    """llama2.c's encoder, restated: single characters, then always the adjacent pair of the best score."""
    index = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    tokens = []
    for char in " " + text:
        raw = char.encode()
        tokens += [index[raw]] if raw in index else [3 + byte for byte in raw]
    while True:
        best = None
        for at in range(len(tokens) - 1):
            merged = index.get(pieces[tokens[at]] + pieces[tokens[at + 1]])
            if merged is not None and (best is None or scores[merged] > best[0]):
                best = (scores[merged], at, merged)
        if best is None:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


@pytest.mark.parametrize(
    "text", [GREEDY_TEXT, "The quick brown fox jumps over 13 lazy dogs!?", "naïve ☃ café", "  two  spaces\n\n"]
)
def test_tokens_are_those_of_the_encoder_of_llama2c(loaded, data_folder, text):
    pieces, scores = read_pieces(data_folder("model_stories260K") / "tok512.bin", 512)
    assert loaded[1](text, add_special_tokens=False)["input_ids"] == merge_by_score(text, pieces, scores)


def test_an_untied_checkpoint_has_an_output_layer(tmp_path):
    dim, hidden, layers, heads, kv, vocab, seq = 8, 12, 2, 2, 1, 5, 4
    count = (
        2 * vocab * dim + layers * (2 * dim + 2 * dim * dim + 2 * dim * dim // 2 + 3 * dim * hidden) + dim + 2 * seq * 2
    )
    values = np.arange(count, dtype=np.float32)
    file = tmp_path / "m.bin"
    file.write_bytes(struct.pack("<7i", dim, hidden, layers, heads, kv, -vocab, seq) + values.tobytes())
    found = read_checkpoint(file)
    assert found.config["tie_word_embeddings"] is False
    assert torch.equal(found.state_dict["lm_head.weight"].flatten(), torch.from_numpy(values[-vocab * dim :]))
    # Rows of the first head: 0 1 2 3 become 0 2 1 3.
    first = vocab * dim + layers * dim
    rows = torch.from_numpy(values[first : first + dim * dim]).view(dim, dim)
    assert torch.equal(found.state_dict["model.layers.0.self_attn.q_proj.weight"], rows[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_damaged_files_are_refused(data_folder, tmp_path):
    source = data_folder("model_stories260K")
    with pytest.raises(DataError, match=r"stories260K\.bin is absent"):
        write_hf_directory(tmp_path, tmp_path / "out")
    whole, bad = (source / "stories260K.bin").read_bytes(), tmp_path / "bad.bin"
    for damaged, says in ((whole[:-4], "implies"), (whole[:9], "too short"), (b"\xff" * 64, "impossible sizes")):
        bad.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=says):
            read_checkpoint(bad)
    pieces = (source / "tok512.bin").read_bytes()
    for damaged, says in ((pieces[:-1], "truncated"), (pieces[:3000], "truncated"), (pieces + b"x", "no llama2.c")):
        bad.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=says):
            read_pieces(bad, 512)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").touch()
    with pytest.raises(FileExistsError, match="already"):
        write_hf_directory(source, taken)

import gzip
import io
import lzma
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from resu.experiments.data import (
    DataError,
    Images,
    Split,
    Text,
    find_folder,
    load,
    load_cifar10,
    load_fashion_mnist,
    load_text,
    read_cifar_binary,
    read_cifar_jpeg,
    read_cifar_pickle,
    read_idx,
)
from resu.experiments.data.pickled import parse_pickle
from resu.experiments.data.tokens import encode_words


def idx(array, code=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def write_fashion(folder, pixels, labels=None):
    labels = (np.arange(12) % 10).astype(np.uint8) if labels is None else labels
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


# -- folders ------------------------------------------------------------------------------------------


def test_folder_comes_from_the_argument_then_the_environment_then_the_default(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    assert find_folder("x", tmp_path) == tmp_path / "x"
    assert find_folder("y", tmp_path / "x") == tmp_path / "x"
    monkeypatch.setenv("RESU_DATA", str(tmp_path))
    assert find_folder("x") == tmp_path / "x"
    with pytest.raises(DataError, match=r"no data for 'y'.*RESU_DATA"):
        find_folder("y")
    monkeypatch.delenv("RESU_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the default; set RESU_DATA"):
        find_folder("x")
    with pytest.raises(DataError, match="is not a folder"):
        find_folder("x", tmp_path / "no")


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown data set 'mnst'.*fashion-mnist"):
        load("mnst")


# -- IDX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_idx_of_every_type_plain_and_gzipped(tmp_path, code, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    (tmp_path / "a").write_bytes(idx(array, code))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array, code)))
    for name in ("a", "a.gz"):
        found = read_idx(tmp_path / name)
        assert found.shape == (2, 3, 4)
        assert found.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "nothing"),
        (b"GIF89a", "is not an IDX file"),
        (b"\0\0\x07\x01" + bytes(5), "is not an IDX file"),
        (b"\0\0\x08\x00", "is not an IDX file"),
        (b"\0\0\x08\x03\0\0\0\x01", "cut short"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"header \(shape \(2, 3\)\) needs 18"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "has 19 bytes"),
    ],
)
def test_broken_idx_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "f")


def test_broken_compression_and_missing_files(tmp_path, pixels):
    (tmp_path / "f.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a gz file"):
        read_idx(tmp_path / "f.gz")
    (tmp_path / "f.gz").write_bytes(gzip.compress(idx(pixels))[:-20])
    with pytest.raises(DataError, match="cut short"):
        read_idx(tmp_path / "f.gz")
    with pytest.raises(DataError, match="cannot read"):
        read_idx(tmp_path / "absent")
    with pytest.raises(DataError, match=r"none of train-images-idx3-ubyte\.gz, train-images-idx3-ubyte is in"):
        load_fashion_mnist(tmp_path)


def test_fashion_mnist_splits_every_image_once(tmp_path, pixels):
    data = load_fashion_mnist(write_fashion(tmp_path, pixels))
    assert len(data.train) == 10
    assert len(data.val) == 2
    both = torch.cat([data.train.x, data.val.x]).flatten(1)
    assert sorted(both.tolist()) == sorted(pixels.reshape(12, -1).tolist())
    index = pixels.reshape(12, -1).tolist().index(data.train.x[0].flatten().tolist())
    assert data.train.y[0] == index % 10


@pytest.mark.parametrize("labels", [np.arange(11, dtype=np.uint8), np.full(12, 10, np.uint8)])
def test_fashion_mnist_labels_must_fit(tmp_path, pixels, labels):
    write_fashion(tmp_path, pixels, labels)
    with pytest.raises(DataError, match=r"12 train images|label is 10"):
        load_fashion_mnist(tmp_path)


# -- CIFAR-10 -----------------------------------------------------------------------------------------


@pytest.fixture
def cifar():
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (4, 3072), dtype=np.uint8), [3, 9, 0, 5]


def binary(x, y):
    return np.concatenate([np.array(y, np.uint8)[:, None], x], axis=1).tobytes()


def jpeg_npz(path, x, y):
    from PIL import Image

    bodies = []
    for image in x:
        buffer = io.BytesIO()
        Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, "JPEG", quality=75)
        bodies.append(buffer.getvalue())
    header = os.path.commonprefix(bodies)  # noqa: RUF071
    rest = [body[len(header) :] for body in bodies]
    arrays = {
        "header": np.frombuffer(header, np.uint8),
        "body": np.frombuffer(b"".join(rest), np.uint8),
        "offsets": np.cumsum([0, *map(len, rest)]),
        "labels": np.array(y, np.uint8),
    }
    np.savez(path, **arrays)
    return arrays


def test_binary_batch(tmp_path, cifar):
    x, y = cifar
    (tmp_path / "b.bin").write_bytes(binary(x, y))
    split = read_cifar_binary(tmp_path / "b.bin")
    assert split.y.tolist() == y
    assert torch.equal(split.x, torch.from_numpy(x).view(4, 3, 32, 32))
    (tmp_path / "b.bin").write_bytes(binary(x, y)[:-1])
    with pytest.raises(DataError, match="not a whole number of CIFAR-10 records"):
        read_cifar_binary(tmp_path / "b.bin")
    (tmp_path / "b.bin").write_bytes(binary(x, [3, 10, 0, 5]))
    with pytest.raises(DataError, match=r"labels 0\.\.10"):
        read_cifar_binary(tmp_path / "b.bin")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_python_batch_of_every_protocol_is_read_without_unpickling(tmp_path, cifar, protocol, monkeypatch):
    x, y = cifar
    batch = {b"batch_label": b"training batch 1 of 5", b"data": x, b"labels": y, b"filenames": [b"a.png"] * 4}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol))

    def refuse(*args, **kwargs):
        raise AssertionError("the file was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    split = read_cifar_pickle(tmp_path / "data_batch_1")
    assert split.y.tolist() == y
    assert torch.equal(split.x, torch.from_numpy(x).view(4, 3, 32, 32))


def test_python_batch_as_python_2_wrote_it(tmp_path, cifar):
    x, y = cifar
    # The opcodes of the official files: numpy's reconstruction from a Python 2 string.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01(cnumpy\nndarray\nq\x02K\x00\x85U\x01btRq\x03"
        b"(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
    content = b"\x80\x02}q\x00(U\x04data" + array + b"U\x06labels" + labels + b"u."
    (tmp_path / "data_batch_1").write_bytes(content)
    split = read_cifar_pickle(tmp_path / "data_batch_1")
    assert split.y.tolist() == y
    assert torch.equal(split.x.flatten(1), torch.from_numpy(x))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/resu-was-here",)


@pytest.mark.parametrize("value", [Evil(), [Evil()], {"a": Evil()}, np.array([Evil()]), np.dtype("O"), {1, 2}])
def test_a_pickle_that_wants_to_run_something_is_refused(value):
    with pytest.raises(DataError):
        parse_pickle(pickle.dumps(value, 2))


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x02.", b"\x80\x02}q\x00", b"\x80\x02h\x05.", b"(.", b"N0."]
)
def test_a_broken_pickle_is_a_data_error(content):
    with pytest.raises(DataError, match="batch file"):
        parse_pickle(content, "batch file")


def test_every_cut_of_a_pickle_is_a_data_error(cifar):
    content = pickle.dumps({b"data": cifar[0][:1, :20].copy(), b"labels": [1]}, 2)
    for length in range(len(content)):
        with pytest.raises(DataError):
            parse_pickle(content[:length])


@pytest.mark.parametrize(
    "batch",
    [
        [1],
        {"labels": [1]},
        {"data": np.zeros((1, 3072), "f4"), "labels": [1]},
        {"data": np.zeros((1, 9), "u1")},
    ],
)
def test_a_pickle_that_is_no_batch(tmp_path, batch):
    (tmp_path / "b").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(DataError, match=r"no CIFAR-10 batch|expected uint8"):
        read_cifar_pickle(tmp_path / "b")


def test_packed_jpeg(tmp_path, cifar):
    pytest.importorskip("PIL")
    flat = np.repeat(np.array([[20], [90], [160], [230]], np.uint8), 3072, axis=1)  # JPEG keeps flat images
    arrays = jpeg_npz(tmp_path / "a.npz", flat, cifar[1])
    split = read_cifar_jpeg(tmp_path / "a.npz")
    assert split.y.tolist() == cifar[1]
    assert (split.x.int() - torch.from_numpy(flat).view(4, 3, 32, 32).int()).abs().max() <= 1
    for change, message in [
        ({"body": arrays["body"][:-3]}, "offsets do not fit"),
        ({"labels": arrays["labels"][:-1]}, "offsets do not fit"),
        ({"header": arrays["header"][:3]}, "image 0 cannot be decoded"),
    ]:
        np.savez(tmp_path / "b.npz", **(arrays | change))
        with pytest.raises(DataError, match=message):
            read_cifar_jpeg(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", header=arrays["header"])
    with pytest.raises(DataError, match="lacks an array"):
        read_cifar_jpeg(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable npz"):
        read_cifar_jpeg(tmp_path / "d.npz")


def test_an_npz_with_pickled_objects_is_refused(tmp_path):
    pytest.importorskip("PIL")
    np.savez(tmp_path / "a.npz", header=np.array([Evil()], dtype=object))
    with pytest.raises(DataError, match="not a readable npz"):
        read_cifar_jpeg(tmp_path / "a.npz")


@pytest.mark.parametrize("form", ["binary", "python", "archive"])
def test_cifar_folder_in_each_form(tmp_path, cifar, form):
    x, y = cifar
    folder = tmp_path / "cifar-10-batches-py" if form == "archive" else tmp_path
    folder.mkdir(exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(binary(x, y))
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y}, 2))
    data = load_cifar10(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 4)


def test_no_cifar_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"looked for data_batch_1\.bin, data_batch_1 and"):
        load_cifar10(tmp_path)


# -- text ---------------------------------------------------------------------------------------------


def test_text_plain_and_compressed(tmp_path):
    text = "the quick brown fox; äß €. " * 40
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    (tmp_path / "t.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("t.txt", "t.txt.xz"):
        data = load_text(tmp_path / name, context=8)
        whole = torch.cat([data.train, data.val, data.test]).tolist()
        assert "".join(data.symbols[i] for i in whole) == text
        assert len(data.test) == len(text) - int(0.9 * len(text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\xff" * 100, "not UTF-8"),
        (b"short", "at least"),
        ("".join(map(chr, range(300, 700))).encode() * 10, "400 different characters"),
    ],
)
def test_broken_text(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / "t", context=8)


# -- batches ------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    x = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split = Split(x, torch.arange(10))
    return Images("tiny", split, split, split, 10, mean=(0.0,), std=(1.0,), scale=1.0)


def test_image_batches_follow_the_seed_and_cover_each_pass_once(images):
    first = [y.tolist() for _, y in images.batches(0, 3, 6)]
    assert first == [y.tolist() for _, y in images.batches(0, 3, 6)]
    assert first != [y.tolist() for _, y in images.batches(1, 3, 6)]
    for each in (first[:3], first[3:]):
        seen = [label for labels in each for label in labels]
        assert len(set(seen)) == len(seen) == 9
    for x, y in images.batches(0, 3, 6):
        assert x.flatten().tolist() == y.tolist()


def test_batch_size_must_fit(images):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        next(images.batches(0, 11, 1))
    with pytest.raises(ValueError, match="do not fit"):
        Split(torch.zeros(3), torch.zeros(2))


def test_scaling_is_per_channel_and_leaves_the_data_as_it_was():
    x = torch.full((2, 2, 1, 1), 255, dtype=torch.uint8)
    data = Images("x", *[Split(x, torch.zeros(2))] * 3, 2, mean=(0.5, 0.0), std=(0.5, 2.0))
    torch.testing.assert_close(data.scaled(x)[0].flatten(), torch.tensor([1.0, 0.5]))
    assert (x == 255).all()


def test_text_windows_are_shifted_by_one():
    tokens = torch.arange(200, dtype=torch.uint8)
    data = Text("t", tokens, tokens, tokens, "x", context=8, evaluation_windows=5)
    for x, y in data.batches(0, 4, 3):
        assert x.shape == (4, 8)
        assert torch.equal(x + 1, y)
    windows = torch.cat([x for x, _ in data.evaluation("test")])
    assert windows.shape == (5, 8)
    assert len({row[0].item() for row in windows}) == 5


# -- the real files -----------------------------------------------------------------------------------


def test_real_fashion_mnist(data_folder):
    data = load_fashion_mnist(data_folder("fashion_mnist"))
    assert (len(data.train), len(data.val), len(data.test)) == (50_000, 10_000, 10_000)
    assert torch.bincount(torch.cat([data.train.y, data.val.y])).tolist() == [6000] * 10
    x = data.scaled(data.train.x[:5000])
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02


def test_real_packed_cifar10_test_part(cifar_test):
    assert cifar_test.x.shape == (10_000, 3, 32, 32)
    assert torch.bincount(cifar_test.y).tolist() == [1000] * 10


def test_real_tinyshakespeare(data_folder):
    data = load("tinyshakespeare", data_folder("tinyshakespeare"))
    assert isinstance(data, Text)
    assert data.classes == 65
    assert len(data.train) + len(data.val) + len(data.test) == 1_115_394
    assert "".join(data.symbols[i] for i in data.train[:14].tolist()) == "First Citizen:"


def test_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert isinstance(data, Images)
    assert (len(data.train), len(data.val), len(data.test)) == (1257, 180, 360)
    assert data.train.x.max() == 16


# -- words, and texts in several files -----------------------------------------------------------------


def test_words_are_counted_in_the_training_part_alone():
    numbers, words = encode_words(["b a b <unk> c\nc b d\n", "a d\n", "e c"], vocabulary=4)
    assert words == ("<unk>", "b", "c", "<eos>")  # three times, twice, twice; c comes before <eos>
    assert [part.tolist() for part in numbers] == [[1, 0, 1, 0, 2, 3, 2, 1, 0, 3], [0, 0, 3], [0, 2]]
    with pytest.raises(DataError, match="vocabulary must be at least 2"):
        encode_words(["a"], vocabulary=1)


def text_folder(path, **parts):
    path.mkdir()
    for name, text in parts.items():
        (path / f"my.{name}.txt").write_text(text)
    return path


def test_a_text_folder_has_a_file_for_each_part(tmp_path):
    folder = text_folder(tmp_path / "poems", train="ab" * 50, valid="ba" * 20, test="bc" * 20)
    data = load("text", folder, context=4)
    assert (data.name, data.symbols, data.context, data.shape) == ("poems", "abc", 4, (4,))
    assert data.train.tolist() == [0, 1] * 50
    assert data.val.tolist() == [1, 0] * 20
    assert data.test.tolist() == [1, 2] * 20
    # All of it but the last window, after which no symbol comes.
    assert torch.cat([x for x, _ in data.evaluation("test")]).flatten().tolist() == [1, 2] * 18
    folder = text_folder(tmp_path / "w", train="a b " * 50, dev="b a " * 20, test="c a " * 20)
    words = load("text", folder, level="word", context=4)
    assert words.symbols == ("<unk>", "a", "b")
    assert words.test.tolist() == [0, 1] * 20


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"train": "a", "test": "b"},
            "needs one text file with valid or val or dev in its name, got 0 among my.test.txt",
        ),
        ({"train": "a", "valid": "b", "dev": "b", "test": "c"}, "got 2 among"),
        ({"train": "ab" * 99, "valid": "b", "test": "ab" * 99}, "the val part of .* has 1 symbols; a window needs 65"),
        ({}, "among no text files"),
    ],
)
def test_what_is_wrong_with_a_text_folder_is_said(tmp_path, parts, said):
    with pytest.raises(DataError, match=said):
        load("text", text_folder(tmp_path / "t", **parts))


def test_a_text_needs_a_place(tmp_path):
    with pytest.raises(DataError, match=r"needs data\.dir"):
        load("text")
    with pytest.raises(DataError, match="it is neither a file nor a folder"):
        load("text", tmp_path / "none")
    with pytest.raises(DataError, match=r"context must be at least 1"):
        load("text", text_folder(tmp_path / "t", train="a", valid="a", test="a"), context=0)


def test_real_war_and_peace(data_folder):
    data = load("war-and-peace", data_folder("war_and_peace"))
    assert (len(data.symbols), data.symbols[0]) == (10_000, "<unk>")
    counts = torch.bincount(data.train, minlength=10_000)
    assert counts[1:].diff().max() <= 0, "the vocabulary is in the order of frequency"
    with lzma.open(data_folder("war_and_peace") / "wap.test.txt.xz", "rt", encoding="utf-8") as file:
        words = file.read().replace("\n", " <eos> ").split()
    assert len(data.test) == len(words)
    spelled = [data.symbols[number] for number in data.test[:2000].tolist()]
    assert all(a in (b, "<unk>") for a, b in zip(spelled, words, strict=False))
    assert 0.02 < float((data.test == 0).float().mean()) < 0.12


def test_real_wikitext_has_the_standard_counts(data_folder):
    folder = data_folder("wikitext2_valid_test_only")
    data = load("text", folder / "test.txt.xz", level="word")
    assert sum(len(part) for part in (data.train, data.val, data.test)) == pytest.approx(245_569, abs=4)  # cut twice
    with pytest.raises(DataError, match="with train in its name, got 0"):
        load("text", folder, level="word")

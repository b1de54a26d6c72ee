"""Images in class folders: which files make which part, what is cut out of them, and what is wrong with a folder."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from resu.experiments.data import DataError, load
from resu.experiments.data.image_folder import _middle, _random_part
from resu.experiments.train import Interrupted, as_config, run
from tests.experiments.test_train_run import same_run, stop_after

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def picture(path, seed, size=(20, 16), mode="RGB"):
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "birds"
    for i in range(12):
        picture(root / "train" / "crow" / f"{i:02}.png", i)
        picture(root / "train" / "wren" / f"{i:02}.PNG", 100 + i, (16, 24))
    for i in range(5):
        picture(root / "val" / "wren" / f"{i}.png", 200 + i, (18, 18), "L" if i == 0 else "RGB")
    (root / "train" / "wren" / "notes.txt").write_text("no image")
    return root


def labels(data, part):
    return torch.cat([y for _, y in data.evaluation(part, chunk=3)]).tolist()


def test_parts_and_classes_follow_the_folders(folder):
    data = load("image-folder", folder, side=8, held_out=0.25)
    assert (data.name, data.names, data.shape, data.classes) == ("birds", ("crow", "wren"), (3, 8, 8), 2)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 6, 5)
    assert set(data.train.paths).isdisjoint(data.val.paths)
    for files in (data.train, data.val, data.test):
        assert [data.names[y] for y in files.labels.tolist()] == [path.split("/")[-2] for path in files.paths]
    assert labels(data, "test") == [1] * 5
    assert load("image-folder", folder, side=8, held_out=0.25).val.paths == data.val.paths


def test_with_a_test_folder_nothing_is_held_out(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val").symlink_to(folder / "val")
    picture(tmp_path / "test" / "crow" / "1.png", 1)
    data = load("image-folder", tmp_path, side=8)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 5, 1)


def test_evaluation_sees_the_middle_of_each_image(folder):
    data = load("image-folder", folder, side=8)
    x = torch.cat([x for x, _ in data.evaluation("test", chunk=2)])
    for path, seen in zip(data.test.paths, x, strict=True):
        image = Image.open(path).convert("RGB")
        side = min(image.size) * 224 / 256
        left, upper = (image.width - side) / 2, (image.height - side) / 2
        wanted = image.resize((8, 8), Image.Resampling.BILINEAR, box=(left, upper, left + side, upper + side))
        wanted = torch.from_numpy(np.asarray(wanted).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(seen, (wanted - MEAN) / STD, rtol=1e-5, atol=1e-5)
    shares = [torch.cat([x for x, _ in data.evaluation("test", 1, (rank, 2))]) for rank in (0, 1)]
    assert shares[0].equal(x[::2])
    assert shares[1].equal(x[1::2])


def test_training_sees_the_part_that_the_draws_say(folder):
    data = load("image-folder", folder, side=8)
    places = torch.arange(len(data.train))
    draws = torch.rand(len(places), 5, generator=torch.Generator().manual_seed(0))
    x, y = data.take(places, draws)
    assert y.equal(data.train.labels)
    for path, numbers, seen in zip(data.train.paths, draws.tolist(), x, strict=True):
        image = Image.open(path)
        area = (0.08 + 0.92 * numbers[0]) * image.width * image.height
        ratio = (4 / 3) ** (2 * numbers[1] - 1)
        wide, high = min(image.width, (area * ratio) ** 0.5), min(image.height, (area / ratio) ** 0.5)
        left, upper = numbers[2] * (image.width - wide), numbers[3] * (image.height - high)
        part = image.resize((8, 8), Image.Resampling.BILINEAR, box=(left, upper, left + wide, upper + high))
        if numbers[4] < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        wanted = torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(seen, (wanted - MEAN) / STD, rtol=1e-5, atol=1e-5)
    assert not data.take(places)[0].equal(x)


def test_parts_lie_within_the_image():
    generator = torch.Generator().manual_seed(0)
    for width, height in ((20, 16), (500, 375), (1, 9)):
        for draws in [*torch.rand(200, 5, generator=generator).tolist(), [0.0] * 5, [1 - 1e-09] * 5]:
            left, upper, right, lower = _random_part(width, height, draws)
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= upper < lower <= height + 1e-9
    assert _middle(256, 512) == (16, 144, 240, 368)


def test_threads_change_nothing_and_a_stopped_run_goes_on(folder, tmp_path):
    def config(workers):
        return as_config(
            {
                "data": {
                    **{"name": "image-folder", "dir": str(folder), "augment": True},
                    **{"side": 16, "workers": workers, "held_out": 0.2},
                },
                "model": {"name": "vit-tiny", "patch": 8, "width": 24, "depth": 1},
                "method": {"name": "set", "sparsity": 0.5, "interval": 2},
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "batch_size": 4,
                "steps": 12,
                "compute": {"threads": 1},
                "log": {"every": 4},
            }
        )

    run(config(0), tmp_path / "plain")
    with pytest.raises(Interrupted):
        run(config(2), tmp_path / "threads", on_event=stop_after(7))
    run(config(2), tmp_path / "threads", resume=True)
    for name in ("plain", "threads"):  # the number of threads is not what a run is
        path = tmp_path / name / "result.json"
        document = json.loads(path.read_text())
        del document["config"]["data"]["workers"]
        path.write_text(json.dumps(document))
    same_run(tmp_path / "plain", tmp_path / "threads")


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"needs data\.dir"):
        load("image-folder")
    with pytest.raises(DataError, match="train is not a folder"):
        load("image-folder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train has no folders in it; each class needs one"):
        load("image-folder", tmp_path)
    (tmp_path / "train" / "crow").mkdir()
    with pytest.raises(DataError, match=r"train holds no image with one of the endings \.jpeg"):
        load("image-folder", tmp_path)
    picture(tmp_path / "train" / "crow" / "1.png", 0)
    picture(tmp_path / "val" / "owl" / "1.png", 0)
    with pytest.raises(DataError, match="val has the class 'owl', which is not in"):
        load("image-folder", tmp_path)
    (tmp_path / "val" / "owl").rename(tmp_path / "val" / "crow")
    with pytest.raises(DataError, match="none is left when some are held out"):
        load("image-folder", tmp_path)
    (tmp_path / "train" / "crow" / "2.jpg").write_bytes(b"no jpeg")
    data = load("image-folder", tmp_path, held_out=0.5)
    part = "train" if data.train.paths[0].endswith("2.jpg") else "val"
    with pytest.raises(DataError, match=r"2\.jpg cannot be decoded"):
        list(data.evaluation(part))
    with pytest.raises(DataError, match=r"data\.held_out in .0, 1.; got 224, 0 and 2"):
        load("image-folder", folder, held_out=2)

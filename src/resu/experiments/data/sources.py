"""The data sets known by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resu.core.registry import Registry
from resu.experiments.data.cifar import load_cifar10
from resu.experiments.data.dataset import Images, Split, TrainingData, shuffled_split
from resu.experiments.data.folder import DataError
from resu.experiments.data.idx import load_fashion_mnist
from resu.experiments.data.image_folder import load_image_folder, load_imagenet
from resu.experiments.data.text import load_text_folder, load_tinyshakespeare, load_war_and_peace

__all__ = ["datasets", "load", "load_digits"]

# Each takes its folder, and by keyword what can be chosen of it.
datasets: Registry[Callable[..., TrainingData]] = Registry("data set")
datasets.register("fashion-mnist")(load_fashion_mnist)
datasets.register("cifar10")(load_cifar10)
datasets.register("tinyshakespeare")(load_tinyshakespeare)
datasets.register("war-and-peace")(load_war_and_peace)
datasets.register("text")(load_text_folder)
datasets.register("imagenet")(load_imagenet)
datasets.register("image-folder")(load_image_folder)


@datasets.register("digits")
def load_digits(directory: str | Path | None = None) -> Images:
    """The 1797 handwritten digits (8x8) that ship with scikit-learn; a fifth is the test part."""
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise DataError(
            "the digits ship with scikit-learn, which is not installed: pip install 'resu-torch[demo]'"
        ) from error
    found = read()
    x = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    rest, test = shuffled_split(x, torch.from_numpy(found.target).long(), held_out=360, seed=4321)
    train, val = shuffled_split(rest.x, rest.y, held_out=180)
    return Images("digits", train, val, Split(test.x, test.y), 10, mean=(0.305,), std=(0.376,), scale=16.0)


def load(name: str, directory: str | Path | None = None, **options: Any) -> TrainingData:
    """The data set of that name.

    Args:
        name: One of ``datasets``.
        directory: Its folder, or the one that holds it (see :func:`resu.experiments.data.find_folder`).
        options: What can be chosen of this data set, such as the ``context`` of a text.

    Raises:
        DataError: If a file is missing or broken; it says what was looked for and where.
    """
    return datasets[name](directory, **options)

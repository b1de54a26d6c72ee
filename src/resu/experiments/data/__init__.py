"""Standard data formats, read without torchvision and without unpickling anything.

``load("fashion-mnist")`` looks in the folder given, else in ``RESU_DATA``, else in ``../shared/data``.
"""

from resu.experiments.data.cifar import load_cifar10, read_cifar_binary, read_cifar_jpeg, read_cifar_pickle
from resu.experiments.data.dataset import Batch, Dataset, Images, Part, Split, Text, TrainingData
from resu.experiments.data.folder import DataError, find_folder
from resu.experiments.data.idx import load_fashion_mnist, read_idx
from resu.experiments.data.image_folder import ImageFolder, load_image_folder, load_imagenet
from resu.experiments.data.sources import datasets, load
from resu.experiments.data.text import load_text, load_tinyshakespeare, load_war_and_peace

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "ImageFolder",
    "Images",
    "Part",
    "Split",
    "Text",
    "TrainingData",
    "datasets",
    "find_folder",
    "load",
    "load_cifar10",
    "load_fashion_mnist",
    "load_image_folder",
    "load_imagenet",
    "load_text",
    "load_tinyshakespeare",
    "load_war_and_peace",
    "read_cifar_binary",
    "read_cifar_jpeg",
    "read_cifar_pickle",
    "read_idx",
]

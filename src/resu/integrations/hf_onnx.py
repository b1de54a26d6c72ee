"""Hugging Face model folders as ONNX: causal language models, classifiers and encoders of text."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.formats.relayout import REPORT_FILE
from resu.formats.stored import Stored
from resu.integrations.folders import check_apart, copy_companions, new_folder
from resu.integrations.hf import load_model, quiet
from resu.integrations.onnx import check_onnx, export_onnx, need_onnx

__all__ = ["ONNX_FILE", "write_onnx"]

ONNX_FILE = "model.onnx"
_AXES = {0: "batch", 1: "sequence"}


def write_onnx(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a text model as ``model.onnx``, with tokenizer and configuration beside it.

    Inputs are ``input_ids``, ``attention_mask`` and, where the model tells sentences apart, ``token_type_ids``, int64
    ``[batch, sequence]`` of any size; outputs are the model's, such as ``logits`` or ``last_hidden_state``, float32. A
    causal model sees the whole sequence at each call; no cache is exported. Weights are exported in float32, zeros as
    zeros. Before the folder appears, ONNX Runtime and the model are compared on batches of other sizes than the
    exported one, some of them padded.

    Args:
        source: A model folder that ``from_pretrained`` loads, dense (``resu export --to dense`` makes any layout so).
        out: The folder to write.
        tolerance: How far outputs may be apart, as a fraction of the largest one.
        overwrite: Whether an earlier result at ``out`` may be replaced.
        progress: Called with ``(done, total, name)``.

    Returns:
        ``source, out, layout`` ("onnx"), ``bytes, opset, inputs, outputs, error, largest`` as
        :func:`resu.integrations.onnx.export_onnx`, ``error`` the largest over all batches.

    Raises:
        FileNotFoundError: If the folder or a file of it is missing.
        FileExistsError: If ``out`` holds something that may not be replaced.
        ValueError: If the model does not take ``input_ids`` alone (encoder-decoder, images, sound), is packed or
            quantized, cannot be exported, or outputs differ by more than ``tolerance``.
        ImportError: If onnx, onnxscript, onnxruntime or transformers is missing.
    """
    source, out = Path(source), Path(out)
    check_apart(out, source)
    need_onnx()
    _check_dense(source)
    tick = progress or (lambda done, total, name: None)
    with new_folder(out, overwrite=overwrite) as temporary:
        tick(0, 3, "loading")
        model: Any = load_model(source, dtype=torch.float32)[0]
        names, outputs = _signature(model, source)
        tick(1, 3, "exporting")
        vocabulary = int(model.config.get_text_config().vocab_size)
        longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 64)
        batches = [_batch(names, vocabulary, rows, min(columns, longest), rows) for rows, columns in _SIZES]
        with quiet():
            report = export_onnx(
                model,
                batches[0],
                temporary / ONNX_FILE,
                output_names=outputs,
                dynamic=_AXES,
                tolerance=tolerance,
            )
        tick(2, 3, "comparing")
        for batch in batches[1:]:
            with torch.no_grad():
                expected = model(**batch)
            found = check_onnx(temporary / ONNX_FILE, batch, expected, tolerance, batch["attention_mask"].bool())
            report["error"] = max(report["error"], found["error"])
            report["largest"] = max(report["largest"], found["largest"])
        report = {"source": str(source), "out": str(out), "layout": "onnx", **report, "path": str(out / ONNX_FILE)}
        (temporary / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        copy_companions(source, temporary)
        tick(3, 3, "")
    return report


# The exported batch first; a 1 would be taken for a constant. Then one token, and lengths around powers of two.
_SIZES = ((2, 9), (1, 1), (3, 33), (5, 16))


def _check_dense(source: Path) -> None:
    stored = Stored.open(source)
    if packed := {*stored.packed, *stored.quantized}:
        raise ValueError(
            f"{source} holds weights in the layout {stored.layout(min(packed))}; make it dense first: resu export "
            f"{source} --to dense --out DIR"
        )


def _signature(model: Any, source: Path) -> tuple[list[str], list[str]]:
    """The names of the model's inputs and outputs."""
    parameters = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or not {"input_ids", "attention_mask"} <= set(parameters):
        raise ValueError(
            f"{source} holds a {type(model).__name__}; exported are models of text that take input_ids and "
            "attention_mask. For others, call resu.integrations.onnx.export_onnx with example inputs"
        )
    model.config.use_cache = False
    segments = "token_type_ids" in parameters and getattr(model.config, "type_vocab_size", 0) > 1
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    with torch.no_grad():
        found = model(**_batch(names, 2, 1, 2, 0))
    return names, list(found)


def _batch(names: list[str], vocabulary: int, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """Random tokens; from the third row on, padded at the end."""
    ids = torch.randint(vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[2:, columns // 2 :] = 0
    return {name: {"input_ids": ids, "attention_mask": mask}.get(name, torch.zeros_like(ids)) for name in names}

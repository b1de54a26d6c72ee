"""Any module as an ONNX file, compared with the module in ONNX Runtime."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.io import naming
from resu.modules.convert import get_resu_modules
from resu.modules.settings import RESUMode

__all__ = ["check_onnx", "export_onnx", "need_onnx"]

# A file of protocol buffers ends at 2 GB; weights of larger models lie in a file beside it.
_LARGEST_FILE = 1_900_000_000
_PLAIN = (RESUMode.DENSE, RESUMode.SPARSE)


def need_onnx() -> tuple[Any, Any]:
    """The modules ``onnx`` and ``onnxruntime``.

    Raises:
        ImportError: If one of them, or ``onnxscript``, which the exporter needs, is missing; it says what to install.
    """
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            "this needs onnx, onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime", name=error.name
        ) from error


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[int, str] | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a module as an ONNX file whose outputs in ONNX Runtime are those of the module.

    Zeros of a pruned weight stay zeros, bit for bit; ONNX stores and multiplies them as any other number, so the file
    is as large and as fast as that of the dense model. The model is exported in evaluation mode by ``torch.onnx``'s
    exporter of ``torch.export`` graphs, then run on the example by ONNX Runtime on the CPU.

    Args:
        model: Any module; resurrection layers in DENSE or SPARSE mode. Its training flag is as before afterwards.
        example_inputs: A tensor, several, or ``{argument of forward: tensor}``.
        path: The ``.onnx`` file. Weights of more than 1.9 GB go to ``NAME.onnx.data`` beside it.
        input_names: In the file; None: the keys, or ``input``, ``input_1``, ….
        output_names: In the file; None: ``output``, ``output_1``, ….
        dynamic: ``{dimension: its name}`` of all inputs that have it; None: ``{0: "batch"}``, ``{}``: fixed shapes.
        tolerance: How far an output may be from the module's, as a fraction of the largest output.
        overwrite: Whether a file that is there may be replaced.

    Returns:
        ``path``, ``bytes``, ``opset``, ``inputs`` and ``outputs`` (``{name: shape}``, dynamic dimensions by name),
        ``error`` (the largest difference from the module) and ``largest`` (the largest output).

    Raises:
        FileExistsError: If a file is there and ``overwrite`` is False.
        ValueError: If a layer holds θ (commit it first), the module cannot be exported, or its outputs in ONNX Runtime
            differ by more than ``tolerance``; nothing is written then.
        TypeError: If ``example_inputs`` holds anything but tensors.
        ImportError: If onnx, onnxscript or onnxruntime is missing.

    Example:
        >>> report = export_onnx(nn.Linear(4, 2), torch.randn(3, 4), "model.onnx")  # doctest: +SKIP
        >>> report["inputs"], report["outputs"]  # doctest: +SKIP
        ({'input': ['batch', 4]}, {'linear': ['batch', 2]})
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; pass overwrite=True to replace it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; make it first")
    _check_modes(model)
    need_onnx()
    arguments, named = _arguments(example_inputs)
    names = list(input_names or named or [f"input_{n}" if n else "input" for n in range(len(arguments))])
    if len(names) != len(arguments):
        raise ValueError(f"{len(arguments)} inputs have {len(names)} names ({', '.join(names)})")
    axes = {0: "batch"} if dynamic is None else dict(dynamic)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with naming(path), _evaluating(model), torch.no_grad():
            written = folder / target.name
            _write(model, arguments, named, written, names, output_names, axes)
            expected = model(**dict(zip(named, arguments, strict=True))) if named else model(*arguments)
            report = check_onnx(written, dict(zip(names, arguments, strict=True)), expected, tolerance)
            for file in sorted(folder.iterdir(), reverse=True):  # the weights before the graph that names them
                os.replace(file, target.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    beside = target.with_name(f"{target.name}.data")
    size = sum(file.stat().st_size for file in (target, beside) if file.exists())
    return {"path": str(target), "bytes": size, **report}


def check_onnx(
    path: str | os.PathLike[str],
    inputs: Mapping[str, Tensor],
    expected: Any,
    tolerance: float = 1e-4,
    keep: Tensor | None = None,
) -> dict[str, Any]:
    """Run a file by ONNX Runtime on the CPU and compare it with what a module gives.

    Args:
        path: The file.
        inputs: By name.
        expected: What the module returns: a tensor, or tensors in tuples, lists and mappings.
        tolerance: How far an output may be away, as a fraction of the largest expected one.
        keep: Bool ``[batch, sequence]``: where to compare outputs that have these dimensions and more (what comes of
            padding is no output). None: everywhere.

    Returns:
        ``opset, inputs, outputs, error, largest``.

    Raises:
        ValueError: If an output differs by more, or has another shape.
    """
    onnx, onnxruntime = need_onnx()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    given = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
    found = [torch.from_numpy(array) for array in session.run(None, given)]
    wanted = [tensor.detach().cpu() for tensor in _tensors(expected)]
    error = largest = 0.0
    for output, (mine, theirs) in enumerate(zip(wanted, found, strict=True)):
        if mine.shape != theirs.shape:
            raise ValueError(
                f"output {output} is {tuple(theirs.shape)} in ONNX Runtime, {tuple(mine.shape)} in the model"
            )
        if keep is not None and mine.ndim > keep.ndim and mine.shape[: keep.ndim] == keep.shape:
            mine, theirs = mine[keep], theirs[keep]
        if mine.numel():
            largest = max(largest, float(mine.abs().max()))
            error = max(error, float((mine.double() - theirs.double()).abs().max()))
    if not error <= tolerance * largest:  # NaN does not pass
        raise ValueError(
            f"outputs of {Path(path).name} in ONNX Runtime differ from the model's by up to {error:.3g} where the "
            f"largest is {largest:.3g}; tolerance is {tolerance:g} of that. Models in half precision need a larger one"
        )
    graph = onnx.load(os.fspath(path), load_external_data=False)
    return {
        "opset": next(o.version for o in graph.opset_import if not o.domain),
        "inputs": {i.name: list(i.shape) for i in session.get_inputs()},
        "outputs": {o.name: list(o.shape) for o in session.get_outputs()},
        "error": error,
        "largest": largest,
    }


def _tensors(found: Any) -> Iterator[Tensor]:
    """What a module returns, flat, in the order of the file's outputs."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (Mapping, Sequence)):
        for part in found.values() if isinstance(found, Mapping) else found:
            yield from _tensors(part)
    elif found is not None:
        raise ValueError(f"outputs must be tensors, got a {type(found).__name__}")


def _check_modes(model: nn.Module) -> None:
    for name, layer in get_resu_modules(model).items():
        if layer.mode not in _PLAIN:
            raise ValueError(
                f"{name or 'the layer'} is in {layer.mode.name} mode, with θ beside its weights; call exit_resu_mode() "
                "or exit_qresu_mode() before exporting"
            )


def _arguments(given: Any) -> tuple[tuple[Tensor, ...], list[str]]:
    """The tensors, and their names where they are keyword arguments."""
    if isinstance(given, Mapping):
        values, names = tuple(given.values()), [str(name) for name in given]
    else:
        values, names = (tuple(given) if isinstance(given, (tuple, list)) else (given,)), []
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise TypeError("example_inputs must be a tensor, a sequence of tensors or a mapping of names to tensors")
    return values, names


def _write(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    named: list[str],
    path: Path,
    names: list[str],
    output_names: Sequence[str] | None,
    axes: Mapping[int, str],
) -> None:
    shapes = [{dim: axis for dim, axis in axes.items() if dim < value.ndim} for value in arguments]
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    outputs = list(output_names) if output_names is not None else None
    try:
        with _silent():
            torch.onnx.export(
                model,
                () if named else arguments,
                os.fspath(path),
                kwargs=dict(zip(named, arguments, strict=True)) if named else None,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=dict(zip(named, shapes, strict=True)) if named else tuple(shapes),
                dynamo=True,
                external_data=size > _LARGEST_FILE,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # whatever the exporter raises: to the user it is one thing
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ValueError(
            f"{type(model).__name__} cannot be exported to ONNX: {reason[0] if reason else type(error).__name__}"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter says of its own dependencies."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag

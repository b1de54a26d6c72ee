"""Plain values and numpy arrays out of a pickle, by walking its opcodes. Nothing is imported or called.

Unpickling runs whatever the file says. This reads the few opcodes that build dictionaries, lists, tuples,
strings, numbers and arrays of numbers, and refuses everything else: the worst a file can do is be refused.
"""

from __future__ import annotations

import pickletools
from typing import Any

import numpy as np

from resu.experiments.data.folder import DataError

__all__ = ["parse_pickle"]

_MARK = object()
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG1", "LONG", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING"),
    *("UNICODE",),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Python 2 has no bytes: its strings are bytes, which pickletools shows as latin-1 text.
_OLD_STRINGS = {"BINSTRING", "SHORT_BINSTRING", "STRING"}


class _Name(str):
    """A global's name, ``"module name"``; never looked up."""

    __slots__ = ()


class _Array:
    """An array being put together."""

    value: np.ndarray[Any, Any] | None = None


class _DType:
    """A dtype being put together."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)


def parse_pickle(content: bytes, where: str = "the file") -> Any:
    """The value in a pickle of dictionaries, lists, tuples, strings, numbers and numeric arrays.

    Args:
        content: The pickle.
        where: How errors name it.

    Raises:
        DataError: If it is no pickle, is cut short, or holds anything else.

    Example:
        >>> import pickle
        >>> parse_pickle(pickle.dumps({b"labels": [1, 2], "name": "x"}))
        {b'labels': [1, 2], 'name': 'x'}
    """
    try:
        return _finished(_walk(content), where)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, EOFError) as error:
        raise DataError(f"{where} is not a complete pickle of plain values: {error}") from error


def _walk(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        at = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _VALUES:
            old = name in _OLD_STRINGS and isinstance(argument, str)
            stack.append(argument.encode("latin1") if old else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("LIST", "TUPLE"):
            items = marked()
            stack.append(items if name == "LIST" else tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else marked()
            _as(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = marked() if name != "SETITEM" else [stack.pop(-2), stack.pop()]
            pairs = dict(zip(items[::2], items[1::2], strict=True))
            if name == "DICT":
                stack.append(pairs)
            else:
                _as(dict, stack[-1]).update(pairs)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module} {attribute}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_built(function, _as(tuple, arguments)))
        elif name == "BUILD":
            _set_state(stack[-2], stack.pop())
        else:
            raise DataError(f"holds the pickle opcode {name}, which no array of numbers needs")
    raise DataError("is cut short: the pickle has no end")


def _as(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} is needed")
    return value


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _built(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What the few known functions would give; anything else is refused."""
    if isinstance(function, _Name):
        module, _, name = function.partition(" ")
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array()
        if (module, name) == ("numpy", "dtype") and _text(arguments[0])[:1] in "uifb":
            return _DType(_text(arguments[0]))
        if (module, name) == ("_codecs", "encode") and _text(arguments[1]) in ("latin1", "latin-1"):
            return _as(str, arguments[0]).encode("latin1")
    raise DataError(f"would call {function!r} when unpickled; only arrays of numbers are read")


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, _DType):  # (version, byte order, …)
        target.dtype = target.dtype.newbyteorder(">" if _text(state[1]) == ">" else "<")
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")
        flat = np.frombuffer(_as(bytes, data), _as(_DType, dtype).dtype)
        target.value = flat.reshape(_as(tuple, shape), order="F" if fortran else "C")
    else:
        raise DataError(f"would set the state of a {type(target).__name__} when unpickled")


def _finished(value: Any, where: str) -> Any:
    """``value`` with arrays in place of what was put together for them."""
    if isinstance(value, _Array):
        if value.value is None:
            raise DataError("holds an array without contents")
        return value.value
    if isinstance(value, dict):
        return {_finished(k, where): _finished(v, where) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_finished(item, where) for item in value)
    if value is _MARK or isinstance(value, (_Name, _DType)):
        raise DataError("holds something that is no plain value")
    return value

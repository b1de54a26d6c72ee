"""The methods of this package made known to PEFT.

PEFT finds a method's classes by a member of ``peft.PeftType``, and members are made where the enumeration is written.
There is no call to add one, so :func:`add_peft_type` makes it here, once, the way ``enum`` itself does, and looks
whether it acts like the others. Nothing else of PEFT is changed.
"""

from __future__ import annotations

import enum
from typing import Any

try:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method
except ImportError as error:
    raise ImportError(
        f"this needs peft 0.21 or later: pip install 'resu-torch[peft]' ({error})", name=error.name
    ) from error

__all__ = ["add_peft_type", "register_method"]


def add_peft_type(name: str) -> PeftType:
    """The member ``PeftType.NAME`` with the value ``"NAME"``, made if it is not there.

    Args:
        name: In upper case letters.

    Raises:
        RuntimeError: If ``PeftType`` is no longer an enumeration of strings that can be extended.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    kind: Any = PeftType
    if not (issubclass(kind, str) and issubclass(kind, enum.Enum)):
        raise RuntimeError(_changed("PeftType is not an enumeration of strings"))
    member = str.__new__(kind, name)
    member._name_, member._value_ = name, name
    member.__objclass__, member._sort_order_ = kind, len(kind.__members__)
    try:
        type.__setattr__(kind, name, member)
        kind._member_names_.append(name)
        kind._member_map_[name] = member
        kind._value2member_map_[name] = member
    except AttributeError as error:
        raise RuntimeError(_changed(str(error))) from error
    if kind(name) is not member or kind[name] is not member or member not in list(kind) or member != name:
        raise RuntimeError(_changed(f"PeftType.{name} does not act like its other members"))
    return PeftType[name]


def register_method(name: str, config: type, tuner: type) -> None:
    """Make a method known to PEFT under ``PeftType.NAME``; the second time it does nothing.

    Args:
        name: In lower case letters.
        config: Its configuration, a ``PeftConfig``.
        tuner: Its ``BaseTuner``.

    Raises:
        RuntimeError: If this release of PEFT registers methods in another way, or has one of this name.
    """
    kind = add_peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is config:
        return
    if known is not None:
        raise RuntimeError(_changed(f"it has a method {name!r} of its own, {known.__name__}"))
    try:
        register_peft_method(name=name, config_cls=config, model_cls=tuner)
    except (TypeError, ValueError, KeyError) as error:
        raise RuntimeError(_changed(str(error))) from error


def _changed(what: str) -> str:
    return (
        f"peft {peft.__version__} is not as resu knows it: {what}. Use another release (0.21 is tested), and tell the "
        "developers of resu"
    )

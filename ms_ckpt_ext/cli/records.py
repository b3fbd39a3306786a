"""Values of the API as JSON has them, and as `--json` prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Optional

_PLAIN = frozenset((str, int, bool, type(None)))
_EXPANDED = 2
"""Levels of a document that have a line for every item; what lies deeper stands on one line."""


def plain(value: Any) -> Any:
    """Named tuples and dataclasses become objects; NaN and infinities, which JSON lacks, text."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return value if _PLAIN.issuperset(map(type, value)) else [plain(each) for each in value]
    names = _fields(kind)  # type: ignore[arg-type]
    if names is not None:
        held = zip(names, value) if isinstance(value, tuple) else ((name, getattr(value, name)) for name in names)
        return {name: each if type(each) in _PLAIN else plain(each) for name, each in held}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _fields(kind: type) -> Optional[tuple[str, ...]]:
    """The names of what a value of this type holds; None of one that is no record."""
    names = getattr(kind, "_fields", None) or getattr(kind, "__dataclass_fields__", None)
    return None if names is None else tuple(names)


def json_text(data: Any) -> str:
    """A document as text. Only what is written in one go is made by the encoder in C, so a long list's items are."""
    from json import JSONEncoder

    encode = JSONEncoder(ensure_ascii=False).encode

    def text(value: Any, depth: int) -> str:
        if depth == _EXPANDED or not value or not isinstance(value, (Mapping, list, tuple)):
            return encode(value)
        first, last = "{}" if isinstance(value, Mapping) else "[]"
        if isinstance(value, Mapping):
            items = [f"{encode(str(name))}: {text(each, depth + 1)}" for name, each in value.items()]
        else:
            items = [text(each, depth + 1) for each in value]
        indent = "\n" + " " * depth
        return first + f"{indent} " + f",{indent} ".join(items) + indent + last

    return text(data, 0)

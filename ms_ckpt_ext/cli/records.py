"""Values of the API as JSON has them, and as `--json` prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import repeat
from operator import attrgetter
from typing import Any, Callable, Optional

_PLAIN = frozenset((str, int, bool, type(None)))
_EXPANDED = 2
"""Levels of a document with one line per item; what lies deeper is on the line of its item."""


def plain(value: Any) -> Any:
    """Named tuples and dataclasses become objects; NaN and infinities, which JSON lacks, become text."""
    if type(value) in _PLAIN:
        return value
    names = _fields(value)
    if names is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fields(value: Any) -> Optional[tuple[str, ...]]:
    """The names of a record's fields; None for anything else."""
    return _fields_of(type(value))  # type: ignore[arg-type]


@cache
def _fields_of(kind: type) -> Optional[tuple[str, ...]]:
    names = getattr(kind, "_fields", None) or getattr(kind, "__dataclass_fields__", None)
    return None if names is None else tuple(names)


def _spelled(sign: str) -> str:
    """A character that a terminal might interpret, as JSON escapes it."""
    units = sign.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04x}" for at in range(0, len(units), 2))


def json_text(data: Any) -> str:
    """A document of anything that `plain` takes, as text. The encoder in C writes whatever is on one line."""
    from json import JSONEncoder

    to_text = JSONEncoder(ensure_ascii=False).encode

    def encode(value: Any) -> str:
        made = to_text(value)
        return made if made.isprintable() else "".join(each if each.isprintable() else _spelled(each) for each in made)

    def text(value: Any, depth: int) -> str:
        names = _fields(value)
        if names is not None and depth < _EXPANDED:
            value = {name: getattr(value, name) for name in names}
        if depth == _EXPANDED or not value or not isinstance(value, (Mapping, list, tuple)):
            return encode(plain(value))
        first, last = "{}" if isinstance(value, Mapping) else "[]"
        if isinstance(value, Mapping):
            items = [f"{encode(str(name))}: {text(each, depth + 1)}" for name, each in value.items()]
        elif depth + 1 == _EXPANDED:
            items = _lines(value, encode)
        else:
            items = [text(each, depth + 1) for each in value]
        indent = "\n" + " " * depth
        return first + f"{indent} " + f",{indent} ".join(items) + indent + last

    return text(data, 0)


def _lines(values: Sequence[Any], encode: Callable[[Any], str]) -> list[str]:
    """Each value as text. An object that several records share is encoded once."""
    names = _fields(values[0])
    if not names or len({*map(type, values)}) > 1:
        return [encode(plain(value)) for value in values]
    parts: list[Iterable[str]] = []
    alike = "{"
    for name in names:
        held = [*map(attrgetter(name), values)]
        by_id = dict(zip(map(id, held), held))
        texts = {key: encode(plain(value)) for key, value in by_id.items()}
        alike += f"{encode(name)}: "
        if len(texts) == 1:
            alike += texts.popitem()[1] + ", "
        else:
            parts += [repeat(alike, len(values)), map(texts.__getitem__, map(id, held))]
            alike = ", "
    parts.append(repeat(f"{alike[:-2]}}}", len(values)))
    return [*map("".join, zip(*parts))]

"""Random changes that keep a file's form, so that they get past the first look: JSON, protobuf, safetensors.

Bytes are changed by whoever drives the search; these change values inside.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any, Callable

from ms_ckpt_ext.formats.wire import BYTES, FIXED32, FIXED64, VARINT, encode_bytes, encode_number, encode_varint

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, -1, 1, 2, 3, 7, 255, 1 << 31, (1 << 32) - 1, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**30)
ODD_NUMBERS: tuple[Any, ...] = (1.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), True, False, None)
TEXTS = (
    "", ".", "..", "/", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "\n", "\x1b[31m", "\u202e", "\ufeff", "é",
    "e\u0301", "7", "x" * 300, "rank_0", "__metadata__", "('w', (0,))", "F32", "1" * 5000,
)  # fmt: skip
RAW = (
    b'{"a":1,"a":2}',
    b"1e999",
    b"-0",
    b"9" * 5000,
    b"[" * 3000,
    b'{"":' * 3000,
    b"NaN",
    b"\xef\xbb\xbf",
    b"\xff",
    b"",
)


def json_values(data: bytes, chance: random.Random) -> bytes:
    """A JSON document with one to three of its values replaced, moved, doubled or taken away, or text put in raw."""
    if chance.random() < 0.1:
        at = chance.randrange(len(data) + 1)
        return data[:at] + chance.choice(RAW) + data[at + chance.randrange(4) :]
    try:
        told = {"": json.loads(data)}
    except (ValueError, RecursionError):
        return data[: chance.randrange(len(data) + 1)] + chance.choice(RAW)
    for _ in range(chance.randint(1, 3)):
        _change(told, chance)
    return json.dumps(told.get(""), ensure_ascii=chance.random() < 0.8).encode("utf-8", "surrogatepass")


def _change(place: Any, chance: random.Random) -> None:
    while True:
        keys: Any = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = chance.choice(keys)
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner) or chance.random() < 0.15:
            break
        place = inner
    kind = chance.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[chance.choice(TEXTS)] = copy.deepcopy(inner)
    elif kind == 1:
        place.insert(key, copy.deepcopy(inner))
    elif kind == 2:
        place[key] = copy.deepcopy(chance.choice([place[each] for each in keys]))
    elif kind == 3:
        place[key] = chance.choice([[], {}, [inner], {"": inner}, [inner] * chance.choice((2, 9, 40))])
    else:
        place[key] = chance.choice((*NUMBERS, *ODD_NUMBERS, *TEXTS))


def wire_fields(data: bytes, chance: random.Random) -> bytes:
    """A protobuf message with one field changed, doubled, moved, taken away or put into another; lengths fit."""
    fields = _fields(data)
    if not fields:
        return data + encode_number(chance.randint(1, 4), chance.choice(NUMBERS) % (1 << 64))
    at = chance.randrange(len(fields))
    number, wire, contents = fields[at]
    kind = chance.randrange(8)
    if kind == 0:
        del fields[at]
    elif kind == 1:
        fields.insert(chance.randrange(len(fields) + 1), fields[at])
    elif kind == 2:
        fields[at] = (chance.randrange(16), wire, contents)
    elif kind == 3:
        fields[at] = (
            number,
            BYTES,
            encode_bytes(number or 1, contents if wire == BYTES else b"") * chance.choice((1, 5)),
        )
    elif kind == 4:
        fields[at] = (number, VARINT, encode_varint(chance.choice(NUMBERS) % (1 << 64)))
    elif wire == BYTES and kind < 7:
        fields[at] = (number, wire, wire_fields(contents, chance))
    elif wire == BYTES:
        fields[at] = (number, wire, chance.choice(TEXTS).encode("utf-8", "surrogatepass"))
    else:
        fields[at] = (number, wire, encode_varint(chance.choice(NUMBERS) % (1 << 64)))
    return b"".join(map(_field, fields))


def _field(field: tuple[int, int, bytes]) -> bytes:
    number, wire, contents = field
    return encode_varint(number << 3 | wire) + (encode_varint(len(contents)) if wire == BYTES else b"") + contents


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """(number, wire type, contents) of the fields at the beginning that are well formed."""
    found, at = [], 0
    while at < len(data):
        key, at = _varint(data, at)
        wire, begin = key & 7, at
        if wire == VARINT:
            _, at = _varint(data, at)
        elif wire == BYTES:
            length, begin = _varint(data, at)
            at = begin + length
        else:
            at += {FIXED64: 8, FIXED32: 4}.get(wire, 1 << 62)
        if at > len(data):
            break
        found.append((key >> 3, wire, data[begin:at]))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
    return value, 1 << 62


def header_values(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with values of its header changed, and the length of the header made to fit."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return data[8:]
    header = json_values(data[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]

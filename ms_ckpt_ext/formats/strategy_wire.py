"""The protobuf form of a strategy file as values, read and written.

MindSpore's `node_strategy.proto` describes it (its names of fields, numbers in brackets):

    StrategyMap   current_stage (1), parallel_strategy_item (2): Nodes, parallel_layout_item (3): Entries
    Node          node_name (1), parallel_strategys (2): stage (1), and cuts of inputs (2): rows, each of numbers (1)
    Entry         param_name (1), parallel_layouts (2): Layouts
    Layouts       dev_matrix (1), tensor_map (2), param_split_shape (3), indices_offset (4): rows, each of numbers (1);
                  field (5), opt_weight_shard_step (6), opt_weight_shard_size (7): numbers

Read with `formats.wire`, as `.ckpt` files are: to import the protobuf library takes longer than to read a strategy, and
generated code would be bound to one major version of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.wire import (
    BYTES,
    VARINT,
    Cursor,
    Field,
    MemoryReader,
    encode_bytes,
    encode_number,
    fields,
    numbers,
    signed,
)

Rows = tuple[tuple[int, ...], ...]
_ROWS, _NUMBERS = range(1, 5), range(5, 8)
_UNSIGNED, _SMALL, _WIDE = (0, 2**32), (-(2**31), 2**31), (-(2**63), 2**63)  # uint32, int32, int64
_TYPES = (_UNSIGNED, _SMALL, _WIDE, _WIDE, _SMALL, _SMALL, _SMALL)


class Layouts(NamedTuple):
    """How a parameter is cut, as numbers that nobody looked at yet; see `core.layout` for what they mean."""

    dev_matrix: Rows = ()
    tensor_map: Rows = ()
    param_split_shape: Rows = ()
    indices_offset: Rows = ()
    field: int = 0
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0

    def encode(self) -> bytes:
        """The message. Raises ValueError for a number that its field cannot hold."""
        for name, rows_, kind in zip(self._fields, self[:4], _TYPES):
            for value in chain(*rows_):
                _require(name, value, kind)
        for name, number, kind in zip(self._fields[4:], self[4:], _TYPES[4:]):
            _require(name, number, kind)
        rows = b"".join(
            encode_bytes(number, b"".join(encode_number(1, value) for value in row))
            for number, held in zip(_ROWS, self[:4])
            for row in held
        )
        return rows + b"".join(encode_number(number, value) for number, value in zip(_NUMBERS, self[4:]))


class Node(NamedTuple):
    """An operator: its name and pipeline stage, and the whole message, which a merge passes on."""

    name: str
    stage: int
    message: bytes


class Entry(NamedTuple):
    """A parameter: its name (with the stage before it in a merged file), its layouts, and the message of these."""

    name: str
    layouts: Layouts
    message: bytes


class StrategyMap(NamedTuple):
    """A whole file."""

    nodes: tuple[Node, ...]
    entries: tuple[Entry, ...]

    def encode(self, current_stage: int) -> bytes:
        """The file."""
        nodes = (encode_bytes(2, node.message) for node in self.nodes)
        entries = (
            encode_bytes(3, encode_bytes(1, entry.name.encode()) + encode_bytes(2, entry.message))
            for entry in self.entries
        )
        return b"".join((encode_number(1, current_stage), *nodes, *entries))


def node(name: str, stage: int, cuts: Rows = ()) -> Node:
    """An operator: its stage, and how each of its inputs is cut if that is known. Raises ValueError as `entry` does."""
    _require(f"{name!r}: stage", stage, _UNSIGNED)
    for value in chain(*cuts):
        _require(f"{name!r}: parallel_strategy", value, _UNSIGNED)
    rows = (encode_bytes(2, b"".join(encode_number(1, value) for value in row)) for row in cuts)
    contents = encode_number(1, stage) + b"".join(rows)
    return Node(name, stage, encode_bytes(1, name.encode()) + encode_bytes(2, contents))


def entry(name: str, layouts: Layouts) -> Entry:
    """A parameter that is to be written. Raises ValueError where a name is no Unicode, or a number does not fit."""
    try:
        name.encode()
        return Entry(name, layouts, layouts.encode())
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error


def _require(name: str, value: int, kind: tuple[int, int]) -> None:
    if not kind[0] <= value < kind[1]:
        raise ValueError(f"{name} of {value}: expected at least {kind[0]} and less than {kind[1]}")


def decode(data: bytes, path: str) -> StrategyMap:
    """Read a file's bytes. Fields that are not known, or not of their type, are passed over, as protobuf does.

    Raises:
        FormatError: lengths contradict each other, or a parameter's name is not UTF-8; `path` is for messages.
    """
    cursor = Cursor(MemoryReader(data, path))
    nodes, entries = [], []
    known: dict[bytes, Layouts] = {}
    for found in fields(cursor, len(data)):
        if found.wire == BYTES and found.number == 2:
            nodes.append(_node(cursor, found, data))
        elif found.wire == BYTES and found.number == 3:
            entries.append(_entry(cursor, found, data, known))
    return StrategyMap(tuple(nodes), tuple(entries))


def _within(cursor: Cursor, outer: Field) -> Iterator[Field]:
    """The fields of a message that is itself a field."""
    cursor.pos = outer.value
    return fields(cursor, outer.stop)


def _node(cursor: Cursor, outer: Field, data: bytes) -> Node:
    name, stage = b"", 0
    for found in _within(cursor, outer):
        if found.wire == BYTES and found.number == 1:
            name = data[found.value : found.stop]
        elif found.wire == BYTES and found.number == 2:
            for inner in _within(cursor, found):
                if inner.wire == VARINT and inner.number == 1:
                    stage = inner.value
    return Node(name.decode(errors="replace"), stage, data[outer.value : outer.stop])


def _entry(cursor: Cursor, outer: Field, data: bytes, known: dict[bytes, Layouts]) -> Entry:
    """`known` takes every message of layouts, for most parameters share a few."""
    name, parts = "", []
    for found in _within(cursor, outer):
        if found.wire == BYTES and found.number == 1:
            name = _text(data[found.value : found.stop], found, cursor.path)
        elif found.wire == BYTES and found.number == 2:
            parts.append(found)
    message = b"".join(data[part.value : part.stop] for part in parts)
    if message not in known:
        known[message] = _layouts(cursor, parts)
    return Entry(name, known[message], message)


def _text(raw: bytes, found: Field, path: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{path!r}: the name {raw!r} at byte {found.value} is not UTF-8") from None


def _layouts(cursor: Cursor, parts: Sequence[Field]) -> Layouts:
    """A message; where it stands more than once, all of it, as protobuf merges what does."""
    rows: list[list[tuple[int, ...]]] = [[] for _ in _ROWS]
    single = [0 for _ in _NUMBERS]
    for found in (field for part in parts for field in _within(cursor, part)):
        if found.wire == BYTES and found.number in _ROWS:
            cursor.pos = found.value
            rows[found.number - 1].append(tuple(signed(value) for value in numbers(cursor, found.stop, 1)))
        elif found.wire == VARINT and found.number in _NUMBERS:
            single[found.number - 5] = signed(found.value)
    return Layouts(*map(tuple, rows), *single)  # type: ignore[arg-type]

"""MindSpore's `.ckpt`: a table of contents by walking tags and lengths, contents unread.

The file is a concatenation of protobuf messages that MindSpore's `train/checkpoint.proto` describes:

    Checkpoint  { 1 value* }
    Value       { 1 tag string, 2 tensor, 3 maptensor }
    TensorProto { 1 dims* int64, 2 tensor_type string, 3 tensor_content bytes }

1. Walk the values. Of each, keep tag, dims, type, and where the contents lie; jump over the contents.
2. Consecutive values with one tag are the pieces of one tensor (MindSpore cuts above 512 MiB): their contents
   concatenate, and every piece carries the dims of the whole.
3. `dims` empty, or `[0]` with contents, is a scalar, as `mindspore.load_checkpoint` has it. Text has the type `str`,
   dims `[0]` and UTF-32 contents; here its shape is the number of code points.
4. A tail `crc_num` + 10 bytes, big-endian, is the CRC-32 of everything before it.

Stock MindSpore is more lenient: it fills missing bytes with zeros, ignores surplus ones, and lets the second of two
equal names win. Here each of these is an error, for such a checkpoint is damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from math import prod
from typing import NamedTuple, Optional, Union

from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE, DTYPES, INT4, DType, Shape
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import DecryptionError, FormatError, MapParameterError, TruncatedFileError
from ms_ckpt_ext.formats import table
from ms_ckpt_ext.formats.checksum import StoredChecksum
from ms_ckpt_ext.formats.crypto import sniff
from ms_ckpt_ext.formats.index import BUDGET, CRC_NUM, MAX_RANK, FileIndex, TensorEntry, countable
from ms_ckpt_ext.formats.wire import BYTES, VARINT, Cursor, Field, fields, signed
from ms_ckpt_ext.storage.reader import ByteReader

CRC_MARK = b"crc_num"
CRC_TAIL = len(CRC_MARK) + 10
"""Length of the checksum tail in bytes."""
CRC_OFFSET = "crc_offset"
"""Metadata key: where the tail begins; the checksum itself stands at `CRC_NUM`, as in safetensors files."""

MAX_TEXT = 1 << 16
"""Longest name or type, in bytes, that is accepted."""

_SCALAR: Shape = (0,)
_PER_VALUE, _PER_AXIS = 500, 40
"""Bytes of Python objects per value, beside its two strings, and per dim; as measured."""


class _Value(NamedTuple):
    """One `_Value` message: a tensor, or a piece of one. `offset` is where it begins."""

    tag: str
    dims: Shape
    type: str
    contents: Extent
    offset: int


def read_index(reader: ByteReader, mtime_ns: int = 0, budget: int = BUDGET) -> FileIndex:
    """Table of contents of a `.ckpt` file, plain or seen through a decrypting reader.

    Reads about one page per tensor, and less where tensors are small.

    Args:
        reader: the file.
        mtime_ns: its time of modification, for the index.
        budget: bytes of memory that the table may take beyond the size of the file.

    Raises:
        FormatError: not a `.ckpt`, or a damaged one; the message has the offset and the parameter.
        TruncatedFileError: the file ends early.
        DecryptionError: the file is encrypted and `reader` does not decrypt.
    """
    cursor = Cursor(reader)
    _require_checkpoint(cursor)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for tag, pieces in groupby(_values(cursor, budget), key=lambda value: value.tag):
        parts = list(pieces)
        if tag in tensors:
            raise _bad(cursor, parts[0].offset, f"parameter {tag!r} appears a second time, not next to the first")
        tensors[tag] = _entry(cursor, parts)
        if parts[0].type == INT4:
            if tag in (CRC_NUM, CRC_OFFSET):
                raise FormatError(
                    f"{cursor.path!r}: parameter {tag!r} at byte {parts[0].offset} is packed int4, and the note of "
                    f"that, {tag!r} in the metadata, means the checksum there, as in safetensors files; save "
                    "it under another name"
                )
            metadata[tag] = INT4
    metadata.update(_crc(cursor))
    return FileIndex(reader.path, reader.disk_size, mtime_ns, tensors, metadata, reader.traits.container)


def stored_crc(reader: ByteReader) -> Optional[int]:
    """The checksum at the end of a file, read from its last bytes alone; None when it has none."""
    if reader.size < CRC_TAIL:
        return None
    tail = bytearray(CRC_TAIL)
    reader.read_into(reader.size - CRC_TAIL, memoryview(tail))
    return _crc_in(tail) if tail.startswith(CRC_MARK) else None


def stored_checksum(index: FileIndex) -> Optional[StoredChecksum]:
    """The checksum behind a file's values; None when there is none."""
    if CRC_NUM not in index.metadata:
        return None
    stored, end = int(index.metadata[CRC_NUM]), int(index.metadata[CRC_OFFSET])

    def fault(found: int) -> Optional[str]:
        if found == stored:
            return None
        return (
            f"{index.path!r}: CRC-32 of bytes 0 to {end} is {found}, but {stored} is stored at byte {end}; "
            "the file was damaged after it was saved: restore it or choose another checkpoint"
        )

    return StoredChecksum((Extent(0, end),), fault)


def value_bytes(tag: str, axes: int, kind: str) -> int:
    """Bytes of Python objects per value; a table may have as many as its file has bytes, plus `BUDGET`."""
    return _PER_VALUE + _PER_AXIS * axes + sys.getsizeof(tag) + sys.getsizeof(kind)


def _values(cursor: Cursor, budget: int) -> Iterator[_Value]:
    """Every value of the file in order; stops at the checksum tail or the end.

    A file that is hardly more than framing is refused before its values become objects a hundred times its size.
    """
    memory = 0
    while cursor.pos < cursor.size and not _at_crc(cursor):
        field = next(fields(cursor, cursor.size))
        if (field.number, field.wire) != (1, BYTES):
            raise _unknown(cursor, field, "Checkpoint")
        cursor.pos = field.value
        value = _value(cursor, field)
        memory += value_bytes(value.tag, len(value.dims), value.type)
        if memory > cursor.size + budget:
            raise FormatError(
                f"{cursor.path!r}: its table of contents up to byte {field.stop} takes {memory >> 20} MiB of memory, "
                f"and a file of {cursor.size} bytes may take {cursor.size + budget >> 20} MiB: save it in several files"
            )
        yield value
        cursor.pos = field.stop


def _value(cursor: Cursor, outer: Field) -> _Value:
    """The value that starts at the cursor."""
    tag: Optional[str] = None
    tensor: Optional[tuple[Shape, str, Extent]] = None
    map_at: Optional[int] = None
    for field in fields(cursor, outer.stop):
        if field.number == 1 and field.wire == BYTES and tag is None:
            tag = _text(cursor, field, "name")
        elif field.number == 2 and field.wire == BYTES and tensor is None:
            tensor = _tensor(cursor, field)
        elif field.number == 3 and field.wire == BYTES:
            map_at = field.offset
        else:
            raise _unknown(cursor, field, "Value")
    if map_at is not None:
        raise MapParameterError(
            f"{cursor.path!r}: parameter {tag!r} at byte {map_at} is a MapParameter (a hash table), which has no shape "
            "to cut, so the file is not read, whatever a choice_func here leaves out; load it with MindSpore, and "
            "save it without the table (choice_func of mindspore.save_checkpoint)"
        )
    if tag is None or tensor is None:
        raise _bad(cursor, outer.offset, f"a value without a {'name' if tag is None else 'tensor'}")
    return _Value(tag, *tensor, outer.offset)


def _tensor(cursor: Cursor, outer: Field) -> tuple[Shape, str, Extent]:
    """Dims, type and place of the contents of the TensorProto whose field is `outer`."""
    cursor.pos = outer.value
    dims: list[int] = []
    kind: Optional[str] = None
    contents: Optional[Extent] = None
    for field in fields(cursor, outer.stop):
        if field.number == 1 and field.wire in (VARINT, BYTES):
            dims += _dims(cursor, field)
        elif field.number == 2 and field.wire == BYTES and kind is None:
            kind = _text(cursor, field, "tensor_type")
        elif field.number == 3 and field.wire == BYTES and contents is None:
            contents = Extent(field.value, field.stop - field.value)
        else:
            raise _unknown(cursor, field, "TensorProto")
        if len(dims) > MAX_RANK:
            raise _bad(cursor, outer.offset, f"a tensor of more than {MAX_RANK} axes")
    if kind is None or contents is None:
        raise _bad(cursor, outer.offset, f"a tensor without {'tensor_type' if kind is None else 'tensor_content'}")
    return tuple(dims), kind, contents


def _dims(cursor: Cursor, field: Field) -> list[int]:
    """The numbers of one `dims` field: one of them, or several packed ones."""
    if field.wire == VARINT:
        found = [field.value]
    else:
        found, cursor.pos = [], field.value
        while cursor.pos < field.stop and len(found) <= MAX_RANK:
            found.append(cursor.varint(field.stop))
    if any(signed(dim) < 0 for dim in found):
        raise _bad(cursor, field.offset, f"the negative dimension {min(map(signed, found))}")
    return found


def _text(cursor: Cursor, field: Field, what: str) -> str:
    length = field.stop - field.value
    if length > MAX_TEXT:
        raise _bad(cursor, field.offset, f"a {what} of {length} bytes, above {MAX_TEXT}")
    cursor.pos = field.value
    raw = cursor.take(length, field.stop)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(cursor, field.offset, f"a {what} that is not UTF-8 ({raw[:32]!r})") from None


def _entry(cursor: Cursor, parts: list[_Value]) -> TensorEntry:
    """One tensor from its consecutive values."""
    first, total = parts[0], sum(part.contents.length for part in parts)
    for part in parts[1:]:
        if (part.dims, part.type) != (first.dims, first.type):
            raise _bad(
                cursor,
                part.offset,
                f"parameter {first.tag!r} goes on as {part.type} {part.dims} after {first.type} {first.dims}",
            )
    if len(parts) > 1 and not total:
        raise _bad(cursor, parts[1].offset, f"parameter {first.tag!r}, which has no bytes, has {len(parts)} values")
    dtype = _dtype(cursor, first)
    shape = _shape(dtype, first.dims, total)
    if dtype.nbytes(prod(shape)) != total:
        raise _bad(
            cursor,
            first.offset,
            f"parameter {first.tag!r}, {first.type} {shape}, has {total} bytes in {len(parts)} value(s) "
            f"where {dtype.nbytes(prod(shape))} are expected",
        )
    if not countable(dtype, shape):
        raise _bad(cursor, first.offset, f"parameter {first.tag!r} has the shape {shape}, which no array has")
    return TensorEntry(dtype, shape, tuple(part.contents for part in parts))


def _shape(dtype: DType, dims: Shape, total: int) -> Shape:
    if dtype.name == "STR":
        return (total * 8 // dtype.bits,)
    return () if dims == _SCALAR and total else dims


def _dtype(cursor: Cursor, value: _Value) -> DType:
    if value.type == INT4:
        return DTYPES["I8"]
    if value.type not in BY_MINDSPORE:
        raise FormatError(
            f"{cursor.path!r}: parameter {value.tag!r} at byte {value.offset} has the unknown tensor_type "
            f"{value.type[:64]!r}; known are {', '.join(sorted(BY_MINDSPORE))} and {INT4}; "
            "save it in one of these, or leave it out (choice_func of mindspore.save_checkpoint)"
        )
    return BY_MINDSPORE[value.type]


def _at_crc(cursor: Cursor) -> bool:
    return cursor.size - cursor.pos == CRC_TAIL and cursor.peek(CRC_TAIL).startswith(CRC_MARK)


def _crc(cursor: Cursor) -> dict[str, str]:
    """The checksum tail at the cursor, where the values have stopped."""
    if cursor.pos == cursor.size:
        return {}
    return {CRC_NUM: str(_crc_in(cursor.peek(CRC_TAIL))), CRC_OFFSET: str(cursor.pos)}


def _crc_in(tail: Union[bytes, bytearray]) -> int:
    return int.from_bytes(tail[len(CRC_MARK) :], "big")


def _require_checkpoint(cursor: Cursor) -> None:
    """Refuse a file whose first bytes are certainly not a checkpoint's, and say what it is."""
    if cursor.size == 0:
        raise TruncatedFileError(f"{cursor.path!r} is empty; a save was interrupted: choose another checkpoint")
    head = cursor.peek(table.HEAD_BYTES)
    container = sniff(head)
    if container is not None:
        raise DecryptionError(f"{cursor.path!r} is encrypted ({container}); pass the key it was saved with (dec_key)")
    if table.is_strategy(head):
        raise FormatError(f"{cursor.path!r} is a strategy file, not a checkpoint; pass it as the strategy instead")
    if head[0] != 0x0A and not _at_crc(cursor):
        other = table.what_else(head)
        raise FormatError(
            f"{cursor.path!r} is not a MindSpore .ckpt: its first byte is 0x{head[0]:02x} where 0x0a is expected"
            + (f"; it is {other}" if other else "")
            + "; check the path, the format argument, and whether the file is encrypted in a way of your own"
        )


def _unknown(cursor: Cursor, field: Field, message: str) -> FormatError:
    what = f"field {field.number} (wire type {field.wire}), unexpected or repeated in a {message} message"
    return _bad(cursor, field.offset, what)


def _bad(cursor: Cursor, offset: int, what: str) -> FormatError:
    return FormatError(
        f"{cursor.path!r}: at byte {offset}: {what}; the file is damaged or of another format: "
        "restore it or choose another checkpoint"
    )

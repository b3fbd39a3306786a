"""Protobuf's wire format, walked in place over a file.

A message is a run of fields. A field begins with a varint key, `number << 3 | wire type`, and then holds

    wire type 0   a varint: seven bits a byte, lowest first, high bit set on all but the last
    wire type 1   eight bytes
    wire type 2   a varint length and that many bytes: text, bytes, a message, packed numbers
    wire type 5   four bytes

`Cursor` reads these through small buffered reads; `fields` lists one message without entering the contents of
its length-delimited fields, so a gigabyte of tensor costs the few bytes of its key and length.
Source of the rules: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ms_ckpt_ext.errors import FormatError, TruncatedFileError
from ms_ckpt_ext.storage.reader import ByteReader

WINDOW = 4096
"""Bytes of one buffered read: a page, the least a system fetches; framing of a tensor is mostly below 200."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_WIDTH = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT = 10
"""Bytes of the longest varint, a 64-bit number."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: the field's number in its message.
        wire: its wire type.
        offset: where its key begins in the file.
        value: the varint, or the first byte of the contents (a file offset) for every other wire type.
        stop: file offset just behind the field.
    """

    number: int
    wire: int
    offset: int
    value: int
    stop: int


class Cursor:
    """A position in a file with a small window of bytes behind it. Not for several threads at once."""

    def __init__(self, reader: ByteReader, offset: int = 0, window: int = WINDOW) -> None:
        self.path = reader.path
        self.size = reader.size
        self.pos = offset
        self._reader = reader
        self._window = window
        self._base = self._top = offset
        self._data = b""

    def varint(self, end: int) -> int:
        """The unsigned varint at the cursor, which must end at or before `end`."""
        start = self.pos
        if self._base <= start < self._top and start < end:
            byte = self._data[start - self._base]
            if byte < 0x80:  # one byte at hand: by far the most common case
                self.pos = start + 1
                return byte
        value, shift, byte = 0, 0, 0x80
        while byte >= 0x80 and shift < 7 * _MAX_VARINT:
            byte = self._byte(end)
            value |= (byte & 0x7F) << shift
            shift += 7
        if byte >= 0x80 or value >> 64:
            raise FormatError(f"{self.path!r}: the number at byte {start} exceeds 64 bits; {_DAMAGED}")
        return value

    def take(self, length: int, end: int) -> bytes:
        """The next `length` bytes, which must end at or before `end`."""
        self.demand(length, end)
        if self.pos < self._base or self.pos + length > self._top:
            self._fill(length)
        at = self.pos - self._base
        self.pos += length
        return self._data[at : at + length]

    def peek(self, length: int) -> bytes:
        """The next `length` bytes, or what is left of the file; the cursor stays."""
        start = self.pos
        found = self.take(min(length, self.size - start), self.size)
        self.pos = start
        return found

    def _byte(self, end: int) -> int:
        pos = self.pos
        if pos >= end or not self._base <= pos < self._top:
            self.demand(1, end)
            self._fill(1)
        self.pos = pos + 1
        return self._data[pos - self._base]

    def _fill(self, need: int) -> None:
        """Refill the window from the cursor on; `need` bytes are known to exist."""
        length = min(max(need, self._window), self.size - self.pos)
        data = bytearray(length)
        self._reader.read_into(self.pos, memoryview(data))
        self._base, self._top, self._data = self.pos, self.pos + length, bytes(data)

    def demand(self, length: int, end: int) -> None:
        """Raise unless the next `length` bytes end at or before `end`."""
        if self.pos + length <= end:
            return
        if end >= self.size:
            raise TruncatedFileError(
                f"{self.path!r} ends at byte {self.size}, but {length} bytes are expected at byte {self.pos}; {_SHORT}"
            )
        raise FormatError(
            f"{self.path!r}: {length} bytes at byte {self.pos} run past byte {end}, where their message ends; "
            f"{_DAMAGED}"
        )


_DAMAGED = "the file is damaged or of another format: restore it or choose another one"
_SHORT = "the file was cut off (an interrupted save or copy?): restore it or choose another checkpoint"


def fields(cursor: Cursor, end: int) -> Iterator[Field]:
    """The fields of the message from the cursor to `end`, in file order; the contents of `BYTES` fields are skipped.

    The consumer may move the cursor between two fields.

    Raises:
        TruncatedFileError: a length points beyond the end of the file.
        FormatError: a length points beyond its message, or the wire type does not exist.
    """
    while cursor.pos < end:
        offset = cursor.pos
        key = cursor.varint(end)
        wire = key & 7
        value = stop = 0
        if wire == BYTES:
            length = cursor.varint(end)
            value = cursor.pos
            cursor.demand(length, end)
            stop = value + length
        elif wire == VARINT:
            value = cursor.varint(end)
            stop = cursor.pos
        elif wire in _FIXED_WIDTH:
            value = cursor.pos
            cursor.demand(_FIXED_WIDTH[wire], end)
            stop = value + _FIXED_WIDTH[wire]
        else:
            raise FormatError(f"{cursor.path!r}: wire type {wire} at byte {offset} does not exist; {_DAMAGED}")
        yield Field(key >> 3, wire, offset, value, stop)
        cursor.pos = stop


def signed(value: int) -> int:
    """A varint read as the two's complement number of 64 bits that int32 and int64 fields hold.

    >>> signed(2**64 - 1)
    -1
    """
    return value - (1 << 64) if value >> 63 else value


def encode_varint(value: int) -> bytes:
    """The varint of a non-negative number.

    >>> encode_varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_bytes(number: int, contents: bytes) -> bytes:
    """A whole length-delimited field.

    >>> encode_bytes(1, b"w")
    b'\\n\\x01w'
    """
    return encode_varint(number << 3 | BYTES) + encode_varint(len(contents)) + contents


def encode_number(number: int, value: int) -> bytes:
    """A whole varint field; a negative number as two's complement of 64 bits, as int32 and int64 fields hold it.

    >>> encode_number(1, -1).hex()
    '08ffffffffffffffffff01'
    """
    assert -(1 << 63) <= value < 1 << 64, value
    return encode_varint(number << 3 | VARINT) + encode_varint(value & (1 << 64) - 1)

"""CRC-32 of a file's parts: read in order, or combined from stretches that were written in any order.

The CRC-32 of two stretches together follows from their own and the length of the second: appending n bytes multiplies
the first by x^(8n) in GF(2)[x] modulo the generator (as in zlib's `crc32_combine`, which Python's zlib lacks).
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Callable, NamedTuple, Optional, Union

from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import ChecksumError
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.reader import ByteReader


class Integer(NamedTuple):
    """An integer scalar n of a file, which MindSpore's checksum of safetensors counts as n zero bytes.

    MindSpore calls `bytes(array)`, which for a 0-d integer array is `bytes(number)`. That fails for a negative number,
    which counts here as its own bytes.
    """

    extent: Extent
    signed: bool

    def extend(self, crc: int, contents: bytes) -> int:
        """The checksum so far, extended by this number."""
        number = int.from_bytes(contents, "little", signed=self.signed)
        return zlib.crc32(contents, crc) if number < 0 else _multiply(_shift(number), crc ^ _ALL) ^ _ALL


Covered = Union[bytes, Extent, Integer]
"""What a checksum covers: given bytes, a stretch of the file, or an integer scalar in it."""


class StoredChecksum(NamedTuple):
    """A checksum in a file: what it covers, and `fault`: a computed sum -> what is wrong with it, None if nothing."""

    parts: tuple[Covered, ...]
    fault: Callable[[int], Optional[str]]

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The stretches of the file that it covers."""
        found = (part.extent if isinstance(part, Integer) else part for part in self.parts)
        return tuple(part for part in found if isinstance(part, Extent))


_PIECE = 4 << 20
_GENERATOR = 0xEDB88320  # reflected: the highest bit is x^0
_ONE = 1 << 31
_ALL = 2**32 - 1


def crc_of(reader: ByteReader, parts: Iterable[Covered], piece: int = _PIECE) -> int:
    """CRC-32 of parts of a file one after another, read `piece` bytes at a time."""
    buffer = linux.scratch(0)
    crc = 0
    for part in parts:
        if isinstance(part, bytes):
            crc = zlib.crc32(part, crc)
            continue
        if isinstance(part, Integer):
            contents = bytearray(part.extent.length)
            reader.read_into(part.extent.offset, memoryview(contents))
            crc = part.extend(crc, bytes(contents))
            continue
        if len(buffer) < min(piece, part.length):
            buffer = linux.scratch(min(piece, part.length))
        for done in range(0, part.length, piece):
            read = buffer[: min(piece, part.length - done)]
            reader.read_into(part.offset + done, read)
            crc = zlib.crc32(read, crc)
    return crc


def verify_stored(reader: ByteReader, stored: Optional[StoredChecksum]) -> bool:
    """Compare a file's checksum with its contents; False when it has none. Raises ChecksumError."""
    if stored is None:
        return False
    fault = stored.fault(_sum_of(reader, stored.parts))
    if fault is not None:
        raise ChecksumError(fault)
    return True


def _sum_of(reader: ByteReader, parts: tuple[Covered, ...]) -> int:
    shorter = reader.traits.crc32
    if shorter is not None and len(parts) == 1 and isinstance(parts[0], Extent) and parts[0].offset == 0:
        return shorter(parts[0].length)
    return crc_of(reader, parts)


class Sums:
    """The CRC-32 of parts of a file, combined from stretches that come in any order."""

    def __init__(self, parts: Sequence[Covered]) -> None:
        self._parts = parts
        self._numbers = {
            part.extent.offset: bytearray(part.extent.length) for part in parts if isinstance(part, Integer)
        }
        extents = [part.extent if isinstance(part, Integer) else part for part in parts if not isinstance(part, bytes)]
        self._seams = sorted({offset for e in extents for offset in (e.offset, e.offset + e.length)})
        self._found: dict[int, tuple[int, int]] = {}

    def add(self, offset: int, buffer: memoryview) -> None:
        """Sum a stretch, cut where parts of the checksum begin or end."""
        stop = offset + len(buffer)
        if offset == stop:
            return
        seams = self._seams[bisect_right(self._seams, offset) : bisect_left(self._seams, stop)]
        for low, high in zip((offset, *seams), (*seams, stop)):
            piece = buffer[low - offset : high - offset]
            self._found[low] = (zlib.crc32(piece), high - low)
            if self._numbers:
                self._note(low, piece)

    def _note(self, low: int, piece: memoryview) -> None:
        """Keep the bytes of a number, which may come in parts."""
        at = bisect_right(self._seams, low) - 1
        number = self._numbers.get(self._seams[at]) if at >= 0 else None
        if number is not None:
            skip = low - self._seams[at]
            number[skip : skip + len(piece)] = piece[: max(0, len(number) - skip)]

    def total(self) -> int:
        """The checksum."""
        crc = 0
        for part in self._parts:
            if isinstance(part, bytes):
                crc = zlib.crc32(part, crc)
                continue
            if isinstance(part, Integer):
                crc = part.extend(crc, bytes(self._numbers[part.extent.offset]))
                continue
            at = part.offset
            while at < part.offset + part.length:
                found, length = self._found[at]
                crc, at = combine(crc, found, length), at + length
        return crc


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two stretches together, from their own; the second is `length` bytes long.

    >>> combine(zlib.crc32(b"sea"), zlib.crc32(b"shell"), 5) == zlib.crc32(b"seashell")
    True
    """
    return _multiply(_shift(length), first) ^ second


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x^(8 * length) modulo the generator."""
    result, power = _ONE, _multiply(_ONE >> 4, _ONE >> 4)  # x^8
    while length:
        if length & 1:
            result = _multiply(result, power)
        power, length = _multiply(power, power), length >> 1
    return result


def _multiply(a: int, b: int) -> int:
    """Product of two reflected polynomials modulo the generator."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_GENERATOR if b & 1 else 0)
    return product

"""A file's checksum, put together from what is written, in whatever order: nothing is read back for it."""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from typing import Optional

from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.formats.checksum import Integer, combine
from ms_ckpt_ext.formats.index import FileLayout
from ms_ckpt_ext.storage.sink import Sink


class Sums:
    """The CRC-32 of everything written, by where it was written."""

    def __init__(self, layout: FileLayout) -> None:
        assert layout.checksum is not None
        self._parts = layout.checksum.parts
        numbers = [part.extent for part in self._parts if isinstance(part, Integer)]
        extents = [part for part in self._parts if isinstance(part, Extent)] + numbers
        self._seams = sorted({offset for e in extents for offset in (e.offset, e.offset + e.length)})
        self._found: dict[int, tuple[int, int]] = {}
        self._numbers = dict.fromkeys((extent.offset for extent in numbers), b"")
        for offset, literal in layout.fixed:
            self.add(offset, memoryview(literal))

    def add(self, offset: int, buffer: memoryview) -> None:
        """Sum a stretch, cut where parts of the checksum begin or end."""
        stop = offset + len(buffer)
        if offset == stop:
            return
        seams = self._seams[bisect_right(self._seams, offset) : bisect_left(self._seams, stop)]
        for low, high in zip((offset, *seams), (*seams, stop)):
            piece = buffer[low - offset : high - offset]
            if low in self._numbers:  # of a few bytes, and never written in parts
                self._numbers[low] = bytes(piece)
            self._found[low] = (zlib.crc32(piece), high - low)

    def total(self) -> int:
        """The checksum."""
        crc = 0
        for part in self._parts:
            if isinstance(part, bytes):
                crc = zlib.crc32(part, crc)
                continue
            if isinstance(part, Integer):
                crc = part.extend(crc, self._numbers[part.extent.offset])
                continue
            at = part.offset
            while at < part.offset + part.length:
                found, length = self._found[at]
                crc, at = combine(crc, found, length), at + length
        return crc


class SummingSink:
    """Another sink's file, of which the checksum is written when all else is. See `storage.sink.Sink`.

    Args:
        sink: takes the bytes.
        layout: the file. Its literals but the checksum count as written.
    """

    fd: Optional[int] = None

    def __init__(self, sink: Sink, layout: FileLayout) -> None:
        self._sink, self._layout, self.path, self.unit = sink, layout, sink.path, sink.unit
        self._sums = Sums(layout)

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write and sum."""
        self._sums.add(offset, buffer)
        self._sink.write(offset, buffer)

    def finish(self) -> None:
        """Write the checksum, and finish the file. Raises ChecksumError where a checksum is known and another."""
        checksum = self._layout.checksum
        assert checksum is not None
        self._sink.write(checksum.offset, memoryview(checksum.render(self._sums.total())))
        self._sink.finish()

    def close(self) -> None:
        """Close without a promise."""
        self._sink.close()

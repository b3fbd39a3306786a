"""A file's checksum, put together from what is written, in whatever order: nothing is read back for it."""

from __future__ import annotations

from typing import Optional

from ms_ckpt_ext.formats.checksum import Sums
from ms_ckpt_ext.formats.index import FileLayout
from ms_ckpt_ext.storage.sink import Sink


class SummingSink:
    """Another sink's file, of which the checksum is written when all else is. See `storage.sink.Sink`.

    Args:
        sink: takes the bytes.
        layout: the file. Its literals but the checksum count as written.
    """

    fd: Optional[int] = None

    def __init__(self, sink: Sink, layout: FileLayout) -> None:
        self._sink, self._layout, self.path, self.unit = sink, layout, sink.path, sink.unit
        assert layout.checksum is not None
        self._sums = Sums(layout.checksum.parts)
        for offset, literal in layout.fixed:
            self._sums.add(offset, memoryview(literal))

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

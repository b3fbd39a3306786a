"""A file in memory, as what reads a file sees it, and what a reader has of a tensor."""

from __future__ import annotations

from typing import Optional

from ms_ckpt_ext.errors import TruncatedFileError
from ms_ckpt_ext.formats.index import TensorEntry
from ms_ckpt_ext.storage.reader import ByteReader, Traits


class MemoryReader:
    """Bytes at hand as a ByteReader."""

    fd: Optional[int] = None
    traits = Traits()
    mtime_ns = 0

    def __init__(self, data: bytes, path: str = "<memory>") -> None:
        self.path = path
        self.size = self.disk_size = len(data)
        self._data = memoryview(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        found = self._data[offset : offset + len(buffer)]
        if offset < 0 or len(found) < len(buffer):
            raise TruncatedFileError(f"{self.path!r} has {self.size} bytes; {len(buffer)} are wanted at byte {offset}")
        buffer[:] = found

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> MemoryReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read(reader: ByteReader, offset: int, length: int) -> bytes:
    """A range of what a reader reads."""
    out = bytearray(length)
    reader.read_into(offset, memoryview(out))
    return bytes(out)


def contents(reader: ByteReader, entry: TensorEntry) -> bytes:
    """All bytes of a tensor."""
    return b"".join(read(reader, extent.offset, extent.length) for extent in entry.extents)

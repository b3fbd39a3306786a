"""Ranged reads. A reader shows a file as a flat array of bytes; ciphers and other layers are readers over readers."""

from __future__ import annotations

import errno
import os
import stat
from array import array
from typing import Callable, NamedTuple, Optional, Protocol

from ms_ckpt_ext.errors import ReadError, StorageError, TruncatedFileError, storage_error
from ms_ckpt_ext.storage import linux

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for its writer
_MOST_PLACES = 1024
"""What one call of the kernel fills at most (Linux: UIO_MAXIOV)."""


Take = Callable[[int, memoryview], None]
"""Given an offset and the bytes there, which may be overwritten afterwards."""


class Traits(NamedTuple):
    """How a reader is best asked, beyond reading any range.

    Attributes:
        container: what its bytes come through: "plain", or the container that the file is encrypted in.
        unit: bytes that it makes at once: reads that begin and end at its multiples mostly cost nothing twice; 0 where
            any range is as good as another.
        keeps: most bytes of plaintext that it keeps in memory.
        stream: hands a range (offset, length) over in pieces, in order; where that is better than reading it. Pieces
            may come before it is known that they are authentic, which the end of the call tells.
        crc32: CRC-32 of the bytes up to an offset, where the reader knows a shorter way than reading them.
    """

    container: str = "plain"
    unit: int = 0
    keeps: int = 0
    stream: Optional[Callable[[int, int, Take], None]] = None
    crc32: Optional[Callable[[int], int]] = None


PLAIN_TRAITS = Traits()


class ByteReader(Protocol):
    """The bytes of one file, at any offset, from any thread."""

    path: str
    size: int
    """Bytes that can be read; `disk_size` is what the file takes on disk, which differs where it is encrypted."""
    disk_size: int
    mtime_ns: int
    fd: Optional[int]
    """Descriptor whose offsets are this reader's, for copies inside the kernel; None where bytes are transformed."""
    traits: Traits

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (flat bytes) from `offset`. Raises TruncatedFileError or StorageError."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> ByteReader: ...

    def __exit__(self, *_: object) -> None: ...


class PlainReader:
    """A file as it lies on disk. No mmap: a file on a network file system may change or vanish under a map."""

    traits = PLAIN_TRAITS

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd: Optional[int] = os.open(path, _FLAGS)
        except OSError as error:
            raise storage_error("open", path, error, ReadError) from error
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ReadError(
                errno.EINVAL,
                f"cannot read {path!r}: it is no regular file, but a folder, a pipe or a device; check the path",
            )
        self.size = self.disk_size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        done, total = 0, len(buffer)
        while done < total:
            done += self._read(lambda fd, at: os.preadv(fd, [buffer[at - offset :]], at), offset + done, total - done)

    def scatter(self, offset: int, vector: array[int]) -> None:
        """Fill the places in `vector`, as `linux.scatter` takes it, with the bytes from `offset` on; as `read_into`."""
        done = 0
        while done < len(vector):
            some = vector[done : done + 2 * _MOST_PLACES]
            wanted = sum(some[1::2])
            got = self._read(lambda fd, at: linux.scatter(fd, some, at), offset, wanted)  # noqa: B023 - called at once
            offset += got
            if got == wanted:
                done += len(some)
                continue
            while got >= vector[done + 1]:  # the kernel stopped early
                got -= vector[done + 1]
                done += 2
            vector[done] += got
            vector[done + 1] -= got

    def _read(self, call: Callable[[int, int], int], offset: int, wanted: int) -> int:
        """One call of the kernel; it may stop short of `wanted` bytes, but not before the first."""
        if self.fd is None:
            raise StorageError(0, f"cannot read {self.path!r}: the reader is closed")
        try:
            got = call(self.fd, offset)
        except OSError as error:
            raise storage_error(f"read {wanted} bytes at offset {offset} of", self.path, error, ReadError) from error
        if got == 0 and wanted:
            raise TruncatedFileError(
                f"{self.path!r} ended at byte {offset} while {wanted} more bytes were expected there; "
                "the file was truncated after its header was read: restore it or choose another checkpoint"
            )
        return got

    def close(self) -> None:
        """Release the file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

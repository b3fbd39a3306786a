"""Ranged reads. A reader shows a file as a flat array of bytes; ciphers and other layers are readers over readers."""

from __future__ import annotations

import os
from typing import Optional, Protocol

from ms_ckpt_ext.errors import StorageError, TruncatedFileError, storage_error


class ByteReader(Protocol):
    """The bytes of one file, at any offset, from any thread."""

    path: str
    size: int
    """Bytes that can be read; `disk_size` is what the file takes on disk, which differs where it is encrypted."""
    disk_size: int
    mtime_ns: int
    fd: Optional[int]
    """Descriptor whose offsets are this reader's, for copies inside the kernel; None where bytes are transformed."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (flat bytes) from `offset`. Raises TruncatedFileError or StorageError."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> ByteReader: ...

    def __exit__(self, *_: object) -> None: ...


class PlainReader:
    """A file as it lies on disk. No mmap: a file on a network file system may change or vanish under a map."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd: Optional[int] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise storage_error("open", path, error) from error
        status = os.fstat(self.fd)
        self.size = self.disk_size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        if self.fd is None:
            raise StorageError(0, f"cannot read {self.path!r}: the reader is closed")
        done, total = 0, len(buffer)
        while done < total:
            try:
                got = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise storage_error(
                    f"read {total - done} bytes at offset {offset + done} of", self.path, error
                ) from error
            if got == 0:
                raise TruncatedFileError(
                    f"{self.path!r} ended at byte {offset + done} while {total - done} more bytes were expected there; "
                    "the file was truncated after its header was read: restore it or choose another checkpoint"
                )
            done += got

    def close(self) -> None:
        """Release the file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

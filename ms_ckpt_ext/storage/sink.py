"""Where bytes land: a preallocated file written at any offset from any thread, or memory that is already there."""

from __future__ import annotations

import errno
import os
from typing import Any, Optional, Protocol

from ms_ckpt_ext.errors import storage_error
from ms_ckpt_ext.storage.linux import copies_by_itself, preallocate, start_writeback
from ms_ckpt_ext.storage.reader import ByteReader

# The kernel or file system cannot copy between these two files by itself; bytes through a buffer always work.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
# Longer writes make the page cache look for huge stretches of free memory, which are slow to find, above all in
# virtual machines that hand free memory back to their host.
_WRITE = 1 << 20


class Sink(Protocol):
    """Something of known size that takes bytes at any offset, from any thread, each byte once.

    Bytes that are written may turn out not to be authentic: then the job fails, and none of them appear anywhere.
    A `MemorySink` may be a Parameter: what fills it was authenticated before, see `engine.integrity.authenticate`.

    Attributes:
        path: what messages call it.
        fd: descriptor whose offsets are this sink's, for copies inside the kernel; None where bytes are transformed
            (encrypted, say), there is no file, or its file system does not copy by itself.
        unit: bytes that are transformed at once: writes that begin and end at its multiples do not wait; 0 for none.
    """

    path: str
    fd: Optional[int]
    unit: int

    def write(self, offset: int, buffer: memoryview) -> None:
        """Take `buffer` (flat bytes) at `offset`; it may be reused afterwards. Raises StorageError."""

    def finish(self) -> None:
        """Make the bytes durable after the last write, and close. Raises StorageError."""

    def close(self) -> None:
        """Close without making anything durable; also allowed after `finish`."""


class FileLike(Sink, Protocol):
    """A sink with a file behind it."""

    def read_back(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes that were written at `offset`. Raises StorageError."""


class FileSink:
    """A file of known size, created empty and filled at any offset.

    Args:
        sync: whether `finish` makes the bytes durable; else the kernel writes them when it likes.
    """

    unit = 0

    def __init__(self, path: str, size: int, sync: bool = True) -> None:
        self.path, self._sync = path, sync
        try:
            self._file: Optional[int] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error("create", path, error) from error
        try:
            preallocate(self._file, size)
        except OSError as error:
            self.close()
            os.unlink(path)
            raise storage_error(f"reserve {size} bytes for", path, error) from error
        self.fd = self._file if copies_by_itself(self._file) else None

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write `buffer` (flat bytes) at `offset`, and start its way to disk if it is to be there in the end."""
        file, done = self._open(), 0
        while done < len(buffer):
            try:
                done += os.pwrite(file, buffer[done : done + _WRITE], offset + done)
            except OSError as error:
                raise storage_error(f"write {len(buffer)} bytes at offset {offset} of", self.path, error) from error
        if self._sync:
            start_writeback(file, offset, len(buffer))

    def read_back(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes that were written at `offset`."""
        file, done = self._open(), 0
        while done < len(buffer):
            try:
                got = os.preadv(file, [buffer[done:]], offset + done)
            except OSError as error:
                raise storage_error(f"read {len(buffer)} bytes at offset {offset} of", self.path, error) from error
            if got == 0:
                raise storage_error("read back", self.path, OSError(errno.EIO, "the file was cut short"))
            done += got

    def finish(self) -> None:
        """Make the bytes durable, if that is wanted, and close."""
        try:
            if self._sync:
                os.fsync(self._open())
        except OSError as error:
            raise storage_error("sync", self.path, error) from error
        finally:
            self.close()

    def _open(self) -> int:
        if self._file is None:
            raise storage_error("write to", self.path, OSError(errno.EBADF, "closed"))
        return self._file

    def close(self) -> None:
        """Close without making anything durable."""
        file, self._file, self.fd = self._file, None, None
        if file is not None:
            os.close(file)


def kernel_copy(reader: ByteReader, source: int, sink: Sink, offset: int, length: int) -> int:
    """Copy a stretch of a file into a sink inside the kernel; returns how many bytes it copied, from the first on.

    Fewer than `length` where kernel or file system do not copy between these two: the rest needs a buffer.

    Raises:
        StorageError: the copy failed for another reason.
    """
    done = 0
    while done < length and reader.fd is not None and sink.fd is not None and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(reader.fd, sink.fd, length - done, source + done, offset + done)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            what = f"copy {length - done} bytes from offset {source + done} of {reader.path!r} into offset "
            raise storage_error(f"{what}{offset + done} of", sink.path, error) from error
        if copied == 0:  # end of the source, or a file system that reports no error: the read will show
            break
        done += copied
    return done


class MemorySink:
    """Bytes of an array that exists already: a Parameter's memory, or a buffer."""

    path = "memory"
    fd: Optional[int] = None
    unit = 0

    def __init__(self, array: Any) -> None:
        self.bytes = memoryview(array)
        if self.bytes.format != "B" or self.bytes.ndim != 1 or not self.bytes.contiguous or self.bytes.readonly:
            raise ValueError("a memory sink is a flat, contiguous, writable uint8 array")

    def write(self, offset: int, buffer: memoryview) -> None:
        """Copy `buffer` to `offset`."""
        self.bytes[offset : offset + len(buffer)] = buffer

    def finish(self) -> None:
        """Nothing to do: the memory is its owner's."""

    def close(self) -> None:
        """Nothing to do: the memory is its owner's."""

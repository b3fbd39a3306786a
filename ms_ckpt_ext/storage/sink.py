"""Where bytes land: a preallocated file written at any offset from any thread, or memory that is already there."""

from __future__ import annotations

import errno
import os
from typing import Optional, Union

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.errors import storage_error
from ms_ckpt_ext.storage.linux import preallocate, start_writeback
from ms_ckpt_ext.storage.reader import ByteReader

# The kernel or file system cannot copy between these two files by itself; bytes through a buffer always work.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
_BUFFER = 1 << 20  # stays in a core's cache between read and write


class FileSink:
    """A file of known size, created empty and filled at any offset."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise storage_error("create", path, error) from error
        try:
            preallocate(self.fd, size)
        except OSError as error:
            os.close(self.fd)
            os.unlink(path)
            raise storage_error(f"reserve {size} bytes for", path, error) from error

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write `buffer` (flat bytes) at `offset` and start its way to disk."""
        done = 0
        while done < len(buffer):
            try:
                done += os.pwrite(self.fd, buffer[done:], offset + done)
            except OSError as error:
                raise storage_error(f"write {len(buffer)} bytes at offset {offset} of", self.path, error) from error
        start_writeback(self.fd, offset, len(buffer))

    def copy_from(self, reader: ByteReader, source: int, offset: int, length: int) -> None:
        """Copy a stretch of a source file to `offset`: inside the kernel where that works, else through a buffer."""
        done = self._kernel_copy(reader.fd, source, offset, length) if reader.fd is not None else 0
        if done < length:
            scratch = memoryview(bytearray(min(_BUFFER, length - done)))
            while done < length:
                part = scratch[: min(len(scratch), length - done)]
                reader.read_into(source + done, part)
                self.write(offset + done, part)
                done += len(part)

    def _kernel_copy(self, fd: int, source: int, offset: int, length: int) -> int:
        done = 0
        while done < length and hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(fd, self.fd, length - done, source + done, offset + done)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    break
                raise storage_error(
                    f"copy {length - done} bytes into offset {offset + done} of", self.path, error
                ) from error
            if copied == 0:  # end of the source, or a file system that cannot say no: the buffer will tell
                break
            done += copied
        start_writeback(self.fd, offset, done)
        return done

    def finish(self) -> None:
        """Make the bytes durable and close. Raises StorageError."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise storage_error("sync", self.path, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close without a promise."""
        fd: Optional[int] = self.fd
        if fd is not None and fd >= 0:
            self.fd = -1
            os.close(fd)


class MemorySink:
    """Bytes of an array that exists already: a Parameter's memory, or a buffer."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError("a memory sink is a flat, contiguous, writable uint8 array")
        self.array = array


Sink = Union[FileSink, MemorySink]

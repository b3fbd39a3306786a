"""Calls that Python's `os` lacks, with a harmless answer where the platform or file system refuses them."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from array import array
from functools import lru_cache
from typing import Any

_START_WRITEBACK = 2  # SYNC_FILE_RANGE_WRITE
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# statfs(2) types of file systems whose server copies, so that the bytes do not cross the network twice: NFS 4.2, CIFS,
# SMB 2, Ceph, FUSE. Others copy page by page, slower than a read and a write; those that could share blocks (XFS,
# Btrfs) do so only between offsets that are multiples of a block, which those of tensors are not.
_COPY_BY_THEMSELVES = {0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400, 0x65735546}


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


def preallocate(fd: int, size: int) -> None:
    """Reserve `size` bytes for an empty file, or at least set its length.

    Not `os.posix_fallocate`, which the C library emulates by writing to every block where the file system cannot
    reserve (most network file systems).

    Raises:
        OSError: no space.
    """
    libc = _libc()
    if libc is not None and size:
        if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def can_scatter() -> bool:
    """True where `scatter` works: its vectors are of 64-bit addresses."""
    return ctypes.sizeof(ctypes.c_void_p) == 8 and hasattr(_libc(), "preadv")


def scatter(fd: int, vector: array[int], offset: int) -> int:
    """Read once from `offset` into the places in `vector`: address and length in bytes of each, in turn.

    `os.preadv` takes an object for every place, which takes Python longer to make than the kernel to fill.

    Args:
        vector: "Q" items, at most 2 * 1024; the memory at these addresses must stay where it is meanwhile.

    Returns:
        Bytes read, which may be fewer than there is place for.

    Raises:
        OSError: the read failed.
    """
    address, items = vector.buffer_info()
    while True:
        got: int = _preadv()(fd, address, items // 2, offset)
        if got >= 0:
            return got
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


@lru_cache(maxsize=1)
def _preadv() -> Any:
    call = _libc().preadv
    call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    call.restype = ctypes.c_ssize_t
    return call


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files (often 1,024) towards `count` more than usual, as far as the hard one lets."""
    try:
        import resource
    except ImportError:  # not a Unix system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def boot_id() -> bytes:
    """Tells this boot of this machine from every other; where that cannot be told, every call from every other."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read()
    except OSError:
        return os.urandom(16)


def copies_by_itself(fd: int) -> bool:
    """True when an open file is on a file system for which `os.copy_file_range` saves work."""
    libc = _libc()
    if libc is None:
        return False
    status = (ctypes.c_long * 32)()  # struct statfs, 120 bytes; its first word is the type
    return bool(libc.fstatfs(fd, status) == 0 and status[0] & 0xFFFFFFFF in _COPY_BY_THEMSELVES)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range to disk, so that a later fsync finds little left to do."""
    libc = _libc()
    if libc is not None:
        libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(_START_WRITEBACK))

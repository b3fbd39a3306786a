"""What Python's `os` lacks: small files read or replaced whole, temporary names that fit, and names made durable;
calls of Linux, with a harmless answer where the system refuses them; scratch memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import sys
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, Union

from ms_ckpt_ext.errors import naming, storage_error

_LONGEST = 120
"""Most bytes of a temporary name. File systems take 255, encrypted ones 143; the name of a result may be as long."""
_KEPT = 72
"""Bytes that are kept of a name that is too long for a temporary one, so that people recognise it."""
PAGE = 4096
MOST_BYTES = 1 << 31
"""Most bytes of a file read whole: protobuf's limit for a strategy; indexes of millions of tensors are shorter."""
_PIECE = 1 << 16
_APART = 64
"""The target of a copy should lie as far into its page as the source into its own, or at least these bytes further.

AMD's processors from Zen 3 on copy (`rep movsb`, which the kernel uses) at a quarter of their speed to a place that
lies 1 to 31 bytes further into its page than the source into its own. Offsets in files are often multiples of a page,
and a long buffer from `malloc` begins 16 bytes after one: in that very range.
"""
_START_WRITEBACK = 2  # SYNC_FILE_RANGE_WRITE
_ABSENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE),
    *(errno.EACCES, errno.EPERM),  # it is another user's
    *(errno.EISDIR, errno.ENXIO, None),  # what is there is no regular file, or too long, see `read_small`
}
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# statfs(2) types of file systems whose server copies, so that the bytes do not cross the network twice: NFS 4.2, CIFS,
# SMB 2, Ceph, FUSE. Others copy page by page, slower than a read and a write; those that could share blocks (XFS,
# Btrfs) do so only between offsets that are multiples of a block, which those of tensors are not.
_COPY_BY_THEMSELVES = {0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400, 0x65735546}


def require_absence(error: OSError, path: Union[str, Path], action: str = "look at") -> None:
    """Return if an error means that a file is absent, another user's, or not one of ours; else raise StorageError."""
    if error.errno not in _ABSENT:
        raise storage_error(action, str(path), error) from error


def status_of(path: Union[str, Path]) -> Optional[os.stat_result]:
    """The status of a file or folder; None when there is none, or it is another user's. Raises StorageError."""
    try:
        return os.stat(path)
    except OSError as error:
        require_absence(error, path)
        return None


def is_folder(path: Union[str, Path]) -> bool:
    """Whether there is such a folder. Raises StorageError; `os.path.isdir` would return False for every error."""
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def derived(path: Path, ending: str) -> Path:
    """A temporary name beside a file: its own with an ending or, where that is too long, its beginning and a digest.

    >>> derived(Path("out/part0.safetensors"), ".partial").name
    'part0.safetensors.partial'
    >>> len(derived(Path("out/" + "q" * 255), ".partial").name)
    97
    """
    raw = os.fsencode(path.name)
    if len(raw) + len(ending) <= _LONGEST:
        return path.with_name(path.name + ending)
    import xxhash

    begins = raw[:_KEPT].decode(errors="ignore")  # which may end within a character
    return path.with_name(f"{begins}-{xxhash.xxh3_64_hexdigest(raw)}{ending}")


def is_below(name: str) -> bool:
    """Whether a name from a note is one that a file below the note's folder can have; links are not looked at.

    >>> is_below("rank_0/net.ckpt"), is_below("../net.ckpt"), is_below("/etc/passwd"), is_below("a\\0b")
    (True, False, False, False)
    """
    try:
        return not {b"", b".", b".."} & {*os.fsencode(name).split(b"/")} and "\0" not in name
    except UnicodeEncodeError:  # half a character
        return False


def only_name(path: str) -> Optional[tuple[int, int]]:
    """What identifies a file that has one name, however that is spelled; None for what is not there, or has several."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_nlink == 1 else None


def read_small(path: Union[str, Path], pipe: bool = False, most: int = MOST_BYTES) -> bytes:
    """The contents of a small file: an index, a note, a strategy, a configuration.

    A hostile file cannot stop a job here: a pipe would wait for a writer for ever, a device has no end, and a file with
    holes may be longer than memory.

    Args:
        pipe: whether it may also be a pipe with a writer, such as a shell makes of `<(command)`.
        most: most bytes that it may have.

    Raises:
        OSError: it cannot be read, is another kind of file, or is too long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a name that no file has
        raise OSError(str(error)) from None
    try:
        return _contents(descriptor, pipe, most)
    finally:
        os.close(descriptor)


def _contents(descriptor: int, pipe: bool, most: int) -> bytes:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode) and not (pipe and stat.S_ISFIFO(status.st_mode)):
        raise OSError("it is no regular file, but a pipe or a device")
    os.set_blocking(descriptor, True)
    pieces: list[bytes] = []
    total = status.st_size if status.st_size > most else 0
    while total <= most and (piece := os.read(descriptor, max(status.st_size - total, _PIECE))):
        pieces.append(piece)
        total += len(piece)
    if total > most:
        raise OSError(f"it has more than {most} bytes, and is read whole")
    return b"".join(pieces)


def write_atomically(path: Union[str, Path], contents: bytes, sync: bool = True) -> None:
    """Replace a file by `contents`: durable unless `sync` is False, and never seen half written.

    For one writer of a file at a time. Raises OSError; then the file is as it was, and nothing is left of the new one.
    """
    partial = derived(Path(path), ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(contents)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def sync_path(path: Path) -> None:
    """Make the contents of a file durable, or the names that were added to or removed from a folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=1)
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "preadv"):
        libc.preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
        libc.preadv.restype = ctypes.c_ssize_t
    return libc


def preallocate(fd: int, size: int) -> None:
    """Reserve `size` bytes for an empty file, or at least set its length.

    Not `os.posix_fallocate`, which the C library emulates by writing to every block where the file system cannot
    reserve (most network file systems).

    Raises:
        OSError: no space.
    """
    libc = _libc()
    if libc is not None and size:
        code = errno.EINTR
        while code == errno.EINTR:
            if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
                return
            code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def can_scatter() -> bool:
    """True where `scatter` works: its vectors hold 64-bit addresses."""
    return ctypes.sizeof(ctypes.c_void_p) == 8 and hasattr(_libc(), "preadv")


def scatter(fd: int, vector: array[int], offset: int) -> int:
    """Read once from `offset` into the places in `vector`: address and length in bytes of each, in turn.

    `os.preadv` needs an object for every place, which takes longer to make than to fill the place.

    Args:
        vector: "Q" items, at most 2 * 1024; the memory at these addresses must stay where it is meanwhile.

    Returns:
        Bytes read, which may be fewer than there is room for.

    Raises:
        OSError: the read failed.
    """
    address, items = vector.buffer_info()
    while True:
        got: int = _libc().preadv(fd, address, items // 2, offset)
        if got >= 0:
            return got
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files (often 1,024) so that `count` more fit, as far as the hard one lets."""
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
    """What identifies this boot of this machine; where the system has nothing, different bytes for every call."""
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


def scratch(nbytes: int) -> memoryview:
    """Flat writable bytes, zero at first and page-aligned; in huge pages, since page faults are expensive.

    Raises StorageError: there is not enough memory.
    """
    if nbytes == 0:
        return memoryview(bytearray())
    with naming(f"get {nbytes} bytes of memory"):
        area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # no such advice on this system, or in this kernel
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


def address_of(buffer: memoryview) -> int:
    """Where writable bytes lie in memory; 0 when there are none. They stay there while `buffer` lives."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


class Buffer:
    """Scratch memory that grows to the largest request and is reused."""

    def __init__(self) -> None:
        self._bytes = scratch(0)

    def take(self, nbytes: int, source: int = 0, target: int = 0) -> memoryview:
        """`nbytes` of memory, to be filled from offset `source` of a file and written to offset `target` of another.

        They begin where both copies are fast: as far into a page as the source does, or a little further.
        """
        start = source % PAGE
        if 0 < (target - source) % PAGE < _APART:
            start += _APART
        if len(self._bytes) < start + nbytes:
            self._bytes = scratch(nbytes + PAGE + _APART)
        return self._bytes[start : start + nbytes]

"""Locks that a process holds until it ends, however it ends: `flock` on files named `*.lock`."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ms_ckpt_ext.errors import StorageError

SUFFIX = ".lock"
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def open_lock(path: Path) -> int:
    """Open the file of a lock, which anyone may hold who may write beside it; made if need be. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def try_lock(descriptor: int, path: Path, shared: bool = False) -> bool:
    """Lock an open file; False when another process holds it.

    Args:
        path: what messages call it.
        shared: only to see whether it is held; those who look do not keep each other out.

    Raises:
        StorageError: the file system has no locks.
    """
    return _flock(descriptor, path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def wait_for_lock(descriptor: int, path: Path) -> None:
    """Lock an open file when nobody holds it any more. Raises StorageError when the file system has no locks."""
    _flock(descriptor, path, fcntl.LOCK_EX)


def _flock(descriptor: int, path: Path, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise StorageError(
            error.errno,
            f"cannot lock {str(path)!r}: {os.strerror(error.errno or 0)}; the target's file system does not support "
            "flock, which keeps two runs from writing into one target: mount it with locks (Lustre: -o flock; NFS: "
            "without nolock, and with lockd running), or choose a target on another file system",
        ) from error
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """True when `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def is_locked(folder: Path, besides: str = "") -> bool:
    """True when somebody holds a lock in a folder other than that named `besides`. Raises StorageError."""
    return any(True for _ in held(folder, besides))


def held(folder: Path, besides: str = "") -> Iterator[str]:
    """Names of the locks in a folder that somebody holds, or that cannot be looked at. Raises StorageError."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(SUFFIX) and name != besides]
    except OSError:  # its own run has just removed it
        return
    yield from (name for name in names if _is_held(folder / name))


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # another user's
        return True
    try:
        return not try_lock(descriptor, lock, shared=True)
    finally:
        os.close(descriptor)

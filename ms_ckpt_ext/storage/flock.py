"""Locks that a process holds until it ends, however it ends: `flock` on files named `*.lock`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ms_ckpt_ext.errors import StorageError

SUFFIX = ".lock"
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def open_lock(path: Path) -> int:
    """Open the file of a lock, made if need be: whoever may write into its folder may hold it. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError as error:
        try:  # another user's, made by other means: on a local file system it can be held by who may read it
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise error from None
    with contextlib.suppress(OSError):  # another user's
        os.fchmod(descriptor, stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
    return descriptor


def try_lock(descriptor: int, path: Path, shared: bool = False) -> bool:
    """Lock an open file; False when another process holds it.

    Args:
        path: what messages call it.
        shared: only to see whether it is held; those who look do not keep each other out.

    Raises:
        StorageError: the file system has no locks.
    """
    return _flock(descriptor, path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def wait_for_lock(path: Path) -> int:
    """Hold a lock that is made for it, when nobody else does any more; gives the open file, see `let_go`.

    Raises:
        OSError: its folder is not there, or nothing may be made in it.
        StorageError: the file system has no locks.
    """
    while True:
        descriptor = open_lock(path)
        try:
            _flock(descriptor, path, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed it


def let_go(descriptor: int, path: Path) -> None:
    """Release what `wait_for_lock` gave, and remove the file; who waits for it makes another."""
    try:
        with contextlib.suppress(OSError):  # it may stay
            path.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock of this name meanwhile. Raises as `wait_for_lock`."""
    descriptor = wait_for_lock(path)
    try:
        yield
    finally:
        let_go(descriptor, path)


def _flock(descriptor: int, path: Path, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in _HELD and operation & fcntl.LOCK_NB:
            return False
        raise StorageError(
            error.errno,
            f"cannot lock {str(path)!r}: {os.strerror(error.errno or 0)}; the target's file system does not support "
            "flock, which keeps two runs from writing the same files: mount it with locks (Lustre: -o flock; NFS: "
            "without nolock, and with lockd running), or choose a target on another file system",
        ) from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """True when `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def held(folder: Path, besides: str = "") -> Iterator[str]:
    """Names of the locks in a folder, other than `besides`, that somebody holds. Raises StorageError.

    For who keeps others from taking them meanwhile: a lock that is looked at cannot be taken.
    """
    try:
        names = [name for name in os.listdir(folder) if name.endswith(SUFFIX) and name != besides]
    except OSError:  # there is none
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

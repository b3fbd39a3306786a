"""Who may change what: locks, and the hidden folder of a target, where jobs prepare what they publish there.

A lock is held until its process ends, however it ends: `flock` on a file named `*.lock`. The folder is `.ms_ckpt_ext`:

    .lock           held by whoever reads or changes what is in here: briefly, while things are published
    claims          a line for every task that began: the names that its job writes (`storage.claims`)
    JOB/            files of a job until they are published (`storage.staging`), and a lock of every task that runs
    JOB.journal     what a job has begun to publish (`storage.publishing`)

It exists while jobs run, and as long as one is unfinished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ms_ckpt_ext.errors import StorageError
from ms_ckpt_ext.storage.linux import is_folder, require_absence

SUFFIX = ".lock"
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_FOLDER = ".ms_ckpt_ext"
_JOURNAL = ".journal"


def lock_of(path: Path) -> Path:
    """The lock that is held to change a file: hidden, beside it."""
    return path.with_name(f".{path.name}{SUFFIX}")


def open_lock(path: Path) -> int:
    """Open the file of a lock, creating it if needed: whoever may write into its folder may hold it. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError as error:
        try:  # another user's, made by other means: on a local file system whoever may read it may hold it
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
        shared: only check whether it is held; several processes may check at once.

    Raises:
        StorageError: the file system has no locks.
    """
    return _flock(descriptor, path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def wait_for_lock(path: Path) -> int:
    """Wait until nobody else holds a lock, and hold it; made if needed. Returns the open file, for `let_go`.

    Raises:
        OSError: its folder does not exist, no file may be made in it, or it cannot be looked at.
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
    """Release what `wait_for_lock` returned, and remove the file; whoever waits for it makes another."""
    try:
        with contextlib.suppress(OSError):  # it may stay
            path.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock at this path inside a `with` block. Raises as `wait_for_lock`."""
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
    """True when `path` still names the open file. Raises OSError where that cannot be told: a failing disk."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def held(folder: Path, besides: str = "") -> Iterator[str]:
    """Names of the locks in a folder, other than `besides`, that somebody holds. Raises StorageError.

    The caller keeps others from taking locks meanwhile: one that is being checked cannot be taken.
    """
    yield from (n for n in sorted(_names(folder)) if n.endswith(SUFFIX) and n != besides and _is_held(folder / n))


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


class HiddenFolder:
    """The hidden folder of `target`, which one process at a time may enter."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target / _FOLDER
        self.claims = self.path / "claims"
        self._lock = -1

    def job(self, job: str) -> Path:
        """The folder of a job."""
        return self.path / job

    def journal(self, job: str) -> Path:
        """The journal of what a job has begun to publish."""
        return self.path / (job + _JOURNAL)

    def journals(self) -> list[Path]:
        """The journals of all jobs."""
        return [self.path / name for name in sorted(_names(self.path)) if name.endswith(_JOURNAL)]

    @property
    def is_there(self) -> bool:
        """Whether the folder exists. Raises StorageError."""
        return is_folder(self.path)

    @property
    def is_entered(self) -> bool:
        """Whether this process is in it."""
        return self._lock >= 0

    def enter(self) -> None:
        """Enter when nobody else is in; made if needed. Raises OSError; StorageError: the file system has no locks."""
        while self._lock < 0:
            _make_like(self.path, self.target)
            try:
                self._lock = wait_for_lock(self.path / SUFFIX)
            except FileNotFoundError:  # whoever was in it has just removed it
                continue
            except StorageError:
                self._remove()
                raise

    def enter_if_there(self) -> bool:
        """Enter it, or only look at one that cannot be entered; False when there is none."""
        try:
            self._lock = wait_for_lock(self.path / SUFFIX)
        except OSError:  # a folder above may be another user's
            return self.is_there
        return True

    def leave(self) -> None:
        """Let others in; the folder is removed when nothing in it is unfinished."""
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        try:
            with contextlib.suppress(OSError):
                names = _names(self.path) - {SUFFIX}
                if not any(name.endswith(_JOURNAL) or (self.path / name).is_dir() for name in names):
                    for name in names:
                        (self.path / name).unlink(missing_ok=True)
        finally:
            let_go(lock, self.path / SUFFIX)
        with contextlib.suppress(OSError):  # not empty
            self.path.rmdir()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / SUFFIX).unlink()
            self.path.rmdir()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it inside a `with` block. Raises as `enter`."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def _names(folder: Path) -> set[str]:
    """The names in a folder; none where it does not exist or is another user's. Raises StorageError."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        require_absence(error, folder, "list")
        return set()


def _make_like(folder: Path, above: Path) -> None:
    """Make a folder in another, for everybody who may write into the other. Raises OSError."""
    for last in (*[False] * 1000, True):
        try:
            above.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            break
        except FileExistsError:
            if folder.is_dir():
                return
            if last or any(os.path.lexists(path) and not path.is_dir() for path in (folder, *folder.parents)):
                raise
        except FileNotFoundError:  # it, or what is above, is being removed
            if last:
                raise
    status = above.stat()
    with contextlib.suppress(OSError):
        os.chown(folder, -1, status.st_gid)
    with contextlib.suppress(OSError):
        folder.chmod(stat.S_IMODE(status.st_mode))

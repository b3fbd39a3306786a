"""The hidden folder of a target, where jobs prepare what they are to publish there: `.ms_ckpt_ext`.

    .lock           held by who looks at what is in here, or changes it: for moments, in which things are published
    claims          a line for every task that began: names that its job writes (`storage.claims`)
    JOB/            files of a job until they are published (`storage.staging`), and a lock of every task that runs
    JOB.journal     what a job has begun to publish (`storage.journal`)

It is there while jobs are, and as long as one is unfinished.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ms_ckpt_ext.errors import StorageError
from ms_ckpt_ext.storage import flock

_FOLDER = ".ms_ckpt_ext"
_LOCK = flock.SUFFIX
_JOURNAL = ".journal"


class HiddenFolder:
    """The hidden folder of `target`, which is entered by one at a time."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target / _FOLDER
        self.claims = self.path / "claims"
        self._lock = -1

    def job(self, job: str) -> Path:
        """The folder of a job."""
        return self.path / job

    def journal(self, job: str) -> Path:
        """The file of what a job has begun to publish."""
        return self.path / (job + _JOURNAL)

    def journals(self) -> list[Path]:
        """Those files of all jobs."""
        return [self.path / name for name in sorted(_names(self.path)) if name.endswith(_JOURNAL)]

    @property
    def is_there(self) -> bool:
        """Whether there is such a folder."""
        return os.path.isdir(self.path)

    @property
    def is_entered(self) -> bool:
        """Whether this process is in it."""
        return self._lock >= 0

    def enter(self) -> None:
        """Wait until nobody else is in; made if need be. Raises OSError; StorageError: there are no locks here."""
        while self._lock < 0:
            _make_like(self.path, self.target)
            try:
                self._lock = flock.wait_for_lock(self.path / _LOCK)
            except FileNotFoundError:  # who was in it has just removed it
                continue
            except StorageError:
                self._remove()
                raise

    def enter_if_there(self) -> bool:
        """Enter it, or one that cannot be entered, look at it; False when there is none."""
        try:
            self._lock = flock.wait_for_lock(self.path / _LOCK)
        except OSError:  # above, others may be at home
            return self.is_there
        return True

    def leave(self) -> None:
        """Let others in; the folder goes when nothing in it is unfinished."""
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        try:
            with contextlib.suppress(OSError):
                names = _names(self.path) - {_LOCK}
                if not any(name.endswith(_JOURNAL) or (self.path / name).is_dir() for name in names):
                    for name in names:
                        (self.path / name).unlink(missing_ok=True)
        finally:
            flock.let_go(lock, self.path / _LOCK)
        with contextlib.suppress(OSError):  # not empty
            self.path.rmdir()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it meanwhile. Raises as `enter`."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:  # there is none, or it is another user's, above
        return set()


def _make_like(folder: Path, above: Path) -> None:
    """Make a folder in another, for everybody who may write into that. Raises OSError."""
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

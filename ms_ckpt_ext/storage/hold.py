"""The right to write into a target: one run at a time, whatever becomes of the others.

1. A task locks a file of its own in the job's hidden folder; then it looks at the locks of others. Either of two runs
   that begin at the same moment sees the other's.
2. It is refused when another job is run into this target, or into one that this is a part of, or that is a part of it
   (`rank_N`); or when this very job is run by tasks that share it out among another number, and would meet in the same
   files.
3. Folders of other jobs that nobody runs are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import StorageError, storage_error
from ms_ckpt_ext.storage import locks, remains
from ms_ckpt_ext.storage.durable import sync_folder

_NOT_FINISHED = (remains.NOTE, remains.PARTIAL, remains.PUBLISHING, remains.REMAINS)
_RANK = re.compile(r"^rank_\d+$")
_TASK = re.compile(r"^task-\d+(-of-\d+)\.lock$")


class Hold:
    """A task's hold of a target.

    Args:
        folder: the job's hidden folder in it.
        task: the part of the job that this process does.
        sync: the names of folders that are made for the target are durable.
    """

    def __init__(self, target: Path, folder: Path, task: str, sync: bool) -> None:
        self.target, self.folder = target, folder
        self._task, self._sync = task, sync
        self._lock: Optional[int] = None
        self._made: list[Path] = []

    def take(self) -> None:
        """Make the folder and take the task's lock.

        Raises:
            StorageError: another run holds this target, or one that has a part in it; or there are no locks there.
        """
        try:
            self._make_target()
            busy = self._hold()
            for made in self._made if self._sync and busy is None else ():
                sync_folder(made.parent)
        except OSError as error:
            self._leave()
            if isinstance(error, StorageError):
                raise
            raise storage_error("write into", str(self.target), error) from error
        if busy is not None:
            self._leave()
            raise StorageError(
                errno.EBUSY, f"another run is writing into {str(busy)!r}; wait for it to end, or choose another target"
            )

    def _hold(self) -> Optional[Path]:
        """Take the task's lock and look at those of others; a target that another run holds and this one needs.

        Who looked at this run's folder before the lock was taken may remove it afterwards. While they do, they hold a
        lock of their own, so once no other lock is held, a lock that is still in its place stays there.
        """
        while True:
            self._take_lock()
            busy = self._busy_target()
            if busy is not None or self._lock is None or locks.is_at(self._lock, self.folder / self._own_lock):
                return busy
            self.release()

    def _take_lock(self) -> None:
        """Lock this task's file; again when a run that ended has removed it between opening and locking."""
        path = self.folder / self._own_lock
        while self._lock is None:
            try:
                _make_folder(self.folder)
                descriptor = locks.open_lock(path)
            except FileNotFoundError:  # another run took the folder for one left behind, or the target that it had made
                continue
            try:
                locked = locks.try_lock(descriptor, path)
                if locked and locks.is_at(descriptor, path):
                    self._lock, descriptor = descriptor, -1
            except StorageError:  # no locks here, so nobody holds this one
                path.unlink(missing_ok=True)
                raise
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            if not locked:
                return

    def _busy_target(self) -> Optional[Path]:
        """A target that another run holds and this one needs; folders of other jobs that nobody runs are removed."""
        if self._lock is None:
            return self.target
        for other in self._neighbours():
            if locks.is_locked(other):
                return other.parent
        if any(map(self._is_another_split, locks.held(self.folder, self._own_lock))):
            return self.target
        others = [other for other in self.target.glob(remains.FOLDER + "*") if other != self.folder]
        return None if all(map(self._drop, others)) else self.target

    @property
    def _own_lock(self) -> str:
        return f"{self._task}{locks.SUFFIX}"

    def _is_another_split(self, lock: str) -> bool:
        """Whether a lock is that of a task that shares the work among another number than this one."""
        task = _TASK.match(lock)
        return task is not None and not self._task.endswith(task[1])

    def _neighbours(self) -> Iterator[Path]:
        """Folders of jobs into this target's `rank_N`, each a target of its own, and above, when this is one."""
        target = self.target.absolute()
        if _RANK.match(target.name):
            yield from target.parent.glob(remains.FOLDER + "*")
        yield from target.glob(f"rank_*/{remains.FOLDER}*")

    def _drop(self, other: Path) -> bool:
        """Remove the folder of another job, and note what it left in the target; False when somebody runs it."""
        if locks.is_locked(other):
            return False
        finished = sum(1 for path in files_in(other) if not path.name.endswith(_NOT_FINISHED))
        remains.inherit(self.folder, other, self.target, other.name[len(remains.FOLDER) :])
        try:
            shutil.rmtree(other)
        except PermissionError as error:
            raise StorageError(
                error.errno,
                f"cannot remove {str(other)!r}, which another job left unfinished, perhaps another user's; "
                "have its owner remove it, or choose another target",
            ) from error
        except OSError:  # others remove it as well, or begin anew there, and will see this run's lock
            shutil.rmtree(other, ignore_errors=True)
        if finished:
            log.warning(
                "the job into %s drops %d finished files of another that was not completed there: its source, layouts "
                "or options were others (or it did not sync, and the machine was started anew), so they do not fit",
                self.target,
                finished,
            )
        return True

    def _leave(self) -> None:
        """Go away without a trace, but for finished files of an earlier run."""
        besides = "" if self._lock is None else self._own_lock
        with contextlib.suppress(OSError):
            if not files_in(self.folder) and not locks.is_locked(self.folder, besides):
                shutil.rmtree(self.folder, ignore_errors=True)
        self.release()
        self._forget_target()

    def _make_target(self) -> None:
        self._made = [p for p in (self.target, *self.target.parents) if not p.exists()]
        _make_folder(self.target)

    def _forget_target(self) -> None:
        for made in self._made:
            with contextlib.suppress(OSError):
                made.rmdir()

    def drop_if_empty(self) -> None:
        """Remove the folder, and the target if it was made for it, unless there are files or another task runs."""
        if not files_in(self.folder) and not locks.is_locked(self.folder, self._own_lock):
            shutil.rmtree(self.folder, ignore_errors=True)
            self._forget_target()

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _make_folder(folder: Path) -> None:
    """Make a folder that may be there, or go away at any moment. Raises OSError."""
    while not folder.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # it was, and is gone; unless it is something else
            if os.path.lexists(folder) and not folder.is_dir():
                raise


def files_in(folder: Path) -> list[Path]:
    """What runs left in a job's folder, besides locks. Others may be removing it."""
    walked = ((Path(inside), name) for inside, _, names in os.walk(folder) for name in names)
    return [inside / name for inside, name in walked if not name.endswith(locks.SUFFIX)]

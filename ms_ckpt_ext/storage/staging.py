"""Output that appears whole or not at all, and survives being killed.

1. A job writes into a hidden folder of the target directory, named after a fingerprint of everything that decides the
   result. A file is written as `NAME.partial`, synced, and renamed to `NAME` there when it is complete.
2. A second run of the same job finds the finished files by that fingerprint and does not write them again. Folders of
   other jobs that nobody is running any more are removed.
3. When every file of the job is there, the index is replaced by one that leads to an empty file, the old result is
   taken away, the new files are moved into place, and the true index comes last. Killed in between, the target refuses
   to load; the next run finishes the move, or another job's takes away what was moved (`storage.remains`).
4. A lock a task holds while it runs keeps two jobs from writing into one target, or into it and one `rank_N` of it; so
   it keeps two runs of one job that share the work out differently, whose tasks would meet in the same files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Optional

from ms_ckpt_ext.errors import CheckpointError, StorageError, storage_error
from ms_ckpt_ext.storage import locks, remains
from ms_ckpt_ext.storage.durable import sync_folder, write_atomically
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader

ONE_TASK = "task-1-of-1"
"""Name of the task that does a whole job."""
_NOTE = ".note"
_NOT_FINISHED = (_NOTE, ".partial", remains.PUBLISHING, remains.REMAINS)
_RANK = re.compile(r"^rank_\d+$")
_TASK = re.compile(r"^task-\d+(-of-\d+)\.lock$")
log = logging.getLogger("ms_ckpt_ext")


class Staging:
    """The hidden folder of one job in one target directory.

    Args:
        job: fingerprint of the job.
        task: the part of the job that this process does.
        sync: what is published is durable; else the kernel writes it when it likes.
    """

    def __init__(self, target: str, job: str, task: str = ONE_TASK, sync: bool = True) -> None:
        self.target = Path(target)
        self.job = job
        self.folder = self.target / (remains.FOLDER + job)
        self._task, self._sync = task, sync
        self._lock: Optional[int] = None
        self._made: list[Path] = []

    def open(self) -> None:
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
            self.close()

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
        finished = sum(1 for path in _files(other) if not path.name.endswith(_NOT_FINISHED))
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
            if not _files(self.folder) and not locks.is_locked(self.folder, besides):
                shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
        self._forget_target()

    def _make_target(self) -> None:
        self._made = [p for p in (self.target, *self.target.parents) if not p.exists()]
        _make_folder(self.target)

    def _forget_target(self) -> None:
        for made in self._made:
            with contextlib.suppress(OSError):
                made.rmdir()

    def check_space(self, nbytes: int) -> None:
        """Raise StorageError when the target's file system has less than `nbytes` free."""
        free = shutil.disk_usage(self.target).free
        if nbytes > free:
            raise StorageError(
                errno.ENOSPC,
                f"{str(self.target)!r} needs {nbytes:,} bytes for this job, its file system has {free:,} free; "
                "free some space or choose another target, then run the same command again",
            )

    def partial(self, name: str) -> str:
        """Where to write a file of this name. Raises StorageError."""
        path = self.folder / (name + ".partial")
        with _told("make a folder for", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def accept(self, name: str) -> None:
        """Declare the written and synced file complete. Raises StorageError."""
        with _told("rename", self.folder / (name + ".partial")):
            os.rename(self.folder / (name + ".partial"), self.folder / name)

    def keep(self, name: str, note: bytes) -> None:
        """Keep a note about a file that is about to be accepted, until the job is done. Raises StorageError."""
        path = self.folder / (name + _NOTE)
        with _told("write", path):
            path.write_bytes(note)

    def note(self, name: str) -> Optional[bytes]:
        """What `keep` was given. Not synced, so a crash of the machine may have left less of it."""
        try:
            return (self.folder / (name + _NOTE)).read_bytes()
        except OSError:
            return None

    def discard(self, names: Iterable[str]) -> None:
        """Remove what there is of these files, lest another task takes it for complete. Raises StorageError."""
        for name in names:
            for path in (self.folder / (name + ending) for ending in (".partial", "", _NOTE)):
                with _told("remove", path):
                    path.unlink(missing_ok=True)

    def holds(
        self,
        name: str,
        size: int,
        literals: Sequence[tuple[int, bytes]],
        opener: Callable[[str], ByteReader] = PlainReader,
    ) -> bool:
        """True when a complete file of this name is there already (or was moved into place before a kill).

        Args:
            size: its bytes on disk.
            literals: what must stand where in it, as `opener` shows it.
        """
        return any(_matches(path, size, literals, opener) for path in self._places(name))

    def place(self, name: str) -> str:
        """Where a file of this name is that the job `holds`."""
        return str(next(filter(Path.exists, self._places(name)), self.folder / name))

    def _places(self, name: str) -> list[Path]:
        moved = [self.target / name] if (self.folder / remains.PUBLISHING).exists() else []
        return [self.folder / name, *moved]

    def published(self, names: Mapping[str, int], index: Mapping[str, bytes]) -> bool:
        """True when the target holds the untouched result of this very job: files (name -> size) and index."""
        try:
            manifest = json.loads((self.target / remains.MANIFEST).read_bytes())
            return (
                manifest["job"] == self.job
                and all(manifest["files"][name][0] == size for name, size in names.items())
                and all(_state(self.target / name) == state for name, state in manifest["files"].items())
                and all((self.target / name).read_bytes() == contents for name, contents in index.items())
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the job's publishing lock: one task at a time looks whether the set is complete. Raises StorageError."""
        path = self.folder / f"publish{locks.SUFFIX}"
        try:
            lock = locks.open_lock(path)
        except FileNotFoundError:  # another task completed the set, published it and removed the folder
            yield
            return
        except OSError as error:
            raise storage_error("lock", str(path), error) from error
        try:
            locks.wait_for_lock(lock, path)
            yield
        finally:
            os.close(lock)

    def publish(
        self,
        names: Sequence[str],
        index: Mapping[str, bytes],
        replaces: Sequence[str],
        beside: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Move the complete set into place; `index` (name -> contents) comes last.

        Args:
            names: every file of the job, relative to the target.
            index: files that make the result loadable.
            replaces: files of an older result that must go, besides those of the same names.
            beside: files about the set (name -> contents), which come before the index.
        """
        keep = {*names, *index, *beside}
        gone = [*replaces, *sorted(remains.inherited(self.folder) - keep)]
        with _told("publish the result in", self.target):
            self._require_room((*keep, *gone, remains.OBSTACLE, remains.MANIFEST))
            remains.note(self.folder, names, index, gone)
            waiting = [name for name in names if (self.folder / name).exists()]
            if index:
                write_atomically(self.target / remains.OBSTACLE, b"", self._sync)
            for name in index:
                write_atomically(self.target / name, remains.UNFINISHED, self._sync)
            # The record of the old result goes last: who is killed here finds in it what else is to go.
            for name in (*beside, *gone, *waiting, remains.MANIFEST):
                (self.target / name).unlink(missing_ok=True)
            for folder in {(self.target / name).parent for name in gone} - {self.target}:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
            for name in waiting:
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.folder / name, self.target / name)
            if self._sync:
                for folder in {(self.target / name).parent for name in names}:
                    sync_folder(folder)
            if not remains.others_unfinished(self.target, index):
                (self.target / remains.OBSTACLE).unlink(missing_ok=True)
            for name, contents in {**beside, **index}.items():
                write_atomically(self.target / name, contents, self._sync)
            write_atomically(self.target / remains.MANIFEST, self._manifest((*names, *beside)), self._sync)
            if self._sync:
                sync_folder(self.target)
        self.remove()

    def _require_room(self, names: Iterable[str]) -> None:
        """Raise StorageError before anything is changed, if any of these could not be replaced."""
        for path in (self.target / name for name in names):
            folder = path.parent
            wrong = path if path.is_dir() and not path.is_symlink() else folder if folder.is_file() else None
            if wrong is not None:
                raise StorageError(
                    errno.EISDIR if wrong is path else errno.ENOTDIR,
                    f"cannot publish the result in {str(self.target)!r}: {str(wrong)!r} stands where a "
                    f"{'file' if wrong is path else 'folder'} of the result belongs; move it away, then run the same "
                    "command again: finished files are kept",
                )
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise storage_error("publish the result in", str(folder), OSError(errno.EACCES, ""))

    def _manifest(self, names: Sequence[str]) -> bytes:
        content: dict[str, Any] = {"job": self.job, "files": {name: _state(self.target / name) for name in names}}
        return json.dumps(content, indent=1).encode()

    def remove(self) -> None:
        """Remove the folder: the job is done, or nothing of it is worth keeping."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self, names: Iterable[str]) -> None:
        """After an error while writing these files: keep finished ones for the next run, remove all else."""
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / (name + ".partial")).unlink(missing_ok=True)
        if not _files(self.folder) and not locks.is_locked(self.folder, self._own_lock):
            self.remove()
            self._forget_target()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def free_space(target: str) -> Optional[int]:
    """Bytes left where a directory is, or would be made; None when that cannot be told."""
    path = Path(target).absolute()
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    try:
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None


def _matches(path: Path, size: int, literals: Sequence[tuple[int, bytes]], opener: Callable[[str], ByteReader]) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        with opener(str(path)) as reader:
            return all(_read(reader, offset, len(data)) == data for offset, data in literals)
    except (OSError, CheckpointError):
        return False


def _read(reader: ByteReader, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    reader.read_into(offset, memoryview(data))
    return data


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _told(action: str, path: Path) -> Iterator[None]:
    """Raise what the system refuses as a StorageError, which others are already."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(action, str(path), error) from error


def _make_folder(folder: Path) -> None:
    """Make a folder that may be there, or go away at any moment. Raises OSError."""
    while not folder.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # it was, and is gone; unless it is something else
            if os.path.lexists(folder) and not folder.is_dir():
                raise


def _files(folder: Path) -> list[Path]:
    """What runs left in a job's folder, besides locks. Others may be removing it."""
    walked = ((Path(inside), name) for inside, _, names in os.walk(folder) for name in names)
    return [inside / name for inside, name in walked if not name.endswith(locks.SUFFIX)]

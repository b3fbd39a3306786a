"""Output that appears whole or not at all, and survives being killed.

1. A job writes into a hidden folder of the target directory, named after a fingerprint of everything that decides the
   result. A file is written as `NAME.partial`, synced, and renamed to `NAME` there when it is complete.
2. A second run of the same job finds the finished files by that fingerprint and does not write them again. Folders of
   other jobs that nobody is running any more are removed.
3. When every file of the job is there, the index is replaced by one that leads to an empty file, the old result is
   taken away, the new files are moved into place, and the true index comes last. Killed in between, the target refuses
   to load; the next run finishes the move.
4. A lock a task holds while it runs keeps two jobs from writing into one target.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Optional, Union

from ms_ckpt_ext.errors import CheckpointError, StorageError, storage_error
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader

ONE_TASK = "task-1-of-1"
"""Name of the task that does a whole job."""
_FOLDER = ".ms_ckpt_ext-"
MANIFEST = ".ms_ckpt_ext.json"
_PUBLISHING = "publishing"
_NOTE = ".note"
# Loaders take a folder with a single .safetensors file for a whole checkpoint, MindSpore's even beside an index.
# While files are moved there is thus one more, empty, and an index that leads to it. Its name is the error message.
_OBSTACLE = "publishing-was-interrupted-run-the-job-again.safetensors"
_UNFINISHED = json.dumps({"metadata": {"total_size": 0}, "weight_map": {"": _OBSTACLE}}).encode()


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
        self.folder = self.target / (_FOLDER + job)
        self._task, self._sync = task, sync
        self._lock: Optional[int] = None
        self._made: list[Path] = []

    def open(self) -> None:
        """Make the folder and take the task's lock. Raises StorageError when another run holds this target."""
        try:
            self._make_target()
            self._take_lock()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            self._forget_target()
            raise storage_error("write into", str(self.target), error) from error
        if self._lock is None:
            raise self._busy()
        for other in self.target.glob(_FOLDER + "*"):
            if other != self.folder and not _remove_if_idle(other):
                self.close()
                _remove_if_idle(self.folder)
                raise self._busy()

    def _take_lock(self) -> None:
        """Lock this task's file; again when a run that ended has removed it between opening and locking."""
        path = self.folder / f"{self._task}.lock"
        while self._lock is None:
            self.folder.mkdir(exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # another run took the folder for one left behind
                continue
            locked = _try_lock(descriptor)
            if locked and _is_at(descriptor, path):
                self._lock = descriptor
                return
            os.close(descriptor)
            if not locked:
                return

    def _busy(self) -> StorageError:
        return StorageError(
            errno.EBUSY,
            f"another run is writing into {str(self.target)!r}; wait for it to end, or choose another target",
        )

    def _make_target(self) -> None:
        self._made = [p for p in (self.target, *self.target.parents) if not p.exists()]
        self.target.mkdir(parents=True, exist_ok=True)

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
        """Where to write a file of this name."""
        path = self.folder / (name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def accept(self, name: str) -> None:
        """Declare the written and synced file complete."""
        os.rename(self.folder / (name + ".partial"), self.folder / name)

    def keep(self, name: str, note: bytes) -> None:
        """Keep a note about a file that is about to be accepted, until the job is done."""
        (self.folder / (name + _NOTE)).write_bytes(note)

    def note(self, name: str) -> Optional[bytes]:
        """What `keep` was given. Not synced, so a crash of the machine may have left less of it."""
        try:
            return (self.folder / (name + _NOTE)).read_bytes()
        except OSError:
            return None

    def discard_partials(self, names: Iterable[str]) -> None:
        """Remove what was not completed of these files; other tasks may be writing theirs."""
        for name in names:
            (self.folder / (name + ".partial")).unlink(missing_ok=True)

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
        places = [self.folder / name]
        if (self.folder / _PUBLISHING).exists():
            places.append(self.target / name)
        return any(_matches(path, size, literals, opener) for path in places)

    def published(self, names: Mapping[str, int], index: Mapping[str, bytes]) -> bool:
        """True when the target holds the untouched result of this very job: files (name -> size) and index."""
        try:
            manifest = json.loads((self.target / MANIFEST).read_bytes())
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
        """Hold the job's publishing lock: one task at a time looks whether the set is complete."""
        try:
            lock = os.open(self.folder / "publish.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another task completed the set, published it and removed the folder
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
        try:
            (self.folder / _PUBLISHING).touch()
            waiting = [name for name in names if (self.folder / name).exists()]
            if index:
                (self.target / _OBSTACLE).touch()
            for name in index:
                write_atomically(self.target / name, _UNFINISHED, self._sync)
            for name in (MANIFEST, *beside, *replaces, *waiting):
                (self.target / name).unlink(missing_ok=True)
            for folder in {(self.target / name).parent for name in replaces} - {self.target}:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
            for name in waiting:
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.folder / name, self.target / name)
            if self._sync:
                for folder in {(self.target / name).parent for name in names}:
                    _sync_folder(folder)
            (self.target / _OBSTACLE).unlink(missing_ok=True)
            for name, contents in {**beside, **index}.items():
                write_atomically(self.target / name, contents, self._sync)
            write_atomically(self.target / MANIFEST, self._manifest((*names, *beside)), self._sync)
            if self._sync:
                _sync_folder(self.target)
        except OSError as error:
            raise storage_error("publish the result in", str(self.target), error) from error
        self.remove()

    def _manifest(self, names: Sequence[str]) -> bytes:
        content: dict[str, Any] = {"job": self.job, "files": {name: _state(self.target / name) for name in names}}
        return json.dumps(content, indent=1).encode()

    def remove(self) -> None:
        """Remove the folder: the job is done, or nothing of it is worth keeping."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self, names: Iterable[str]) -> None:
        """After an error while writing these files: keep finished ones for the next run, remove all else."""
        self.discard_partials(names)
        kept = [p for p in self.folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
        if not kept and _remove_if_idle(self.folder, besides=f"{self._task}.lock"):
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


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """True when `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _remove_if_idle(folder: Path, besides: str = "") -> bool:
    """Remove a job's folder unless one of its tasks, `besides` the one with this lock, is running."""
    try:
        locks = [folder / name for name in os.listdir(folder) if name.endswith(".lock") and name != besides]
    except FileNotFoundError:  # its own run has just removed it
        return True
    for lock in locks:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if not _try_lock(descriptor):
                return False
        finally:
            os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def write_atomically(path: Union[str, Path], contents: bytes, sync: bool = True) -> None:
    """Replace a file by `contents`: durable unless `sync` is False, and never seen half written. Raises OSError."""
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.write(contents)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

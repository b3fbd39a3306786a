"""Output that appears whole or not at all, and survives being killed.

1. A job writes into a hidden folder of the target directory, named after a fingerprint of everything that decides the
   result. A file is written as `NAME.partial`, synced, and renamed to `NAME` there when it is complete.
2. A second run of the same job finds the finished files by that fingerprint and does not write them again. Folders of
   other jobs that nobody is running any more are removed.
3. When every file of the job is there, the index is replaced by one that leads to an empty file, the old result is
   taken away, the new files are moved into place, and the true index comes last. Killed in between, the target refuses
   to load; the next run finishes the move, or another job's takes away what was moved (`storage.remains`).
4. While it runs a job holds the target (`storage.hold`), so that no two write into it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Optional

from ms_ckpt_ext.errors import CheckpointError, StorageError, storage_error
from ms_ckpt_ext.storage import locks, remains
from ms_ckpt_ext.storage.durable import sync_folder, write_atomically
from ms_ckpt_ext.storage.hold import Hold
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader

ONE_TASK = "task-1-of-1"
"""Name of the task that does a whole job."""


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
        self._sync = sync
        self._hold = Hold(self.target, self.folder, task, sync)

    def open(self) -> None:
        """Make the folder and hold the target. Raises StorageError: another run does, or there are no locks there."""
        self._hold.take()

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
        path = self.folder / (name + remains.PARTIAL)
        with _told("make a folder for", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def accept(self, name: str) -> None:
        """Declare the written and synced file complete. Raises StorageError."""
        with _told("rename", self.folder / (name + remains.PARTIAL)):
            os.rename(self.folder / (name + remains.PARTIAL), self.folder / name)

    def keep(self, name: str, note: bytes) -> None:
        """Keep a note about a file that is about to be accepted, until the job is done. Raises StorageError."""
        path = self.folder / (name + remains.NOTE)
        with _told("write", path):
            path.write_bytes(note)

    def note(self, name: str) -> Optional[bytes]:
        """What `keep` was given. Not synced, so a crash of the machine may have left less of it."""
        try:
            return (self.folder / (name + remains.NOTE)).read_bytes()
        except OSError:
            return None

    def discard(self, names: Iterable[str]) -> None:
        """Remove what there is of these files, lest another task takes it for complete. Raises StorageError."""
        for name in names:
            for path in (self.folder / (name + ending) for ending in (remains.PARTIAL, "", remains.NOTE)):
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
                (self.folder / (name + remains.PARTIAL)).unlink(missing_ok=True)
        self._hold.drop_if_empty()

    def close(self) -> None:
        """Let go of the target."""
        self._hold.release()


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

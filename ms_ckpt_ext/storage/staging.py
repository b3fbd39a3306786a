"""Output that appears whole or not at all, and survives being killed.

1. A job writes into a folder of its own in the target's hidden folder, named after a fingerprint of everything that
   decides the result. A file is written under a temporary name, synced, and renamed when it is complete.
2. A second run of the same job finds the finished files by that fingerprint and does not write them again.
3. When all that appears together is complete, it is published (`storage.publishing`). If a job is killed meanwhile, the
   target refuses to load; the next run there, of whatever job, finishes that first.
4. While it runs, a job claims the names of its files (`storage.claims`), so that no two write the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Optional

from ms_ckpt_ext.errors import CheckpointError, StorageError, storage_error
from ms_ckpt_ext.storage import locks, publishing
from ms_ckpt_ext.storage.claims import NOTE, PARTIAL, Claim
from ms_ckpt_ext.storage.linux import derived, read_small, require_absence
from ms_ckpt_ext.storage.locks import HiddenFolder
from ms_ckpt_ext.storage.publishing import RECORD, Journal, Ledger, State, state_of
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader

ONE_TASK = "task-1-of-1"
"""Name of the task that does a whole job."""


class Staging:
    """The hidden folder of one job in one target directory.

    Args:
        job: fingerprint of the job.
        ledger: where digests of what is published go.
        task: the part of the job that this process does.
        sync: whether what is published is durable; else the kernel writes it when it likes.
    """

    def __init__(self, target: str, job: str, ledger: Ledger, task: str = ONE_TASK, sync: bool = True) -> None:
        self.target = Path(target)
        self.job = job
        self._hidden = HiddenFolder(self.target)
        self.folder = self._hidden.job(job)
        self._ledger, self._sync = ledger, sync
        self._claim = Claim(self._hidden, job, task, sync, ledger)

    def open(self, written: Collection[str], shunned: Collection[str] = ()) -> None:
        """Make the folder, and claim files. What others were publishing when they were interrupted is finished.

        Args:
            written: files that are going to be written, relative to the target.
            shunned: others that nobody else may write meanwhile.

        Raises StorageError: another run writes one of them, or the file system has no locks.
        """
        self._claim.take(written, shunned)

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
        path = derived(self.folder / name, PARTIAL)
        with _told("make a folder for", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def accept(self, name: str) -> None:
        """Declare the written and synced file complete. Raises StorageError."""
        partial = derived(self.folder / name, PARTIAL)
        with _told("rename", partial):
            os.rename(partial, self.folder / name)

    def keep(self, name: str, note: bytes) -> None:
        """Keep a note about a file that is about to be accepted, until the job is done. Raises StorageError."""
        path = derived(self.folder / name, NOTE)
        with _told("write", path):
            path.write_bytes(note)

    def note(self, name: str) -> Optional[bytes]:
        """What `keep` was given; a crash of the machine may have left less of it, for it is not synced.

        Raises StorageError.
        """
        path = derived(self.folder / name, NOTE)
        try:
            return read_small(path)
        except OSError as error:
            require_absence(error, path, "read")
            return None

    def discard(self, names: Iterable[str]) -> None:
        """Remove what exists of these files, so that no other task takes them for complete. Raises StorageError."""
        for path in (self.folder / name for name in names):
            for each in (derived(path, PARTIAL), path, derived(path, NOTE)):
                with _told("remove", each):
                    each.unlink(missing_ok=True)

    def holds(
        self,
        name: str,
        size: int,
        literals: Sequence[tuple[int, bytes]],
        opener: Callable[[str], ByteReader] = PlainReader,
    ) -> bool:
        """True when a complete file of this name waits here.

        Args:
            size: its bytes on disk.
            literals: bytes that it must have, each with its offset, as `opener` reads it.

        Raises StorageError: it exists, but cannot be read.
        """
        return _matches(self.folder / name, size, literals, opener)

    def published(self) -> dict[str, State]:
        """Unchanged files that this very job has published here; not those whose digests were recorded and are lost."""
        digests = (self.target / self._ledger.MANIFEST_NAME).exists()
        mine = {n: e for n, e in publishing.read_published(self.target).files.items() if e.job == self.job}
        return {n: e.state for n, e in mine.items() if state_of(self.target / n) == e.state and e.digested <= digests}

    def begun(self) -> dict[str, State]:
        """Files that this very job was publishing when it was interrupted; `open` finishes that."""
        found = publishing.read_journal(self._hidden.journal(self.job))
        return {} if found is None else dict(found.files)

    def is_at(self, index: Mapping[str, bytes]) -> bool:
        """Whether these small files (name -> contents) are in the target."""
        try:
            return all(read_small(self.target / name) == contents for name, contents in index.items())
        except OSError:
            return False

    def tidy(self) -> None:
        """Remove, where possible, what is left of a job whose files are all in place: a run was killed just then."""
        lock = locks.lock_of(Path(self.target, self._ledger.MANIFEST_NAME))
        with contextlib.suppress(OSError):
            if lock.exists():
                with locks.alone(lock):
                    pass
            if self._hidden.enter_if_there():
                try:
                    publishing.finish_all(self._hidden, self._ledger, lambda _: ())
                    if not any(locks.held(self.folder)):
                        shutil.rmtree(self.folder, ignore_errors=True)
                finally:
                    self._hidden.leave()

    def seen(self) -> set[str]:
        """Tasks of this job that have begun in this target, as far as the job is unfinished."""
        return self._claim.seen()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that publishes in this target, or checks whether it should. Raises StorageError."""
        with _told("lock", self.target):
            self._hidden.enter()
        try:
            yield
        finally:
            self._hidden.leave()

    def publish(
        self,
        names: Collection[str],
        index: Mapping[str, bytes],
        gone: Collection[str] = (),
        digests: Mapping[str, Any] = MappingProxyType({}),
        missing: Collection[str] = (),
    ) -> None:
        """Move files that are complete into place; the caller is `alone`. Raises StorageError.

        Args:
            names: the files, relative to the target.
            index: files that make the result loadable (name -> contents), which come last.
            gone: files of an older result that must go, besides those of the same names.
            digests: what the ledger is to keep of the files.
            missing: files of the set that are to come from other shares.
        """
        states = {name: self._complete(name) for name in names}
        texts = {name: contents.decode() for name, contents in index.items()}
        boot = None if self._sync else publishing.this_boot()
        todo = Journal(self.job, states, texts, sorted(gone), dict(digests), sorted(missing), boot)
        with _told("publish the result in", self.target):
            _require_room(self.target, (*todo.names, RECORD, self._ledger.MANIFEST_NAME))
            publishing.publish(self._hidden, todo, self._ledger)

    def _complete(self, name: str) -> State:
        """The state of a file that is complete."""
        state = state_of(self.folder / name)
        if state is None:
            raise storage_error("find", str(self.folder / name), FileNotFoundError(errno.ENOENT, ""))
        return state

    def abandon(self, names: Iterable[str]) -> None:
        """After an error while writing these files: keep finished ones for the next run, remove the others."""
        with contextlib.suppress(OSError):
            for name in names:
                derived(self.folder / name, PARTIAL).unlink(missing_ok=True)
            self._claim.drop_if_empty()

    def close(self) -> None:
        """Release the claimed files."""
        self._claim.release()


def _require_room(target: Path, names: Iterable[str]) -> None:
    """Raise StorageError before anything is changed, if any of these could not be replaced."""
    for path in (target / name for name in names):
        folder = path.parent
        wrong = path if path.is_dir() and not path.is_symlink() else folder if folder.is_file() else None
        if wrong is not None:
            raise StorageError(
                errno.EISDIR if wrong is path else errno.ENOTDIR,
                f"cannot publish the result in {str(target)!r}: {str(wrong)!r} stands where a "
                f"{'file' if wrong is path else 'folder'} of the result belongs; move it away, then run the same "
                "command again: finished files are kept",
            )
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise storage_error("publish the result in", str(folder), OSError(errno.EACCES, ""))


def free_space(target: str) -> Optional[int]:
    """Bytes free where a directory is, or would be made; None when that is unknown."""
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
    except OSError as error:
        require_absence(error, path)
    except CheckpointError:
        pass
    return False


def _read(reader: ByteReader, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    reader.read_into(offset, memoryview(data))
    return data


@contextlib.contextmanager
def _told(action: str, path: Path) -> Iterator[None]:
    """Raise an error of the system as a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(action, str(path), error) from error

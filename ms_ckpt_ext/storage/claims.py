"""The right to write files: of two runs that would write the same file, one does and the other is refused.

1. A task enters the hidden folders of its target, of the folders above it and of those that it writes into, where they
   exist, from the top down: so of two tasks that meet somewhere, one comes first.
2. What others had begun to publish there is finished (`storage.publishing`).
3. It locks a file of its own in its job's folder, looks at what others claim whose locks are held, and claims the names
   that it is going to write. It is refused where another run claims one of them, and where this very job is run by
   tasks that divide it into a different number of parts, and would write the same files.
4. What is left of an unfinished job that nobody runs, and that would write the same files here, is removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence, Set
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import BLANK, StorageError, storage_error
from ms_ckpt_ext.storage import locks, publishing
from ms_ckpt_ext.storage.linux import is_folder, read_small, require_absence, sync_path
from ms_ckpt_ext.storage.locks import HiddenFolder
from ms_ckpt_ext.storage.publishing import places_of
from ms_ckpt_ext.storage.reader import from_json

NOTE, PARTIAL = ".note", ".partial"
"""Endings of the names of files that belong to a file of a job, or are not complete yet."""
_NOT_FINISHED = (NOTE, PARTIAL, locks.SUFFIX)
_TASK = re.compile(r"^task-\d+(-of-\d+)\.lock$")


class _Place(NamedTuple):
    """A folder into which another job may write some of the same files.

    Attributes:
        hidden: its hidden folder.
        above, below: where its target lies, seen from this one: names begin with `above` there, or with `below` here.
    """

    hidden: HiddenFolder
    above: str = ""
    below: str = ""

    def here(self, names: Collection[str]) -> set[str]:
        """Names of files there, as they are called here; without those that cannot lie here."""
        return {self.below + name[len(self.above) :] for name in names if name.startswith(self.above)}

    def meets(self, mine: Set[str], theirs: Collection[str]) -> set[str]:
        """Names here of the files that both write."""
        return self.here(theirs) & mine


class Claim:
    """What a task claims in a target.

    Args:
        hidden: the hidden folder of the target.
        job: the job.
        task: the part of it that this process does.
        sync: whether the names of folders that are made for the target are made durable.
        ledger: where files are put on record whose publishing is finished for others.
    """

    def __init__(self, hidden: HiddenFolder, job: str, task: str, sync: bool, ledger: publishing.Ledger) -> None:
        self._hidden, self._target, self._job, self._task = hidden, hidden.target, job, task
        self._folder = hidden.job(job)
        self._sync, self._ledger = sync, ledger
        self._lock: Optional[int] = None
        self._made: list[Path] = []

    def take(self, written: Collection[str], shunned: Collection[str] = ()) -> None:
        """Claim files that are going to be written, and others that nobody else may write meanwhile.

        Names are relative to the target. Afterwards the job's folder exists.

        Raises:
            StorageError: another run writes one of them, or no file can have such a name; or there are no locks.
        """
        above = (self._target, *self._target.parents)
        self._made = [path for path in above if not os.path.lexists(path)]
        try:
            _refuse_long(self._target, next(filter(os.path.exists, above)), written)
            while not self._take({*written, *shunned}):
                pass
            for made in self._made if self._sync else ():
                sync_path(made.parent)
        except OSError as error:
            self._leave()
            if isinstance(error, StorageError):
                raise
            raise storage_error("write into", str(self._target), error) from error
        except BaseException:
            self.release()
            raise

    def _take(self, names: Set[str]) -> bool:
        """Claim files. False: a hidden folder has appeared that was not entered. Raises OSError, StorageError."""
        places = self._around(names)
        with contextlib.ExitStack() as entered:
            there = []
            for place in places:
                if place.hidden is self._hidden:
                    self._hidden.enter()
                elif not place.hidden.enter_if_there():
                    continue
                entered.callback(place.hidden.leave)
                there.append(place)
            for place in there:
                publishing.finish_all(place.hidden, self._ledger, partial(place.meets, names))
            self._take_lock()
            _refuse_alike(self._folder, self._target, names)
            self._look(there, names)
            self._write(names)
        seen = {place.hidden.target for place in there}
        others = (place.hidden for place in self._around(names) if place.hidden is not self._hidden)
        return not any(hidden.is_there and hidden.target not in seen for hidden in others)

    def _around(self, names: Collection[str]) -> list[_Place]:
        """The target, the folders above it, and those in it that hold the names: each once, from the top down."""
        inner = {above.as_posix() for name in names for above in PurePosixPath(name).parents} - {"."}
        above = ((HiddenFolder(Path(folder)), begins) for folder, begins in places_of(str(self._target)) if begins)
        below = ((HiddenFolder(self._target / folder), f"{folder}/") for folder in inner)
        places: dict[tuple[str, ...], _Place] = {}
        for place in (
            _Place(self._hidden),
            *(_Place(hidden, above=begins) for hidden, begins in above),
            *(_Place(hidden, below=begins) for hidden, begins in below if hidden.is_there),
        ):
            places.setdefault(Path(os.path.realpath(place.hidden.target)).parts, place)
        return [place for _, place in sorted(places.items())]

    def _take_lock(self) -> None:
        """Lock this task's file."""
        if self._lock is not None:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / self._own_lock
        descriptor = locks.open_lock(path)
        try:
            locked = locks.try_lock(descriptor, path)
        except StorageError:  # no locks here, so nobody holds this one
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        if not locked:
            os.close(descriptor)
            raise _busy(self._target, "this very job is running")
        self._lock = descriptor

    @property
    def _own_lock(self) -> str:
        return f"{self._task}{locks.SUFFIX}"

    def _look(self, places: Collection[_Place], names: Set[str]) -> None:
        """Refuse names that another run claims; remove jobs here that nobody runs and that would write the same."""
        left = []
        for place in places:
            here = place.hidden is self._hidden
            for job, claimed in _claims(place.hidden).items():
                both, folder = place.meets(names, claimed), place.hidden.job(job)
                if not both or (here and job == self._job) or not is_folder(folder):
                    continue
                if any(locks.held(folder)):
                    more = f" and {len(both) - 1} more files" if both - {min(both)} else ""
                    raise _busy(place.hidden.target, f"both write {min(both)!r}{more}")
                left += [folder] if here else []
        if any(map(self._is_another_split, locks.held(self._folder, self._own_lock))):
            raise _busy(self._target, "it divides this very job among another number of tasks")
        for folder in left:
            self._drop(folder)

    def _is_another_split(self, lock: str) -> bool:
        """Whether a lock belongs to a task that divides the work into a different number of parts than this one."""
        task = _TASK.match(lock)
        return task is not None and not self._task.endswith(task[1])

    def _drop(self, other: Path) -> None:
        """Remove the folder of another job."""
        finished = sum(1 for path in unfinished(other) if not path.name.endswith(_NOT_FINISHED))
        try:
            shutil.rmtree(other)
        except OSError as error:
            raise StorageError(
                error.errno,
                f"cannot remove {str(other)!r}, which another job left unfinished, perhaps another user's "
                f"({error.strerror}); have its owner remove it, or choose another target",
            ) from error
        if finished:
            log.warning(
                "the job into %s drops %d finished files of another that was not completed there: its source, layouts "
                "or options were different (or it did not sync, and the machine was restarted), so they do not fit",
                self._target,
                finished,
            )

    def _write(self, names: Collection[str]) -> None:
        """Claim the names in a new line, even after one that a killed process left half written."""
        line = json.dumps({"job": self._job, "names": sorted(names)})
        with open(locks.open_lock(self._hidden.claims), "wb") as file:
            file.seek(0, os.SEEK_END)
            file.write(f"\n{line}\n".encode())

    def seen(self) -> set[str]:
        """Tasks of this job that have begun here, whatever became of them, while the job is unfinished."""
        locked = (path.name for path in self._folder.glob(f"*{locks.SUFFIX}"))
        return {name[: -len(locks.SUFFIX)] for name in locked}

    def _leave(self) -> None:
        """Leave no trace, except finished files of an earlier run."""
        try:
            with contextlib.suppress(OSError):
                self.drop_if_empty()
        finally:
            self.release()

    def drop_if_empty(self) -> None:
        """Remove the folder, unless it has files or another task runs, and a target made for it. Raises OSError."""
        try:
            besides = "" if self._lock is None else self._own_lock
            with self._hidden.entered():
                if not unfinished(self._folder) and not any(locks.held(self._folder, besides)):
                    shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            for made in self._made:
                with contextlib.suppress(OSError):  # not empty
                    made.rmdir()

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _claims(hidden: HiddenFolder) -> dict[str, set[str]]:
    """Job -> the names its tasks claimed; jobs in the order of their claims. A line that was cut short is ignored."""
    try:
        lines = read_small(hidden.claims).splitlines()
    except (FileNotFoundError, PermissionError):  # a folder above may be another user's
        return {}
    found: dict[str, set[str]] = {}
    for line in filter(None, lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            held = from_json(line)
            found.setdefault(held["job"], set()).update(held["names"])
    return found


def unfinished(folder: Path) -> list[Path]:
    """Files that runs left in a job's folder, besides locks. Raises StorageError."""
    walk = os.walk(folder, onerror=lambda error: require_absence(error, folder, "list"))
    walked = ((Path(inside), name) for inside, _, names in walk for name in names)
    return [inside / name for inside, name in walked if not name.endswith(locks.SUFFIX)]


def _busy(target: Path, why: str) -> StorageError:
    return StorageError(
        errno.EBUSY,
        f"another run is writing into {str(target)!r} ({why}); wait for it to end, or choose another target",
    )


def _refuse_alike(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Raise StorageError before anything is written where the file system takes two of the names for one.

    Some ignore case, some how a character is composed, some what shows nothing or dots and spaces at the end. Which do
    is tried out in `folder`, where there are such names.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    for alike in groups.values():
        one, other = _same_file(folder, sorted(alike)) if len(alike) > 1 else ("", "")
        if one:
            raise StorageError(
                errno.ENOTUNIQ,
                f"cannot write both {one!r} and {other!r} into {str(target)!r}: its file system takes these names for "
                "one; rename an input, or choose a target on another file system",
            )


def _folded(name: str) -> str:
    """Equal for all names that any file system takes for one."""
    if not name.isascii():
        import unicodedata

        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        name = "".join(each for each in name if each.isprintable() and each not in BLANK)
    return "/".join(part.rstrip(" .") for part in name.casefold().split("/"))


def _same_file(folder: Path, names: Sequence[str]) -> tuple[str, str]:
    """Two of the names that are one file below a folder; "" twice when there are none. Raises OSError."""
    import tempfile

    files: dict[tuple[int, int], str] = {}
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        for name in names:
            path = Path(probe, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
            status = os.fstat(descriptor)
            os.close(descriptor)
            before = files.setdefault((status.st_dev, status.st_ino), name)
            if before != name:
                return before, name
    return "", ""


def _refuse_long(target: Path, there: Path, names: Collection[str]) -> None:
    """Raise StorageError before anything is written where a name is longer than the file system takes."""
    try:
        most = os.pathconf(there, "PC_NAME_MAX")
    except (OSError, ValueError):
        return
    for part in sorted({part for name in names for part in name.split("/")}):
        length = len(os.fsencode(part))
        if length > most > 0:
            raise StorageError(
                errno.ENAMETOOLONG,
                f"cannot write {part!r} into {str(target)!r}: File name too long: it has {length} bytes, and the file "
                f"system takes {most}; choose a shorter one",
            )

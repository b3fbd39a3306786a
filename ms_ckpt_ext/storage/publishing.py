"""A result appears in a target whole, and what appeared there is on record.

1. When every file of a job is complete in its hidden folder, the job notes in a journal what is to be done: files to
   move, files of an older result to remove, indexes to write, digests to put on record. From then on the result is the
   new one: if this process is killed, whoever enters the hidden folder next finishes what the journal says.
2. Meanwhile loaders refuse the target: indexes are replaced by ones that lead to an empty file, the old result is
   removed, the files are moved, and the true indexes come last.
3. What is published in a folder is on record in it: `.ms_ckpt_ext.json`, a line for every file. A file that is as it
   was published is this package's, and may be replaced by another result; a job whose files all are has nothing to do.
   Jobs into one folder share the record, each for its files, and change it one at a time (`storage.locks`). Names
   are relative to the folder, so a file may be on record there or in a folder further up.
4. The journal of a job that does not sync is good until the machine is restarted. After that, what was moved may have
   holes, and is removed. So is what was moved of a set if somebody else has removed one of its files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Protocol

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import StorageError, storage_error
from ms_ckpt_ext.storage.linux import (
    boot_id,
    derived,
    is_below,
    read_small,
    require_absence,
    status_of,
    sync_path,
    write_atomically,
)
from ms_ckpt_ext.storage.locks import HiddenFolder
from ms_ckpt_ext.storage.reader import from_json

RECORD = ".ms_ckpt_ext.json"
# Loaders take a folder with a single .safetensors file for a whole checkpoint, MindSpore's even beside an index.
# While files are moved there is thus one more, empty, and an index that leads to it. Its name is the error message.
OBSTACLE = "publishing-was-interrupted-run-the-job-again.safetensors"
UNFINISHED = json.dumps({"metadata": {"total_size": 0}, "weight_map": {"": OBSTACLE}}).encode()


class State(NamedTuple):
    """How a file was when it was published: bytes, and modification time in ns."""

    size: int
    mtime_ns: int


class Entry(NamedTuple):
    """What is on record of a file: how it was published last, by which job, and whether its digests were recorded."""

    state: State
    job: Optional[str]
    digested: bool = False


class Published(NamedTuple):
    """What is on record in a folder.

    Attributes:
        files: name -> what is known of it.
        missing: job -> files of it that its other shares are to publish, here or elsewhere.
    """

    files: Mapping[str, Entry] = {}
    missing: Mapping[str, Collection[str]] = {}

    def is_as_published(self, name: str, state: Optional[State]) -> bool:
        """Whether a file is on record with this state."""
        return name in self.files and self.files[name].state == state


def state_of(path: Path) -> Optional[State]:
    """The state of a file; None when there is none. Raises StorageError."""
    status = status_of(path)
    return None if status is None else State(status.st_size, status.st_mtime_ns)


def read_published(folder: Path) -> Published:
    """What is on record in a folder; nothing where there is no record, or a faulty one. Raises StorageError."""
    try:
        held: Any = from_json(read_small(folder / RECORD))
        of_one_job = (held.get("job"), True)  # for older records, which were of one job each
        entries = ((name, (*entry, *of_one_job)[:4]) for name, entry in held["files"].items())
        files = {name: Entry(State(size, mtime), job, bool(digested)) for name, (size, mtime, job, digested) in entries}
        missing = {job: [*map(str, names)] for job, names in held.get("missing", {}).items()}
        return Published(files, missing) if all(map(_is_sound, files.values())) else Published()
    except OSError as error:
        require_absence(error, folder / RECORD, "read")
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return Published()


def _is_sound(entry: Entry) -> bool:
    return type(entry.state.size) is type(entry.state.mtime_ns) is int and isinstance(entry.job, (str, type(None)))


class Ledger(Protocol):
    """Keeps digests of files, in `MANIFEST_NAME` in their folder or one above. See `engine.integrity.manifest`."""

    MANIFEST_NAME: str

    def take_off(self, directory: str, names: Collection[str], sync: bool) -> None:
        """Forget files, which are about to be removed or replaced. Raises StorageError."""

    def put_on(self, directory: str, entries: Mapping[str, Any], sync: bool) -> None:
        """Record files that are in place. Raises StorageError."""


class Journal(NamedTuple):
    """What is to be done to publish a result. Names are relative to the target.

    Attributes:
        job: whose files they are.
        files: name of a file to move -> its state.
        indexes: files that make the result loadable, written last: name -> text.
        gone: files of an older result.
        digests: file -> what the ledger is to keep of it.
        missing: files of the set that other shares are to publish.
        boot: the machine's, where the files are not synced: after another boot they cannot be trusted.
    """

    job: str
    files: Mapping[str, State]
    indexes: Mapping[str, str] = {}
    gone: Collection[str] = ()
    digests: Mapping[str, Any] = {}
    missing: Collection[str] = ()
    boot: Optional[str] = None

    @property
    def sync(self) -> bool:
        """Whether what is done is made durable."""
        return self.boot is None

    @property
    def names(self) -> set[str]:
        """Every file that is written, or removed."""
        return {*self.files, *self.indexes, *self.gone, *self.obstacles}

    @property
    def obstacles(self) -> set[str]:
        """Files that keep loaders away meanwhile."""
        return obstacles(self.indexes)


def obstacles(indexes: Iterable[str]) -> set[str]:
    """Files that keep loaders away while these indexes are not written: one beside each."""
    return {os.path.join(os.path.dirname(name), OBSTACLE) for name in indexes}


def this_boot() -> str:
    """What identifies this boot of the machine."""
    return boot_id().hex()


def publish(hidden: HiddenFolder, journal: Journal, ledger: Ledger) -> None:
    """Publish the files of a job. The caller has entered the hidden folder. Raises OSError, StorageError."""
    write_atomically(hidden.journal(journal.job), json.dumps(journal._asdict()).encode(), journal.sync)
    if journal.sync:
        folders = {(hidden.job(journal.job) / name).parent for name in journal.files}
        for folder in (*sorted(folders), hidden.path, hidden.target):
            sync_path(folder)
    _finish(hidden, journal, ledger)


def finish_all(hidden: HiddenFolder, ledger: Ledger, needed: Callable[[Collection[str]], Collection[str]]) -> None:
    """Finish what was interrupted. The caller has entered the hidden folder, where that is possible.

    Args:
        needed: names -> those of them that must be finished, so that it is an error when they cannot be.

    Raises:
        StorageError: such files cannot be finished.
    """
    for path in hidden.journals():
        journal = read_journal(path)
        if journal is None:
            path.unlink(missing_ok=True)  # half written, so nothing was done yet
            continue
        try:
            if not hidden.is_entered:
                raise PermissionError(None, "its folder is another user's")
            log.info("finishing what an earlier job was publishing in %s when it was interrupted", hidden.target)
            _finish(hidden, journal, ledger)
        except OSError as error:
            if needed(journal.names):
                raise StorageError(
                    error.errno,
                    f"cannot finish what an earlier run was publishing in {str(hidden.target)!r} when it was "
                    f"interrupted ({error.strerror or error}); run that job again, or have its owner do so",
                ) from error
            log.warning("what an earlier run was publishing in %s is still unfinished: %s", hidden.target, error)


def read_journal(path: Path) -> Optional[Journal]:
    """A journal from its file; None when it is not a valid one. Raises StorageError: it cannot be read."""
    try:
        held: dict[str, Any] = from_json(read_small(path))
        found = Journal(**{**held, "files": {name: State(*state) for name, state in held["files"].items()}})
        lists, maps = (found.gone, found.missing), (found.indexes, found.digests)
        if not all(isinstance(each, (list, tuple)) for each in lists) or not all(isinstance(m, dict) for m in maps):
            return None
        texts = [found.job, *found.gone, *found.missing, *found.indexes.values(), found.boot or ""]
        numbers = [number for state in found.files.values() for number in state]
        names = (found.job, *found.files, *found.indexes, *found.gone)
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            return None
        for text in found.indexes.values():
            text.encode()
    except OSError as error:
        if error.errno in (errno.ENOENT, None):  # or it is no regular file
            return None
        raise storage_error("read what an earlier run was publishing, in", str(path), error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.job == path.stem and "/" not in found.job and all(map(is_below, names)) else None


def _finish(hidden: HiddenFolder, journal: Journal, ledger: Ledger) -> None:
    target, folder = hidden.target, hidden.job(journal.job)
    if not _is_done(target, journal):
        places = ((state_of(folder / name), state_of(target / name)) for name in journal.files)
        whole = all(state in found for state, found in zip(journal.files.values(), places))
        if whole and journal.boot in (None, this_boot()):
            _apply(target, folder, journal, ledger)
        else:
            _take_away(target, journal)
    hidden.journal(journal.job).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_done(target: Path, journal: Journal) -> bool:
    """Whether all is on record, which is the last step. What has changed since is not this job's business."""
    known = read_published(target).files
    return all(name in known and known[name][:2] == (state, journal.job) for name, state in journal.files.items())


def _take_away(target: Path, journal: Journal) -> None:
    """Remove what was moved; an older result that is still there stays, and so do files that keep loaders away."""
    known = read_published(target)
    for name, state in journal.files.items():
        found = state_of(target / name)
        if found == state or not (journal.sync or known.is_as_published(name, found)):
            (target / name).unlink(missing_ok=True)


def _apply(target: Path, folder: Path, journal: Journal, ledger: Ledger) -> None:
    sync, waiting = journal.sync, [name for name in journal.files if (folder / name).exists()]
    for name in journal.obstacles:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target / name, b"", sync)
    for name in journal.indexes:
        write_atomically(target / name, UNFINISHED, sync)
    ledger.take_off(str(target), (*journal.files, *journal.gone), sync)
    for name in (*journal.gone, *waiting):
        (target / name).unlink(missing_ok=True)
    for emptied in {(target / name).parent for name in journal.gone} - {target}:
        with contextlib.suppress(OSError):  # not empty
            emptied.rmdir()
    for name in waiting:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _move(folder / name, target / name, sync)
    if sync:
        for inner in {(target / name).parent for name in journal.files}:
            sync_path(inner)
    for name in journal.obstacles:
        if not _others_unfinished((target / name).parent, journal.indexes):
            (target / name).unlink(missing_ok=True)
    if journal.digests:
        ledger.put_on(str(target), journal.digests, sync)
    for name, text in journal.indexes.items():
        write_atomically(target / name, text.encode(), sync)
    entries = {name: Entry(state, journal.job, name in journal.digests) for name, state in journal.files.items()}
    put_on_record(target, entries, journal.gone, journal.missing, sync)
    if sync:
        sync_path(target)


def put_on_record(
    folder: Path, files: Mapping[str, Entry], gone: Collection[str], missing: Collection[str], sync: bool
) -> None:
    """Put files of a job on record, and take others off it. One caller at a time. Raises OSError."""
    known = read_published(folder)
    kept = {name: entry for name, entry in known.files.items() if name not in gone}
    entries = {**kept, **files}
    mine, jobs = {entry.job for entry in files.values()}, {entry.job for entry in entries.values()}
    lacking = {job: names for job, names in known.missing.items() if job in jobs - mine}
    lacking.update({str(job): sorted(missing) for job in mine if missing})
    lines = ",\n  ".join(
        f"{json.dumps(name)}: {json.dumps([*entry.state, entry.job, entry.digested])}"
        for name, entry in entries.items()
    )
    text = f'{{"version": 2, "missing": {json.dumps(lacking)}, "files": {{\n  {lines}\n}}}}\n'
    write_atomically(folder / RECORD, text.encode(), sync)


def _move(old: Path, new: Path, sync: bool) -> None:
    """Rename a file; or copy it, where a folder of the target is on another file system."""
    try:
        os.rename(old, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = derived(new, ".partial")
        shutil.copy2(old, partial)  # with its modification time, which is part of its state
        if sync:
            sync_path(partial)
        os.replace(partial, new)
        os.unlink(old)


def is_unfinished(path: Path) -> bool:
    """True when a file is the index that stands in while files are moved. Raises StorageError."""
    try:
        return path.stat().st_size == len(UNFINISHED) and path.read_bytes() == UNFINISHED
    except OSError as error:
        require_absence(error, path, "read")
        return False


def _others_unfinished(folder: Path, mine: Collection[str]) -> bool:
    """Whether a folder has an unfinished index other than those of these names."""
    names = {os.path.basename(name) for name in mine}
    return any(path.name not in names and is_unfinished(path) for path in folder.glob("*.json"))


def places_of(folder: str) -> Iterator[tuple[str, str]]:
    """A folder and those above it, each with the prefix that names in the first have there.

    Where a folder is named through links, both by that name and by its real path.

    >>> list(places_of("/a/b"))
    [('/a/b', ''), ('/a', 'b/'), ('/', 'a/b/')]
    """
    for spelled in dict.fromkeys((os.path.abspath(folder), os.path.realpath(folder))):
        above, begins = spelled, ""
        yield above, begins
        while above != os.path.dirname(above):
            above, base = os.path.split(above)
            begins = f"{base}/{begins}"
            yield above, begins

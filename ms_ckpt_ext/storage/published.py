"""What is on record as published in a folder: `.ms_ckpt_ext.json`, a line for every file.

A file that is as it was published is this package's, and may be replaced by another result; and a job whose files all
are has nothing to do. Jobs into one folder share the record, each for its files, and change it one at a time
(`storage.hidden`). Names are relative to the folder, so a file may be on record there or in a folder further up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.parsing import from_json
from ms_ckpt_ext.storage.atomic import write_atomically

RECORD = ".ms_ckpt_ext.json"


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
        """Whether a file that is like this is on record so."""
        return name in self.files and self.files[name].state == state


def state_of(path: Path) -> Optional[State]:
    """The state of a file; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return State(status.st_size, status.st_mtime_ns)


def read_published(folder: Path) -> Published:
    """What is on record in a folder; nothing, where there is no record or it cannot be understood."""
    try:
        held: Any = from_json((folder / RECORD).read_bytes())
        of_one_job = (held.get("job"), True)  # as records were when they were of one job each
        entries = ((name, (*entry, *of_one_job)[:4]) for name, entry in held["files"].items())
        files = {name: Entry(State(size, mtime), job, bool(digested)) for name, (size, mtime, job, digested) in entries}
        missing = {job: [*map(str, names)] for job, names in held.get("missing", {}).items()}
        return Published(files, missing) if all(map(_is_sound, files.values())) else Published()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Published()


def _is_sound(entry: Entry) -> bool:
    return type(entry.state.size) is type(entry.state.mtime_ns) is int and isinstance(entry.job, (str, type(None)))


def put(folder: Path, files: Mapping[str, Entry], gone: Collection[str], missing: Collection[str], sync: bool) -> None:
    """Put files of a job on record, and take others off it. For one at a time. Raises OSError."""
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


def places_of(folder: str) -> Iterator[tuple[str, str]]:
    """A folder and those above it, each with how names in the first begin there.

    Of a folder that is named through links, by that name and where it really is.

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

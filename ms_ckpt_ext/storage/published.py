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

from ms_ckpt_ext.storage.durable import write_atomically

RECORD = ".ms_ckpt_ext.json"


class State(NamedTuple):
    """How a file was when it was published: bytes, and modification time in ns."""

    size: int
    mtime_ns: int


class Published(NamedTuple):
    """What is on record in a folder.

    Attributes:
        files: name -> its state when it was published last.
        jobs: name -> the job that did.
        missing: job -> files of it that its other shares are to publish, here or elsewhere.
    """

    files: Mapping[str, State] = {}
    jobs: Mapping[str, str] = {}
    missing: Mapping[str, Collection[str]] = {}


def state_of(path: Path) -> Optional[State]:
    """The state of a file; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return State(status.st_size, status.st_mtime_ns)


def read(folder: Path) -> Published:
    """What is on record in a folder; nothing, where there is no record or it cannot be understood."""
    try:
        held: Any = json.loads((folder / RECORD).read_bytes())
        everywhere = held.get("job")  # as records had it when they were of one job each
        files = {name: State(*entry[:2]) for name, entry in held["files"].items()}
        jobs = {name: (*entry, everywhere)[2] for name, entry in held["files"].items()}
        return Published(files, jobs, held.get("missing", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return Published()


def put(
    folder: Path, job: str, files: Mapping[str, State], gone: Collection[str], missing: Collection[str], sync: bool
) -> None:
    """Put files of a job on record, and take others off it. For one at a time. Raises OSError."""
    known = read(folder)
    kept = {name: (*state, known.jobs[name]) for name, state in known.files.items() if name not in {*files, *gone}}
    entries = {**kept, **{name: (*state, job) for name, state in files.items()}}
    lacking = {other: names for other, names in known.missing.items() if other in known.jobs.values() and other != job}
    lacking.update({job: sorted(missing)} if missing else {})
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
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

"""What a run that was killed while it published left in the target, so that the next job there can take it away.

A run notes in its hidden folder what it is about to move and to remove. Another job into that target drops the folder,
but first takes over the names of what it left; they go when that job publishes. Until then an index that leads to an
empty file, and that file, keep loaders from taking the rest for a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = ".ms_ckpt_ext-"
NOTE, PARTIAL = ".note", ".partial"
"""Ends of names of what belongs to a file, or is one that is not complete."""
PUBLISHING = "publishing"
REMAINS = "remains"
MANIFEST = ".ms_ckpt_ext.json"
# Loaders take a folder with a single .safetensors file for a whole checkpoint, MindSpore's even beside an index.
# While files are moved there is thus one more, empty, and an index that leads to it. Its name is the error message.
OBSTACLE = "publishing-was-interrupted-run-the-job-again.safetensors"
UNFINISHED = json.dumps({"metadata": {"total_size": 0}, "weight_map": {"": OBSTACLE}}).encode()


def note(folder: Path, names: Iterable[str], index: Iterable[str], gone: Iterable[str]) -> None:
    """Note in a job's folder what is about to be moved, and to be taken away. Raises OSError."""
    content = {"names": [*names], "index": [*index], "gone": [*gone]}
    partial = folder / f"{PUBLISHING}.partial"
    partial.write_text(json.dumps(content))
    partial.replace(folder / PUBLISHING)


def inherit(folder: Path, other: Path, target: Path, job: str) -> None:
    """Take over what `job`, whose folder `other` is about to be removed, left in the target. Raises OSError."""
    names = inherited(folder) | left(other, target, job)
    if names:
        (folder / REMAINS).write_text(json.dumps(sorted(names)))


def inherited(folder: Path) -> set[str]:
    """Names of files in the target that jobs left whose folders are gone."""
    found = _read(folder / REMAINS)
    return set(found) if isinstance(found, list) else set()


def left(folder: Path, target: Path, job: str) -> set[str]:
    """Names of files in the target that the unfinished job of this folder left there, or was about to remove.

    The old result counts only when its index is gone, so that nothing is lost that could still be loaded. A new one
    whose files are all in place does not count: it lacks its record only.
    """
    noted = _read(folder / PUBLISHING)
    if not isinstance(noted, dict) or _completed(target) == job:
        return inherited(folder)
    if any(is_unfinished(target / name) for name in noted["index"]):
        return {*inherited(folder), *noted["names"], *noted["index"], *noted["gone"]}
    moved = _moved(noted, folder, target)
    return inherited(folder) | (set() if moved.issuperset(noted["names"]) else moved)


def claimed(target: Path) -> set[str]:
    """Names of files in the target that unfinished jobs were about to move there, or are to take away after others."""
    found: set[str] = set()
    for folder in target.glob(f"{FOLDER}*"):
        noted = _read(folder / PUBLISHING)
        found |= inherited(folder) | set(noted["names"] if isinstance(noted, dict) else ())
    return found


def unrecorded(target: Path) -> set[str]:
    """Names of files in the target that jobs moved there which were killed before they put them on record."""
    found = set()
    for path in target.glob(f"{FOLDER}*/{PUBLISHING}"):
        noted = _read(path)
        if isinstance(noted, dict):
            found |= _moved(noted, path.parent, target)
    return found


def _moved(noted: Mapping[str, Any], folder: Path, target: Path) -> set[str]:
    return {name for name in noted["names"] if not (folder / name).exists() and (target / name).exists()}


def is_unfinished(path: Path) -> bool:
    """True when a file is the index that stands while files are moved."""
    try:
        return path.stat().st_size == len(UNFINISHED) and path.read_bytes() == UNFINISHED
    except OSError:
        return False


def others_unfinished(target: Path, mine: Mapping[str, bytes]) -> bool:
    """Whether an unfinished index stands in the target besides those of this name."""
    return any(path.name not in mine and is_unfinished(path) for path in target.glob("*.json"))


def recorded(target: Path) -> dict[str, list[int]]:
    """Files of the result that was published in a target last: name -> [size, modification time in ns] it had."""
    found = _read(target / MANIFEST)
    files = found.get("files") if isinstance(found, dict) else None
    return files if isinstance(files, dict) else {}


def is_recorded(target: Path, name: str) -> bool:
    """Whether a file is as the result has it that was published in a target last."""
    try:
        status = (target / name).stat()
    except OSError:
        return False
    return recorded(target).get(name) == [status.st_size, status.st_mtime_ns]


def _completed(target: Path) -> Any:
    found = _read(target / MANIFEST)
    return found.get("job") if isinstance(found, dict) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None

"""Whether a file in a target is a result of this package, which the same job may replace, or somebody else's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ms_ckpt_ext.engine.digests import load_manifest
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.storage import remains


def foreign(target: str, names: Iterable[str]) -> list[str]:
    """Those of these files (relative to the target) that are there and on no record of a result.

    On record is what a job into the target, the file's own folder or one between published last and nobody changed;
    what a manifest of digests there lists with this size; and what a job that was interrupted was about to publish.
    """
    there = [name for name in names if os.path.lexists(os.path.join(target, name))]
    return [name for name in there if not any(_on_record(folder, key) for folder, key in _places(target, name))]


def _places(target: str, name: str) -> list[tuple[Path, str]]:
    """(folder, the file's name from there), from the target down to the file's own folder."""
    parts = Path(name).parts
    return [(Path(target, *parts[:depth]), "/".join(parts[depth:])) for depth in range(len(parts))]


def _on_record(folder: Path, name: str) -> bool:
    try:
        status = (folder / name).stat()
    except OSError:  # a link to nowhere
        return False
    if remains.recorded(folder).get(name) == [status.st_size, status.st_mtime_ns]:
        return True
    try:
        manifest = load_manifest(str(folder))
    except CheckpointError:  # of which nothing can be told
        manifest = None
    held = None if manifest is None else manifest.files.get(name)
    return (held is not None and held.size == status.st_size) or name in _unfinished(folder)


def _unfinished(folder: Path) -> set[str]:
    """What jobs were publishing there when they were killed."""
    found: set[str] = set()
    for hidden in folder.glob(".ms_ckpt_ext-*"):
        found |= remains.inherited(hidden)
        try:
            found |= set(json.loads((hidden / remains.PUBLISHING).read_bytes())["names"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or not written to its end
            continue
    return found

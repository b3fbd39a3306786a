"""Whether a file in a target is a result of this package, which the same job may replace, or somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ms_ckpt_ext.engine.manifest import load_manifest
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
    if remains.is_recorded(folder, name):
        return True
    try:
        size = (folder / name).stat().st_size
    except OSError:  # a link to nowhere
        return False
    try:
        manifest = load_manifest(str(folder))
    except CheckpointError:  # of which nothing can be told
        manifest = None
    held = None if manifest is None else manifest.files.get(name)
    return (held is not None and held.size == size) or name in remains.claimed(folder)

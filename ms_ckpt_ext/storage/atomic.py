"""Small files that are replaced whole, names that survive a power cut, and names that fit."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Union

import xxhash

_LONGEST = 120
"""Bytes of a temporary name. File systems take 255, encrypted ones 143; what a result is called may be as long."""
_KEPT = 72
"""Bytes that are kept of a name that is too long for a temporary one: people are to recognise it."""


def derived(path: Path, ending: str) -> Path:
    """A temporary name beside a file: its own with an ending, or where that is long, its beginning and a digest of it.

    >>> derived(Path("out/part0.safetensors"), ".partial").name
    'part0.safetensors.partial'
    >>> len(derived(Path("out/" + "q" * 255), ".partial").name)
    97
    """
    raw = os.fsencode(path.name)
    if len(raw) + len(ending) <= _LONGEST:
        return path.with_name(path.name + ending)
    begins = raw[:_KEPT].decode(errors="ignore")  # which may end within a character
    return path.with_name(f"{begins}-{xxhash.xxh3_64_hexdigest(raw)}{ending}")


def write_atomically(path: Union[str, Path], contents: bytes, sync: bool = True) -> None:
    """Replace a file by `contents`: durable unless `sync` is False, and never seen half written.

    For one writer of a file at a time. Raises OSError; then the file is as it was, and nothing is left of the new one.
    """
    partial = derived(Path(path), ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(contents)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def sync_path(path: Path) -> None:
    """Make durable what is in a file, or names that were given or taken away in a folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

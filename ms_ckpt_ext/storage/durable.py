"""Small files that are replaced whole, and names that survive a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Union


def write_atomically(path: Union[str, Path], contents: bytes, sync: bool = True) -> None:
    """Replace a file by `contents`: durable unless `sync` is False, and never seen half written.

    Raises OSError; then the file is as it was, and nothing is left of the new one.
    """
    partial = f"{path}.partial"
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


def sync_folder(folder: Path) -> None:
    """Make names that were given or taken away in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

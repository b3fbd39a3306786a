"""Builds the library of `injector.c`, and says by environment variables what it does in one process."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Optional

CODE = Path(__file__).with_name("injector.c")
CALLS = ("open", "stat", "list", "read", "write", "copy", "reserve", "sync", "rename", "unlink", "mkdir")
CHANGING = ("write", "copy", "reserve", "sync", "rename", "unlink", "mkdir")


class Injection(NamedTuple):
    """What happens to the calls of a process.

    Attributes:
        on: classes of calls with their side: "read@source".
        doing: "errno:5", "short", "delay:20", "hold"; "" for nothing but counting.
        at: the first call that it happens to, from 1 on, of all of `on`.
        times: to how many; 0 for all that follow.
        clock: from which look at the wall clock on it is wrong, and by how many seconds.
        nfs: every file system copies by itself.
    """

    on: tuple[str, ...] = ()
    doing: str = ""
    at: int = 1
    times: int = 1
    clock: Optional[tuple[int, int]] = None
    nfs: bool = False


def build(folder: Path) -> Optional[Path]:
    """Compile the library into a folder; None where there is no C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    library = folder / "injector.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(CODE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def environment(
    library: Path, source: Path, target: Path, injection: Injection, mark: Path, counts: Optional[Path] = None
) -> Mapping[str, str]:
    """What a process must be started with; while a call is held there is the file `mark`."""
    doing = f"hold:{mark}" if injection.doing == "hold" else injection.doing
    told = {
        "LD_PRELOAD": str(library),
        "CHAOS_SOURCE": str(source),
        "CHAOS_TARGET": str(target),
        "CHAOS_ON": ",".join(injection.on),
        "CHAOS_DO": doing,
        "CHAOS_AT": str(injection.at),
        "CHAOS_TIMES": str(injection.times),
        "CHAOS_CLOCK": "" if injection.clock is None else "{}:{}".format(*injection.clock),
        "CHAOS_NFS": "1" if injection.nfs else "",
        "CHAOS_COUNTS": "" if counts is None else str(counts),
    }
    return {name: value for name, value in told.items() if value}


def read_counts(path: Path) -> dict[str, int]:
    """ "CALL@SIDE" -> how often it was made; "clock" as well."""
    return {name: int(count) for name, count in (line.split() for line in path.read_text().splitlines())}

"""What ranks of any framework need to be measured alike: a barrier that blocks, and the peak of resident memory."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Memory:
    """`peak`: bytes of resident memory above the start, at most, while the work was done."""

    peak: int = 0


@contextmanager
def above_start() -> Iterator[Memory]:
    """Reset the high-water mark of the resident set, and read it afterwards (Linux)."""
    memory = Memory()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    yield memory
    memory.peak = (_kib("VmHWM") - before) << 10


def _kib(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def barrier(folder: str, name: str, rank: int, ranks: int) -> None:
    """Return when all ranks have come; a launched collective would return at once on some backends."""
    Path(folder, f"{name}.{rank}").touch()
    while len(list(Path(folder).glob(f"{name}.*"))) < ranks:
        time.sleep(0.001)

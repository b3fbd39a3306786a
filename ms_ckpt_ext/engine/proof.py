"""Reads what a load is going to read, and keeps nothing: altered encrypted files are found before a Parameter changes.

Authenticated encryption proves a chunk when it is decrypted, and a load goes straight into the Parameters, where half
of a checkpoint is worse than none. So what this rank wants of encrypted files is decrypted twice, the first time for
its tags only. Plain files have no tags: their checksums are verified with their headers, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

from ms_ckpt_ext.core.exchange import ExchangePlan
from ms_ckpt_ext.core.reads import Limits, Task
from ms_ckpt_ext.core.schedule import schedule
from ms_ckpt_ext.engine import pump
from ms_ckpt_ext.engine.catalog import Catalog
from ms_ckpt_ext.storage import memory

PIECE = 4 << 20
"""Bytes of one read."""


class _Nowhere:
    """A sink that forgets."""

    path = "nowhere"
    fd: Optional[int] = None

    def write(self, offset: int, buffer: memoryview) -> None:
        """Take nothing."""

    def finish(self) -> None:
        """Nothing to finish."""

    def close(self) -> None:
        """Nothing to close."""


def prove_tasks(tasks: Iterable[Task], count: int, catalog: Catalog, workers: int, limits: Limits) -> None:
    """Make the reads of a direct load, whose landings name `count` sinks.

    Raises:
        DecryptionError: what is wanted was altered; names file and offset.
        FormatError, StorageError: it cannot be read.
    """
    if catalog.authenticated:
        with catalog.readers() as readers:
            units = schedule(tasks, catalog.stored, limits)
            pump.run(units, readers, [_Nowhere()] * count, workers, lambda *_: None)


def prove_chunks(plan: ExchangePlan, rank: int, catalog: Catalog, threads: int) -> None:
    """Make this rank's reads of a cooperative load. Raises as `prove_tasks`."""
    if not catalog.authenticated:
        return
    mine = [chunk for chunk in plan.chunks if chunk.reader == rank]
    with catalog.readers() as readers, ThreadPoolExecutor(max_workers=threads) as pool:

        def read(file: int, offset: int, length: int) -> None:
            buffer = memory.scratch(min(PIECE, length))
            for done in range(0, length, PIECE):
                readers.read_into(file, offset + done, buffer[: min(PIECE, length - done)])

        extents = [(chunk.file, extent.offset, extent.length) for chunk in mine for extent in chunk.extents]
        for finished in [pool.submit(read, *extent) for extent in extents]:
            finished.result()

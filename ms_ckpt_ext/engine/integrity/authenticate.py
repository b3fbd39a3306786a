"""Reads what a load is going to read, and keeps nothing: altered encrypted files are found before a Parameter changes.

Authenticated encryption proves a chunk only when it is decrypted, and a load goes straight into the Parameters, which
must not be left half changed. So what this rank wants of encrypted files is decrypted twice, the first time for
its tags only. Plain files have no tags: their checksums are verified with their headers, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.planning.io_units import Extent, Limits, Task
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.integrity.contents import Pass
from ms_ckpt_ext.engine.source.catalog import Catalog


class _Nowhere:
    """A sink that keeps nothing."""

    path = "nowhere"
    fd: Optional[int] = None
    unit = 0

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
            worker.run(units, readers, [_Nowhere()] * count, workers, lambda *_: None, limits)


def prove_chunks(plan: ExchangePlan, rank: int, catalog: Catalog, threads: int) -> None:
    """Make this rank's reads of a cooperative load. Raises as `prove_tasks`."""
    if not catalog.authenticated:
        return
    extents: dict[int, list[Extent]] = {}
    for chunk in plan.chunks:
        if chunk.reader == rank:
            extents.setdefault(chunk.file, []).extend(chunk.extents)
    with catalog.readers() as readers:
        Pass(readers, (), more=extents).run(threads)

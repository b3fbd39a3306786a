"""What stretches of stored tensors hold, told by digests: read by this process, or dealt out to the ranks of a job.

Whoever compares slices asks for stretches and gets the digest of each, so how the question is answered is left to the
caller: alone, or by ranks of which each reads a part of what it sees (`engine.unlisted.dealt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple

from ms_ckpt_ext.core.planning.io_units import ranges
from ms_ckpt_ext.engine.integrity.contents import Pass, Portion, Seen
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.storage.reader import ReadCount


class Probe(NamedTuple):
    """Bytes `start .. start + length` of the contents of the tensor that file number `file` stores as `name`.

    `start` is a multiple of 16, the widest element.
    """

    file: int
    name: str
    start: int
    length: int


Look = Callable[[Sequence[Probe]], list[Seen]]
"""Answers probes, in order. Raises FormatError or StorageError when a file cannot be read."""


class Alone:
    """A `Look` of this process. `count` says what was read; memory is a buffer of 1 MiB for each of its `workers`."""

    def __init__(self, catalog: Catalog, workers: int = 8) -> None:
        self._catalog, self._workers = catalog, workers
        self.count = ReadCount()

    def __call__(self, probes: Sequence[Probe]) -> list[Seen]:
        with self._catalog.readers() as readers:
            seen = Pass(readers, [self._portion(probe) for probe in probes]).run(self._workers)
            readers.verify()
        self.count.add(readers.count)
        return seen

    def _portion(self, probe: Probe) -> Portion:
        entry = self._catalog.files[probe.file].tensors[probe.name]
        return Portion(probe.file, tuple(ranges(entry.extents, probe.start, probe.length)), entry.dtype)

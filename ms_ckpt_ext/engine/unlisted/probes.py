"""What stretches of stored tensors hold, told by digests: read by this process, or dealt out to the ranks of a job.

Whoever compares slices asks for stretches and gets the digest of each, so how the question is answered is left to the
caller: alone, or by ranks of which each reads a part of what it sees (`engine.unlisted.dealt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.planning.io_units import ranges
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.storage import buffers
from ms_ckpt_ext.storage.pool import ReadCount, ReaderPool
from ms_ckpt_ext.storage.threads import in_order

_BUFFER = 1 << 20  # stays in a core's cache between read and digest


class Probe(NamedTuple):
    """Bytes `start .. start + length` of the contents of the tensor that file number `file` stores as `name`.

    `start` is a multiple of 16, the widest element.
    """

    file: int
    name: str
    start: int
    length: int


class Seen(NamedTuple):
    """xxh3-128 of a stretch as hex, and whether all of its elements have the same bits."""

    digest: str
    constant: bool


Look = Callable[[Sequence[Probe]], list[Seen]]
"""Answers probes, in order. Raises FormatError or StorageError when a file cannot be read."""


class Alone:
    """A `Look` of this process. `count` says what was read; memory is two buffers of 1 MiB for each of its `workers`,
    of which one reads all that is wanted of a file."""

    def __init__(self, catalog: Catalog, workers: int = 8) -> None:
        self._catalog, self._workers = catalog, workers
        self.count = ReadCount()

    def __call__(self, probes: Sequence[Probe]) -> list[Seen]:
        by_file: dict[int, list[int]] = {}
        for number, probe in enumerate(probes):
            by_file.setdefault(probe.file, []).append(number)
        seen: dict[int, Seen] = {}
        with self._catalog.readers() as readers:

            def of_file(numbers: list[int]) -> None:
                seen.update((number, _look(self._catalog, readers, probes[number])) for number in numbers)

            in_order(of_file, by_file.values(), self._workers)
            readers.verify()
        self.count.add(readers.count)
        return [seen[number] for number in range(len(probes))]


def _look(catalog: Catalog, readers: ReaderPool, probe: Probe) -> Seen:
    entry = catalog.files[probe.file].tensors[probe.name]
    state, constant = xxhash.xxh3_128(), _Constant(entry.dtype)
    buffer = buffers.scratch(min(_BUFFER, probe.length))
    for start in range(probe.start, probe.start + probe.length, _BUFFER):
        part = buffer[: min(_BUFFER, probe.start + probe.length - start)]
        at = 0
        for offset, length in ranges(entry.extents, start, len(part)):
            readers.read_into(probe.file, offset, part[at : at + length])
            at += length
        state.update(part)
        constant.add(part)
    return Seen(state.hexdigest(), constant.holds)


class _Constant:
    """Whether all elements are the same, told piece by piece."""

    def __init__(self, dtype: DType) -> None:
        self._width = max(1, dtype.bits // 8)
        self._first: Optional[bytes] = None
        self.holds = True

    def add(self, part: memoryview) -> None:
        if self.holds:
            self._first = bytes(part[: self._width]) if self._first is None else self._first
            self.holds = bytes(part) == self._first * (len(part) // self._width)

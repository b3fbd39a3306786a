"""Are two checkpoints the same model? Region by region, without assembling either.

1. Every parameter that both have in the same dtype and shape is cut into blocks of a few MiB, whole rows of it; many
   small ones make a batch.
2. A thread takes a batch, has it assembled from the files of either side into its own two buffers, and compares the
   two byte for byte. What one file holds whole is read as it lies, many blocks at once (`engine.integrity.contents`);
   for the rest `core.planning.schedule` finds the reads, as for every job.
3. Only where bytes differ are they looked at as numbers.
4. What pipeline stages hold in different cuts (tied embeddings) is there more than once: every such copy is compared,
   with all of the other side.

So memory is `workers x about 4 batches`, whatever the model's size, and each side is read once, except for such copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.planning.io_units import Extent, Limits, cut
from ms_ckpt_ext.core.planning.pieces import SourceTensor, locate
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.integrity.contents import RUN, Run, Section, runs
from ms_ckpt_ext.engine.integrity.numerics import SAME, Differences, Number, differences, equal_bytes
from ms_ckpt_ext.engine.integrity.pairing import Mismatch, Pair, Pairing
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.storage.threads import spread
from ms_ckpt_ext.transport.base import Bytes

_BLOCK_BYTES = 2 << 20
_SPOTS = 3


class DifferingElement(NamedTuple):
    """An element that differs: its index, and both values as text."""

    at: tuple[int, ...]
    a: str
    b: str


@dataclass(frozen=True)
class Difference:
    """A parameter whose values differ.

    Attributes:
        count: elements whose bits differ, of `total`; bytes, for types narrower than a byte.
        first: the first of them in row-major order.
        of: which copy of the parameter it is, or whose, where there are several; else "".
        max_abs, max_ulp, nans: see `engine.integrity.numerics.Differences`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    total: int
    first: tuple[DifferingElement, ...]
    max_abs: Optional[Number]
    max_ulp: Optional[int]
    nans: int
    of: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints compared.

    Attributes:
        parameters: how many were compared by value.
        nbytes: how many bytes of them, of one side.
        differences: parameters whose values differ, by name.
        mismatches: parameters that could not be compared.
        only_a, only_b: parameters that one side lacks.
    """

    parameters: int
    nbytes: int
    differences: tuple[Difference, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when both hold the same parameters with the same bytes."""
        return not (self.differences or self.mismatches or self.only_a or self.only_b)


def compare(
    pairing: Pairing,
    a: Catalog,
    b: Catalog,
    workers: int,
    block_bytes: int = _BLOCK_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Compare all pairs by value.

    Args:
        a, b: the checkpoints that the pairs are of.
        workers: threads; each holds two blocks and what it takes to assemble them.
        progress: told the bytes compared since its last call, from any thread.

    Raises:
        FormatError, StorageError: a file cannot be read.
    """
    found = tallies(pairing.pairs, a, b, workers, block_bytes, progress)
    return Comparison(
        len({pair.name for pair in pairing.pairs}),
        pairing.nbytes,
        tuple(_difference(pairing.pairs[number], tally) for number, tally in sorted(found.items())),
        pairing.mismatches,
        pairing.only_a,
        pairing.only_b,
    )


def tallies(
    pairs: Sequence[Pair],
    a: Catalog,
    b: Catalog,
    workers: int,
    block_bytes: int = _BLOCK_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> Mapping[int, Differences]:
    """Number of a pair that differs -> by how much, its spots numbered in the whole parameter. See `compare`."""
    found = _Found()
    with a.readers() as readers_a, b.readers() as readers_b:

        def worker(_: Callable[[], bool]) -> Callable[[_Batch], None]:
            return _Worker(_Side(a, readers_a, block_bytes), _Side(b, readers_b, block_bytes), found, progress).compare

        spread(_batches(pairs, block_bytes), workers, worker)
        readers_a.verify()
        readers_b.verify()
    return found.tallies


def _difference(pair: Pair, tally: Differences) -> Difference:
    meta = pair.a.meta
    packed = meta.dtype.bits < 8
    total = pair.nbytes if packed else sum(region.size for region in pair.regions)
    places = tuple(DifferingElement((s.at,) if packed else _index(s.at, meta.shape), s.a, s.b) for s in tally.first)
    return Difference(
        pair.name,
        meta.dtype.name,
        meta.shape,
        tally.count,
        total,
        places,
        tally.max_abs,
        tally.max_ulp,
        tally.nans,
        pair.of,
    )


class _Block(NamedTuple):
    """A box of a parameter, and where its bytes are in the batch."""

    number: int
    pair: Pair
    region: Region
    start: int
    nbytes: int


_Batch = list[_Block]
"""Blocks that are compared together."""


def _batches(pairs: Sequence[Pair], most: int) -> Iterator[_Batch]:
    batch: _Batch = []
    at = 0
    for number, pair in enumerate(pairs):
        dtype = pair.a.meta.dtype
        for box in pair.regions:
            for region in cut(box, 0, dtype, most):
                nbytes = dtype.nbytes(region.size)
                if batch and at + nbytes > most:
                    yield batch
                    batch, at = [], 0
                batch.append(_Block(number, pair, region, at, nbytes))
                at += nbytes
    if batch:
        yield batch


@dataclass
class _Found:
    """What differs, from all threads: number of the pair -> tally, its spots numbered in the whole parameter."""

    tallies: dict[int, Differences] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, block: _Block, tally: Differences) -> None:
        shifted = tuple(spot._replace(at=_in_whole(spot.at, block)) for spot in tally.first)
        with self.lock:
            before = self.tallies.get(block.number, SAME)
            self.tallies[block.number] = before.plus(
                Differences(tally.count, shifted, tally.max_abs, tally.max_ulp, tally.nans), _SPOTS
            )


def _in_whole(at: int, block: _Block) -> int:
    """The number of an element of a block, in the whole parameter; of a byte, for packed types."""
    meta, region = block.pair.a.meta, block.region
    if meta.dtype.bits < 8:
        return meta.dtype.nbytes(_number(region.start, meta.shape)) + at
    inside = _index(at, region.shape)
    return _number([low + index for low, index in zip(region.start, inside)], meta.shape)


def _number(index: Sequence[int], shape: tuple[int, ...]) -> int:
    number = 0
    for at, extent in zip(index, shape):
        number = number * extent + at
    return number


def _index(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(at) for at in np.unravel_index(number, shape)) if shape else ()


class _Side:
    """A thread's access to one side."""

    def __init__(self, catalog: Catalog, readers: ReaderPool, block_bytes: int) -> None:
        self._readers, self._stored = readers, catalog.stored
        self._assembler = worker.Assembler(readers, catalog.stored, Limits(tile=block_bytes))
        self._scratch = memoryview(bytearray())

    def fill(self, blocks: Sequence[tuple[SourceTensor, _Block]], into: Bytes) -> None:
        """Read the blocks of a batch."""
        sections: dict[int, list[Section]] = {}
        for number, (tensor, block) in enumerate(blocks):
            file, extents = self._as_it_lies(tensor, block.region)
            if not extents:
                self._assembler.read(tensor, block.region, into[block.start : block.start + block.nbytes])
            at = block.start
            for offset, length in extents:
                sections.setdefault(file, []).append(Section(offset, offset + length, number, at))
                at += length
        flat = memoryview(into)
        for file, held in sections.items():
            for run in runs(sorted(held)):
                self._read(file, run, flat)

    def _as_it_lies(self, tensor: SourceTensor, region: Region) -> tuple[int, tuple[Extent, ...]]:
        """Where a box lies in a file, if that holds all of it and nothing else as a tensor; () if none does."""
        found = locate(tensor, region) if tensor.recipe is None else []
        if len(found) == 1 and found[0].piece.in_source.shape == found[0].piece.source_shape:
            return found[0].files[0], self._stored(found[0].files[0], found[0].stored_name)
        return 0, ()

    def _read(self, file: int, run: Run, into: memoryview) -> None:
        start, stop, sections = run
        if len(sections) == 1:
            at = sections[0].position + start - sections[0].start
            self._readers.read_into(file, start, into[at : at + stop - start])
            return
        if len(self._scratch) < RUN:
            self._scratch = linux.scratch(RUN)
        read = self._scratch[: stop - start]
        self._readers.read_into(file, start, read)
        for section in sections:
            low, high = max(start, section.start), min(stop, section.stop)
            at = section.position + low - section.start
            into[at : at + high - low] = read[low - start : high - start]


class _Worker:
    """One thread: its buffers, and its access to both sides."""

    def __init__(self, a: _Side, b: _Side, found: _Found, progress: Callable[[int], None]) -> None:
        self._sides = (a, b)
        self._buffers = [np.empty(0, np.uint8)] * 2
        self._found, self._progress = found, progress

    def compare(self, batch: _Batch) -> None:
        nbytes = batch[-1].start + batch[-1].nbytes
        if self._buffers[0].size < nbytes:
            self._buffers = [np.empty(nbytes, np.uint8) for _ in range(2)]
        a, b = (buffer[:nbytes] for buffer in self._buffers)
        self._sides[0].fill([(block.pair.a, block) for block in batch], a)
        self._sides[1].fill([(block.pair.b, block) for block in batch], b)
        for block in () if equal_bytes(a, b) else batch:
            here = slice(block.start, block.start + block.nbytes)
            tally = differences(a[here], b[here], block.pair.a.meta.dtype, _SPOTS)
            if tally.count:
                self._found.add(block, tally)
        self._progress(nbytes)

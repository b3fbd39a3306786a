"""Are two checkpoints the same model? Region by region, without putting either together.

1. Every parameter that both have in the same dtype and shape is cut into blocks of a few MiB, whole rows of it.
2. A thread takes a block, has it assembled from the files of either side into its own two buffers
   (`core.planning.pieces` finds the pieces, `core.planning.io_units` the reads, as for every job), and compares the
   two byte for byte.
3. Only where bytes differ are they looked at as numbers.
4. What pipeline stages hold in different cuts (tied embeddings) is there more than once: every such copy is compared,
   with all of the other side.

So memory is `workers x about 4 blocks`, whatever the model's size, and each side is read once, but for such copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.geometry.region import Region
from ms_ckpt_ext.core.planning.io_units import Limits, cut
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.integrity.numerics import SAME, Differences, Number, differences
from ms_ckpt_ext.engine.integrity.pairing import Mismatch, Pair, Pairing
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.storage.threads import spread

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

        def worker(_: Callable[[], bool]) -> Callable[[_Block], None]:
            return _Worker((a, readers_a), (b, readers_b), block_bytes, found, progress).compare

        spread(_blocks(pairs, block_bytes), workers, worker)
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
    """A box of a parameter."""

    number: int
    pair: Pair
    region: Region


def _blocks(pairs: Sequence[Pair], most: int) -> Iterator[_Block]:
    for number, pair in enumerate(pairs):
        for box in pair.regions:
            for region in cut(box, 0, pair.a.meta.dtype, most):
                yield _Block(number, pair, region)


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
    """The number of an element of a block, in the whole parameter; of packed types those of bytes."""
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


class _Worker:
    """One thread: its buffers, and its way to both sides."""

    def __init__(
        self,
        a: tuple[Catalog, ReaderPool],
        b: tuple[Catalog, ReaderPool],
        block_bytes: int,
        found: _Found,
        progress: Callable[[int], None],
    ) -> None:
        limits = Limits(tile=block_bytes)
        self._sides = [worker.Assembler(readers, catalog.stored, limits) for catalog, readers in (a, b)]
        self._buffers = [np.empty(0, np.uint8)] * 2
        self._found, self._progress = found, progress

    def compare(self, block: _Block) -> None:
        dtype = block.pair.a.meta.dtype
        nbytes = dtype.nbytes(block.region.size)
        if self._buffers[0].size < nbytes:
            self._buffers = [np.empty(nbytes, np.uint8) for _ in range(2)]
        a, b = (buffer[:nbytes] for buffer in self._buffers)
        self._sides[0].read(block.pair.a, block.region, a)
        self._sides[1].read(block.pair.b, block.region, b)
        tally = differences(a, b, dtype, _SPOTS)
        if tally.count:
            self._found.add(block, tally)
        self._progress(nbytes)

"""Are two checkpoints the same model? Region by region, without putting either together.

1. Every parameter that both have in the same dtype and shape is cut into blocks of a few MiB, whole rows of it.
2. A thread takes a block, has it assembled from the files of either side into its own two buffers (`core.plan` finds
   the pieces, `core.reads` the reads, as for every job), and compares the two byte for byte.
3. Only where bytes differ are they looked at as numbers.

So memory is `workers x about 4 blocks`, whatever the model's size, and each side is read once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.plan import SourceTensor, TensorMeta, locate
from ms_ckpt_ext.core.reads import Limits, cut
from ms_ckpt_ext.core.region import Region
from ms_ckpt_ext.engine import pump
from ms_ckpt_ext.engine.bits import SAME, Number, Tally, differences
from ms_ckpt_ext.engine.catalog import Catalog
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.storage.threads import spread

BLOCK_BYTES = 2 << 20
_SPOTS = 3


class Place(NamedTuple):
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
        max_abs, max_ulp, nans: see `engine.bits.Tally`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    total: int
    first: tuple[Place, ...]
    max_abs: Optional[Number]
    max_ulp: Optional[int]
    nans: int


class Mismatch(NamedTuple):
    """A parameter whose dtype or shape differs: both as words ("F32[2, 3]")."""

    name: str
    a: str
    b: str


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


class Pair(NamedTuple):
    """A parameter on both sides."""

    name: str
    a: SourceTensor
    b: SourceTensor


@dataclass(frozen=True)
class Pairing:
    """What is to be compared, found without reading a value."""

    pairs: tuple[Pair, ...]
    mismatches: tuple[Mismatch, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to compare, of one side."""
        return sum(_nbytes(pair.a.meta) for pair in self.pairs)


def pair_up(a: Mapping[str, SourceTensor], b: Mapping[str, SourceTensor]) -> Pairing:
    """Match the parameters of two checkpoints by name.

    Raises CoverageError when either side lacks a region of a parameter that it should hold.
    """
    pairs, mismatches = [], []
    for name in sorted(a.keys() & b.keys()):
        one, two = a[name], b[name]
        if (one.meta.dtype, one.meta.shape) != (two.meta.dtype, two.meta.shape):
            mismatches.append(Mismatch(name, _kind(one.meta), _kind(two.meta)))
            continue
        pairs.append(Pair(name, one, two))
        if all(one.meta.shape):
            locate(one, Region.whole(one.meta.shape))
            locate(two, Region.whole(two.meta.shape))
    return Pairing(
        tuple(pairs), tuple(mismatches), tuple(sorted(a.keys() - b.keys())), tuple(sorted(b.keys() - a.keys()))
    )


def _kind(meta: TensorMeta) -> str:
    return f"{meta.dtype.name}{list(meta.shape)}"


def _nbytes(meta: TensorMeta) -> int:
    return meta.dtype.nbytes(math.prod(meta.shape))


def compare(
    pairing: Pairing,
    a: Catalog,
    b: Catalog,
    workers: int,
    block_bytes: int = BLOCK_BYTES,
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
    found = _Found()
    with a.readers() as readers_a, b.readers() as readers_b:

        def worker(_: Callable[[], bool]) -> Callable[[_Block], None]:
            return _Worker((a, readers_a), (b, readers_b), block_bytes, found, progress).compare

        spread(_blocks(pairing.pairs, block_bytes), workers, worker)
        readers_a.verify()
        readers_b.verify()
    return Comparison(
        len(pairing.pairs),
        pairing.nbytes,
        tuple(found.differences(pairing.pairs)),
        pairing.mismatches,
        pairing.only_a,
        pairing.only_b,
    )


class _Block(NamedTuple):
    """A box of a parameter, contiguous in the whole of it."""

    number: int
    pair: Pair
    region: Region


def _blocks(pairs: Sequence[Pair], most: int) -> Iterator[_Block]:
    for number, pair in enumerate(pairs):
        meta = pair.a.meta
        if all(meta.shape):
            for region in cut(Region.whole(meta.shape), 0, meta.dtype, most):
                yield _Block(number, pair, region)


@dataclass
class _Found:
    """What differs, from all threads: number of the pair -> tally, its spots numbered in the whole parameter."""

    tallies: dict[int, Tally] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, block: _Block, tally: Tally) -> None:
        meta = block.pair.a.meta
        first = _first_element(block.region, meta.shape)
        shifted = tuple(spot._replace(at=spot.at + _scaled(first, meta)) for spot in tally.first)
        with self.lock:
            before = self.tallies.get(block.number, SAME)
            self.tallies[block.number] = before.plus(
                Tally(tally.count, shifted, tally.max_abs, tally.max_ulp, tally.nans), _SPOTS
            )

    def differences(self, pairs: Sequence[Pair]) -> Iterator[Difference]:
        for number, tally in sorted(self.tallies.items()):
            name, meta = pairs[number].name, pairs[number].a.meta
            packed = meta.dtype.bits < 8
            total = _nbytes(meta) if packed else math.prod(meta.shape)
            places = [Place((s.at,) if packed else _index(s.at, meta.shape), s.a, s.b) for s in tally.first]
            yield Difference(
                name,
                meta.dtype.name,
                meta.shape,
                tally.count,
                total,
                tuple(places),
                tally.max_abs,
                tally.max_ulp,
                tally.nans,
            )


def _first_element(region: Region, shape: tuple[int, ...]) -> int:
    number = 0
    for low, extent in zip(region.start, shape):
        number = number * extent + low
    return number


def _scaled(elements: int, meta: TensorMeta) -> int:
    """A position in elements, in the units in which spots of this type are numbered."""
    return meta.dtype.nbytes(elements) if meta.dtype.bits < 8 else elements


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
        self._sides = [pump.Assembler(readers, catalog.stored, limits) for catalog, readers in (a, b)]
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

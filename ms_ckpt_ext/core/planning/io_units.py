"""The vocabulary of file I/O as values: what is wanted, and the units of work that bring it.

Files and sinks are numbers, offsets are bytes. Every read carries its copies, so the reads of a batch may finish in any
order; the batch is complete when all have. `core.planning.schedule` turns what is wanted into units.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Callable, NamedTuple, Union

from ms_ckpt_ext.core.geometry.array import DType, Region
from ms_ckpt_ext.core.geometry.strided import StridedCopy
from ms_ckpt_ext.core.planning.pieces import SourceTensor

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.recipes import Operation


class Extent(NamedTuple):
    """A stretch of a file: byte offset from its start, and length in bytes.

    For an encrypted file both are those of the decrypted bytes; its reader translates.
    """

    offset: int
    length: int


class Landing(NamedTuple):
    """Where a target array's bytes go: a sink's number, and the extents that they fill one after another."""

    sink: int
    extents: tuple[Extent, ...]


class Target(NamedTuple):
    """A box of a parameter that is wanted, row-major, at every one of `landings`."""

    region: Region
    landings: tuple[Landing, ...]

    def places(self, offset: int, nbytes: int) -> tuple[Place, ...]:
        """Where bytes `offset .. offset + nbytes` of the box go, as a stretch of their own."""
        places = []
        for landing in self.landings:
            skip = 0
            for extent in ranges(landing.extents, offset, nbytes):
                places.append(Place(landing.sink, extent.offset, skip, extent.length))
                skip += extent.length
        return tuple(places)


class Task(NamedTuple):
    """A source parameter and the boxes that are wanted of it."""

    tensor: SourceTensor
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return sum(self.tensor.meta.dtype.nbytes(target.region.size) for target in self.targets)

    def shares(self, other: Task) -> bool:
        """Whether both parameters are made of one stored tensor, so that a read may serve both: what was fused."""
        if self.tensor.recipe is None or other.tensor.recipe is None:
            return False
        one, two = next(self.tensor.stored(), None), next(other.tensor.stored(), None)
        if one is None or two is None:
            return False
        return one.placements is two.placements and one.stored_name == two.stored_name


class Limits(NamedTuple):
    """Sizes in bytes that shape the I/O.

    Attributes:
        tile: the most a batch assembles before it writes; bounds memory per worker at about twice this.
        gap: gaps up to this are read over.
        direct: runs from this length on are copied without a buffer.
        chunk: the longest single direct copy, so that workers share a long one: a block of MindSpore's encryption.
        share: what one worker takes of an array at once.
        run: runs of this length on average are put in place by the read itself; shorter ones are cheaper to copy
            afterwards.
    """

    tile: int = 8 << 20
    gap: int = 4096
    direct: int = 256 << 10
    chunk: int = 64 << 20
    share: int = 128 << 20
    run: int = 4 << 10


class Direct(NamedTuple):
    """Copy `length` bytes from a file to a sink, no buffer needed; `last` as in `Batch`."""

    file: int
    source: int
    sink: int
    target: int
    length: int
    last: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that land."""
        return self.length


class ReadCopy(NamedTuple):
    """Part of a read that lands in a stretch: `copy.source` counts from the read, `copy.target` from the stretch."""

    stretch: int
    copy: StridedCopy


class Read(NamedTuple):
    """Fill one buffer with `extents` of a file, one after another, then make the copies."""

    file: int
    extents: tuple[Extent, ...]
    copies: tuple[ReadCopy, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return sum(extent.length for extent in self.extents)


class Place(NamedTuple):
    """`length` bytes of a stretch, from `skip` on, go to `offset` of a sink."""

    sink: int
    offset: int
    skip: int
    length: int


class Stretch(NamedTuple):
    """Contiguous bytes that a batch assembles, and every place where they go; none for what is only computed with."""

    nbytes: int
    places: tuple[Place, ...]


class Taken(NamedTuple):
    """A stretch that holds a box of an operand."""

    stretch: int
    region: Region


class Compute(NamedTuple):
    """A box of an operation's result: computed from other stretches, then copied into `stretch`."""

    operation: Operation
    box: Region
    operands: tuple[Taken, ...]
    stretch: int
    copy: StridedCopy


class Batch(NamedTuple):
    """Reads that together fill stretches, after which what is computed fills the rest.

    Attributes:
        computes: what is computed, in this order.
        last: a target array ends with this unit, so the next one may well go to another worker. Until then, a worker
            that takes units one after another fills an array from front to back.
    """

    reads: tuple[Read, ...]
    stretches: tuple[Stretch, ...]
    last: bool
    computes: tuple[Compute, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are assembled."""
        return sum(stretch.nbytes for stretch in self.stretches)


Unit = Union[Direct, Batch]
Stored = Callable[[int, str], tuple[Extent, ...]]
"""(file number, stored name) -> where the tensor's bytes lie in that file."""


def ranges(extents: tuple[Extent, ...], offset: int, length: int) -> Iterator[Extent]:
    """Where bytes `offset .. offset + length` of an array lie, when the array fills `extents` one after another."""
    for extent in extents:
        if length <= 0:
            return
        if offset < extent.length:
            take = min(length, extent.length - offset)
            yield Extent(extent.offset + offset, take)
            offset, length = 0, length - take
        else:
            offset -= extent.length


def cut(box: Region, axis: int, dtype: DType, tile: int) -> Iterator[Region]:
    """Cut a box of an array along `axis` and those behind it, into boxes of at most `tile` bytes where it can be."""
    shape = box.shape
    if axis == len(shape) or dtype.nbytes(box.size) <= tile:
        yield box
        return
    row = dtype.nbytes(prod(shape[axis + 1 :]))
    step = max(1, tile // row)
    if axis == len(shape) - 1 and dtype.bits % 8:
        step = max(8, step // 8 * 8)  # a packed type is cut between bytes
    for low in range(box.start[axis], box.stop[axis], step):
        high = min(low + step, box.stop[axis])
        part = Region((*box.start[:axis], low, *box.start[axis + 1 :]), (*box.stop[:axis], high, *box.stop[axis + 1 :]))
        yield from cut(part, axis + 1, dtype, tile)


def paired(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[tuple[Extent, Extent]]:
    """Cut two runs of extents of the same total length at each other's seams."""
    a, b = next(left, None), next(right, None)
    while a and b:
        length = min(a.length, b.length)
        yield Extent(a.offset, length), Extent(b.offset, length)
        a = Extent(a.offset + length, a.length - length) if a.length > length else next(left, None)
        b = Extent(b.offset + length, b.length - length) if b.length > length else next(right, None)


def tile_blocks(regions: list[Region], dtype: DType, tile: int) -> Iterator[Region]:
    """Cut the hull of `regions` into boxes of at most `tile` bytes, each contiguous in any of the regions it meets."""
    if not regions:
        return
    start = tuple(map(min, zip(*(region.start for region in regions))))
    stop = tuple(map(max, zip(*(region.stop for region in regions))))
    yield from cut(Region(start, stop), 0, dtype, tile)

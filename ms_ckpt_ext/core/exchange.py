"""Who reads what, and who sends what to whom: the plan of a cooperative load.

1. *Need.* Every distinct target box is located in the source; what lands where is grouped by source slice.
2. *Parts.* The needed rows of a slice are cut into parts: contiguous in their file, small enough that all copies of
   one fit a round. A part knows its deliveries: which ranks want which box of it, and where it lands there.
3. *Chunks.* Neighbouring parts of a file, several MiB together, are one read. Replicas of a slice are alternatives;
   consecutive slices stay with one file until a chunk is full, so reads stay long.
4. *Readers.* A chunk is read by exactly one rank: of those that need (most of) it and see its file, the one with the
   least to read so far. The least flexible chunks choose first.
5. *Rounds.* Every reader contributes parts until its own or a receiver's share of the bucket is full. What every rank
   of the group wants whole goes by all-gather, all else by all-to-all; what the reader wants itself stays with it.

All ranks compute the same plan from the same values; nothing here depends on the rank that asks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.dtype import DType
from ms_ckpt_ext.core.layout import Cell, cell_region
from ms_ckpt_ext.core.plan import SourceTensor, locate
from ms_ckpt_ext.core.reads import Extent, Stored, cut, ranges
from ms_ckpt_ext.core.region import Region, Shape
from ms_ckpt_ext.core.strided import byte_box, strides_of
from ms_ckpt_ext.core.view import View

ALIGNMENT = 16
"""Blocks of a collective start at multiples of this (the widest element); pieces inside go widest element first."""

_CRUMB = 64 << 10
"""Bytes; a box is not cut at a seam of the targets into parts shorter than this."""


class Grid(NamedTuple):
    """How a set of ranks wants one parameter: a number of slices on every axis, and the ranks of every cell."""

    parts: Shape
    ranks: Mapping[Cell, tuple[int, ...]]


class Demand(NamedTuple):
    """A parameter and everything the ranks want of it; a rank stands in at most one grid."""

    name: str
    tensor: SourceTensor
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class ExchangeLimits:
    """Sizes in bytes.

    Attributes:
        bucket: staging memory of a rank for one round, all buffers together.
        chunk: aim for reads of this length.
    """

    bucket: int = 64 << 20
    chunk: int = 4 << 20

    @property
    def quarter(self) -> int:
        """Most a rank reads, and most it sends, in one round; it receives up to twice that."""
        return max(self.bucket // 4, ALIGNMENT)


class Delivery(NamedTuple):
    """A box of a part, wanted at the same place of the target box of each of `ranks`, seen through `view` if any."""

    ranks: tuple[int, ...]
    in_part: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]


class Part(NamedTuple):
    """A box of a source slice, contiguous in its file.

    Attributes:
        demand: number of the parameter in the list of demands.
        chunk: number of the chunk that holds it.
        offset: where it starts in the chunk, in bytes.
        nbytes: its length in bytes.
        shape: its shape in elements.
        deliveries: who wants what of it.
        gathered: every rank wants all of it.
    """

    demand: int
    chunk: int
    offset: int
    nbytes: int
    shape: Shape
    deliveries: tuple[Delivery, ...]
    gathered: bool


class Chunk(NamedTuple):
    """One read: `extents` of a file, one after another, by one rank."""

    file: int
    extents: tuple[Extent, ...]
    nbytes: int
    reader: int


class Round(NamedTuple):
    """Parts (by number) that travel together, and the chunks that must be read before."""

    parts: tuple[int, ...]
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """The whole load, for all ranks."""

    world: int
    demands: tuple[Demand, ...]
    chunks: tuple[Chunk, ...]
    parts: tuple[Part, ...]
    rounds: tuple[Round, ...]

    def bytes_read(self) -> list[int]:
        """Bytes every rank reads."""
        totals = [0] * self.world
        for chunk in self.chunks:
            totals[chunk.reader] += chunk.nbytes
        return totals

    def bytes_received(self) -> list[int]:
        """Payload bytes every rank gets from others."""
        totals = [0] * self.world
        for part in self.parts:
            reader = self.chunks[part.chunk].reader
            for delivery in part.deliveries:
                nbytes = self.dtype(part).nbytes(delivery.in_part.size)
                for rank in delivery.ranks:
                    totals[rank] += nbytes if rank != reader else 0
        return totals

    def dtype(self, part: Part) -> DType:
        """Element type of a part."""
        return self.demands[part.demand].tensor.meta.dtype


def plan_exchange(
    demands: Sequence[Demand],
    world: int,
    stored: Stored,
    limits: ExchangeLimits,
    sees: Optional[Mapping[int, frozenset[int]]] = None,
) -> ExchangePlan:
    """Plan a cooperative load.

    Args:
        demands: what all ranks want.
        world: number of ranks.
        stored: (file, stored name) -> extents.
        limits: bucket and chunk sizes.
        sees: file -> ranks that can open it; None when all see all.

    Raises:
        CoverageError: a region that a rank needs is in no file.
    """
    drafts = [
        draft for number, demand in enumerate(demands) for draft in _drafts(number, demand, world, stored, limits)
    ]
    grouped = list(_chunks(drafts, limits))
    readers = _readers(grouped, world, sees)
    chunks, parts = [], []
    for number, (group, reader) in enumerate(zip(grouped, readers)):
        chunk, members = _assemble(number, group, reader)
        chunks.append(chunk)
        parts.extend(members)
    rounds = tuple(_RoundBuilder(chunks, parts, demands, world).build(limits.quarter))
    return ExchangePlan(world, tuple(demands), tuple(chunks), tuple(parts), rounds)


class _Draft(NamedTuple):
    """A part before its file, chunk and reader are settled."""

    demand: int
    files: tuple[int, ...]
    extents: tuple[tuple[Extent, ...], ...]
    """For each of `files`, where the part lies in it."""
    nbytes: int
    shape: Shape
    deliveries: tuple[Delivery, ...]
    gathered: bool


class _Need(NamedTuple):
    """What lands where, of one source slice."""

    ranks: tuple[int, ...]
    in_source: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]


def _drafts(number: int, demand: Demand, world: int, stored: Stored, limits: ExchangeLimits) -> Iterator[_Draft]:
    tensor = demand.tensor
    dtype, shape = tensor.meta.dtype, tensor.meta.shape
    slices: dict[tuple[str, Shape, Cell, tuple[int, ...]], list[_Need]] = {}
    for grid in demand.grids:
        for cell, ranks in grid.ranks.items():
            target = cell_region(cell, grid.parts, shape)
            for piece, files, name in locate(tensor, target):
                needs = slices.setdefault((name, piece.source_shape, piece.cell, files), [])
                needs.append(_Need(ranks, piece.in_source, piece.in_target, target.shape, piece.view))
    for (name, source_shape, _, files), needs in slices.items():
        receivers = sum(len(need.ranks) for need in needs)
        gathered = receivers == world and all(need.in_source == needs[0].in_source for need in needs)
        copies = 1 if gathered else max(1, receivers)
        most = max(ALIGNMENT, min(limits.chunk, limits.quarter // copies))
        for box in _boxes(needs, source_shape, dtype, most):
            offset, nbytes = _linear(box, source_shape, dtype)
            lying = tuple(tuple(ranges(stored(file, name), offset, nbytes)) for file in files)
            deliveries = tuple(_deliver(needs, box))
            whole = gathered and all(delivery.in_part.shape == box.shape for delivery in deliveries)
            yield _Draft(number, files, lying, nbytes, box.shape, deliveries, whole)


def _boxes(needs: Sequence[_Need], shape: Shape, dtype: DType, most: int) -> Iterator[Region]:
    """What is needed of a slice, cut into boxes that are contiguous there: of at most `most` bytes, and, where that
    makes no crumbs, at the rows where other ranks' needs begin, so that few boxes have several readers to choose from
    who each want a part only."""
    hull = _rows(needs, shape)
    free = next((axis for axis, extent in enumerate(hull.shape) if extent > 1), None)
    if free is None:
        yield hull
        return
    row = dtype.nbytes(math.prod(hull.shape[free + 1 :]))
    edges = [hull.start[free]]
    for edge in sorted({e for need in needs for e in (need.in_source.start[free], need.in_source.stop[free])}):
        if min(edge - edges[-1], hull.stop[free] - edge) * row >= _CRUMB:
            edges.append(edge)
    for low, high in zip(edges, [*edges[1:], hull.stop[free]]):
        part = Region(
            (*hull.start[:free], low, *hull.start[free + 1 :]), (*hull.stop[:free], high, *hull.stop[free + 1 :])
        )
        yield from cut(part, 0, dtype, most)


def _rows(needs: Sequence[_Need], shape: Shape) -> Region:
    """The hull of what is needed, widened to whole rows so that any cut of it is contiguous in the slice."""
    start = list(map(min, zip(*(need.in_source.start for need in needs))))
    stop = list(map(max, zip(*(need.in_source.stop for need in needs))))
    free = next((axis for axis in range(len(shape)) if stop[axis] - start[axis] > 1), len(shape))
    return Region((*start[: free + 1], *(0 for _ in shape[free + 1 :])), (*stop[: free + 1], *shape[free + 1 :]))


def _linear(box: Region, shape: Shape, dtype: DType) -> tuple[int, int]:
    """Byte offset and length of a contiguous box of a slice."""
    byte_shape, byte_region = byte_box(shape, box, dtype)
    return sum(low * s for low, s in zip(byte_region.start, strides_of(byte_shape))), byte_region.size


def _deliver(needs: Iterable[_Need], box: Region) -> Iterator[Delivery]:
    for need in needs:
        common = need.in_source.intersect(box)
        if common is None:
            continue
        moved = common.relative_to(need.in_source.start)
        start = tuple(a + b for a, b in zip(need.in_target.start, moved.start))
        stop = tuple(a + b for a, b in zip(need.in_target.start, moved.stop))
        yield Delivery(need.ranks, common.relative_to(box.start), Region(start, stop), need.target_shape, need.view)


class _Placed(NamedTuple):
    """A draft with the file it is read from."""

    draft: _Draft
    file: int
    extents: tuple[Extent, ...]


def _chunks(drafts: Iterable[_Draft], limits: ExchangeLimits) -> Iterator[list[_Placed]]:
    """Choose a file for every draft, then join neighbours in a file into chunks, in file order."""
    by_file: dict[int, list[_Placed]] = {}
    current: dict[tuple[int, ...], tuple[int, int]] = {}  # replicas -> (which one, bytes left with it)
    for draft in drafts:
        which, left = current.get(draft.files, (-1, 0))
        if left <= 0:
            which, left = (which + 1) % len(draft.files), 4 * limits.chunk
        current[draft.files] = (which, left - draft.nbytes)
        file = draft.files[which]
        by_file.setdefault(file, []).append(_Placed(draft, file, draft.extents[which]))
    for file in sorted(by_file):
        yield from _neighbours(sorted(by_file[file], key=lambda placed: placed.extents[0].offset), limits)


def _neighbours(placed: Sequence[_Placed], limits: ExchangeLimits) -> Iterator[list[_Placed]]:
    chunk: list[_Placed] = []
    held, stop = 0, 0
    for item in placed:
        first, last = item.extents[0], item.extents[-1]
        alike = not chunk or _interest(chunk[0].draft) == _interest(item.draft)
        near = len(item.extents) == 1 and first.offset == stop
        if chunk and not (near and alike and held + item.draft.nbytes <= limits.chunk):
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += item.draft.nbytes
        stop = last.offset + last.length
    if chunk:
        yield chunk


def _interest(draft: _Draft) -> frozenset[int]:
    """The ranks that want any of it: parts of a chunk should have the same, or its reader reads for others."""
    return frozenset(rank for delivery in draft.deliveries for rank in delivery.ranks)


def _readers(groups: Sequence[list[_Placed]], world: int, sees: Optional[Mapping[int, frozenset[int]]]) -> list[int]:
    """One reader per chunk: the least loaded of those that need it; the least flexible chunks choose first."""
    candidates = [_candidates(group, world, sees) for group in groups]
    sizes = [sum(placed.draft.nbytes for placed in group) for group in groups]
    load = [0] * world
    chosen = [0] * len(groups)
    for number in sorted(range(len(groups)), key=lambda n: (len(candidates[n]), -sizes[n], n)):
        reader = min(candidates[number], key=lambda rank: (load[rank], rank))
        load[reader] += sizes[number]
        chosen[number] = reader
    return chosen


def _candidates(group: Sequence[_Placed], world: int, sees: Optional[Mapping[int, frozenset[int]]]) -> tuple[int, ...]:
    wanted: dict[int, int] = {}
    for placed in group:
        for delivery in placed.draft.deliveries:
            for rank in delivery.ranks:
                wanted[rank] = wanted.get(rank, 0) + delivery.in_part.size
    able = frozenset(range(world)) if sees is None else sees[group[0].file]
    most = max((size for rank, size in wanted.items() if rank in able), default=0)
    keen = tuple(sorted(rank for rank, size in wanted.items() if rank in able and 2 * size >= most))
    return keen or tuple(sorted(able))


def _assemble(number: int, group: Sequence[_Placed], reader: int) -> tuple[Chunk, list[Part]]:
    """Lay the parts of a chunk out in its buffer, one after another."""
    parts = []
    at = 0
    for placed in group:
        draft = placed.draft
        parts.append(Part(draft.demand, number, at, draft.nbytes, draft.shape, draft.deliveries, draft.gathered))
        at += draft.nbytes
    extents = group[0].extents if len(group) == 1 else (Extent(group[0].extents[0].offset, at),)
    return Chunk(group[0].file, extents, at, reader), parts


class _RoundBuilder:
    """Fills one round after another; keeps what is left of every rank's share of the current one."""

    def __init__(self, chunks: Sequence[Chunk], parts: Sequence[Part], demands: Sequence[Demand], world: int) -> None:
        self._chunks, self._parts, self._demands, self._world = chunks, parts, demands, world
        self._loaded: set[int] = set()
        self._queues: list[deque[int]] = [deque() for _ in range(world)]
        first: dict[int, int] = {}  # chunk -> its first parameter: whole chunks go in the order of the parameters
        for part in parts:
            first[part.chunk] = min(part.demand, first.get(part.chunk, part.demand))
        for number in sorted(range(len(parts)), key=lambda n: (first[parts[n].chunk], n)):
            self._queues[chunks[parts[number].chunk].reader].append(number)

    def build(self, quarter: int) -> Iterator[Round]:
        while any(self._queues):
            self._read, self._sent = [quarter] * self._world, [quarter] * self._world
            self._received = [2 * quarter] * self._world
            self._taken: list[int] = []
            self._fresh: list[int] = []
            active = [rank for rank in range(self._world) if self._queues[rank]]
            while active:
                active = [rank for rank in active if self._take(rank)]
            yield Round(tuple(sorted(self._taken)), tuple(sorted(self._fresh)))

    def _take(self, rank: int) -> bool:
        """Move the reader's next part into the round if there is room; say whether there may be more."""
        number = self._queues[rank][0]
        part = self._parts[number]
        reads = 0 if part.chunk in self._loaded else self._chunks[part.chunk].nbytes
        loads = self._loads(part, rank)
        sent = part.nbytes if part.gathered else sum(nbytes for _, nbytes in loads)
        fits = self._sent[rank] >= sent and self._read[rank] >= reads
        if self._taken and not (fits and all(self._received[to] >= nbytes for to, nbytes in loads)):
            return False
        self._queues[rank].popleft()
        self._taken.append(number)
        self._sent[rank] -= sent
        self._read[rank] -= reads
        for to, nbytes in loads:
            self._received[to] -= nbytes
        if reads:
            self._loaded.add(part.chunk)
            self._fresh.append(part.chunk)
        return bool(self._queues[rank])

    def _loads(self, part: Part, reader: int) -> list[tuple[int, int]]:
        """(receiver, bytes) of a part; an all-gather brings all of it to everyone, its reader included."""
        if part.gathered:
            return [(rank, part.nbytes) for rank in range(self._world)]
        dtype = self._demands[part.demand].tensor.meta.dtype
        return list(_loads(part, reader, dtype))


def _loads(part: Part, reader: int, dtype: DType) -> Iterator[tuple[int, int]]:
    for delivery in part.deliveries:
        nbytes = dtype.nbytes(delivery.in_part.size)
        for rank in delivery.ranks:
            if rank != reader:
                yield rank, nbytes

"""From pieces to I/O: bounded batches of long reads, each carrying its copies.

1. Every target box is cut into *tiles*: boxes of at most `Limits.tile` bytes that are contiguous in the target. Tiles
   of different targets that cover the same rows of a parameter go into the same batch, so what they share is read once.
2. A tile's pieces become strided copies; their source spans, sorted and merged, become reads. A gap smaller than a
   page is read over (the kernel reads it anyway); a span that is mostly gap is read run by run instead.
3. A piece that is one long run on both sides and lands once needs no buffer: it becomes a `Direct` copy.
4. Of what is computed, a tile brings its operands into stretches of their own, which go nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.region import Region
from ms_ckpt_ext.core.geometry.strided import StridedCopy, byte_box, strided_copy, strides_of
from ms_ckpt_ext.core.planning.io_units import (
    Batch,
    Compute,
    Direct,
    Extent,
    Landing,
    Limits,
    Place,
    Read,
    ReadCopy,
    Stored,
    Stretch,
    Taken,
    Target,
    Task,
    Unit,
    cut,
    ranges,
)
from ms_ckpt_ext.core.planning.pieces import Computed, SourceTensor, locate


def schedule(tasks: Iterable[Task], stored: Stored, limits: Limits) -> Iterator[Unit]:
    """Turn tasks into units that can run in any order, on any worker.

    Raises CoverageError or LayoutMismatchError from planning, before the first unit that depends on it.
    """
    chooser = _Balance()
    batch = _BatchBuilder(stored, limits)
    for task in tasks:
        dtype = task.tensor.meta.dtype
        staged = []
        for target in task.targets:
            copies = [
                (sourced, strided_copy(sourced.piece, target.region.shape, dtype))
                for sourced in locate(task.tensor, target.region)
            ]
            short = any(sourced.computed or copy.run < limits.direct for sourced, copy in copies)
            if short or len(target.landings) > 1:
                staged.append(target)
                continue
            for sourced, copy in copies:
                file = chooser.pick(sourced.files, copy.nbytes)
                yield from _direct(file, stored(file, sourced.stored_name), target.landings[0], copy, limits)
        begun = False
        for block in _blocks([target.region for target in staged], dtype, limits.tile):
            if batch.nbytes >= limits.tile:  # not sooner, for what is left after the last block ends the array
                begun = True
                yield batch.finish()
            for target in staged:
                tile = target.region.intersect(block)
                if tile is not None:
                    batch.add(task.tensor, target, tile, chooser)
        if batch.nbytes and (begun or batch.nbytes >= limits.tile // 2):
            yield batch.finish(last=True)
    if batch.nbytes:
        yield batch.finish(last=True)


class _Balance:
    """Spreads reading over the files that hold the same bytes: the one with the least so far, then the first."""

    def __init__(self) -> None:
        self._assigned: dict[int, int] = {}

    def pick(self, files: tuple[int, ...], nbytes: int) -> int:
        file = files[0] if len(files) == 1 else min(files, key=lambda f: self._assigned.get(f, 0))
        self._assigned[file] = self._assigned.get(file, 0) + nbytes
        return file


def _direct(
    file: int, extents: tuple[Extent, ...], landing: Landing, copy: StridedCopy, limits: Limits
) -> Iterator[Direct]:
    end = landing.extents[-1].offset + landing.extents[-1].length
    for source, target in copy.runs():
        for lying, landed in _paired(ranges(extents, source, copy.run), ranges(landing.extents, target, copy.run)):
            for start in range(0, landed.length, limits.chunk):
                length = min(limits.chunk, landed.length - start)
                at = landed.offset + start
                yield Direct(file, lying.offset + start, landing.sink, at, length, at + length == end)


def _paired(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[tuple[Extent, Extent]]:
    """Cut two runs of extents of the same total length at each other's seams."""
    a, b = next(left, None), next(right, None)
    while a and b:
        length = min(a.length, b.length)
        yield Extent(a.offset, length), Extent(b.offset, length)
        a = Extent(a.offset + length, a.length - length) if a.length > length else next(left, None)
        b = Extent(b.offset + length, b.length - length) if b.length > length else next(right, None)


def _blocks(regions: list[Region], dtype: DType, tile: int) -> Iterator[Region]:
    """Cut the hull of `regions` into boxes of at most `tile` bytes, each contiguous in any of the regions it meets."""
    if not regions:
        return
    start = tuple(map(min, zip(*(region.start for region in regions))))
    stop = tuple(map(max, zip(*(region.stop for region in regions))))
    yield from cut(Region(start, stop), 0, dtype, tile)


class _Span(NamedTuple):
    """A stretch of a file that a batch needs, and what it is for. The copy begins at `start`, whatever source it names.

    `number` is that of the stretch the copy lands in.
    """

    start: int
    stop: int
    number: int
    copy: StridedCopy


class _BatchBuilder:
    """Collects tiles until a batch is full."""

    def __init__(self, stored: Stored, limits: Limits) -> None:
        self._stored = stored
        self._limits = limits
        self._reset()

    def _reset(self) -> None:
        self.nbytes = 0
        self._spans: dict[int, list[_Span]] = {}
        self._scattered: list[Read] = []
        self._stretches: list[Stretch] = []
        self._computes: list[Compute] = []

    def add(self, tensor: SourceTensor, target: Target, tile: Region, chooser: _Balance) -> None:
        """Add one tile: a box of `target` that is contiguous there."""
        dtype = tensor.meta.dtype
        shape, box = byte_box(target.region.shape, tile.relative_to(target.region.start), dtype)
        offset = sum(low * stride for low, stride in zip(box.start, strides_of(shape)))
        self._bring(tensor, tile, self._places(target, offset, box.size), chooser)

    def _bring(self, tensor: SourceTensor, box: Region, places: tuple[Place, ...], chooser: _Balance) -> int:
        """Add a stretch for a box, and all that fills it; gives its number."""
        dtype, shape, number = tensor.meta.dtype, box.shape, len(self._stretches)
        nbytes = dtype.nbytes(box.size)
        self._stretches.append(Stretch(nbytes, places))
        self.nbytes += nbytes
        for piece, files, stored_name, computed in locate(tensor, box):
            whole_copy = strided_copy(piece, shape, dtype)
            if computed is not None:
                self._compute(computed, whole_copy, number, chooser)
                continue
            file = chooser.pick(files, whole_copy.nbytes)
            extents = self._stored(file, stored_name)
            for copy in _bounded(whole_copy, self._limits.tile):
                self._lay(file, extents, number, copy, copy.source)
        return number

    def _compute(self, computed: Computed, copy: StridedCopy, number: int, chooser: _Balance) -> None:
        """Add what is computed into a stretch, and stretches for its operands."""
        (operation, operands), box = computed
        taken = zip(operands, operation.takes(box))
        needed = tuple(Taken(self._bring(operand, part, (), chooser), part) for operand, part in taken)
        self._computes.append(Compute(operation, box, needed, number, copy))

    def _lay(self, file: int, extents: tuple[Extent, ...], number: int, copy: StridedCopy, source: int) -> None:
        """Note where in the file a copy's source lies; `source` counts from the beginning of its tensor."""
        lying = tuple(ranges(extents, source, copy.source_span))
        if len(lying) == 1:
            start, length = lying[0]
            self._spans.setdefault(file, []).append(_Span(start, start + length, number, copy))
        elif _wasteful(copy, self._limits.gap):
            for run in _explode(_Span(source, source + copy.source_span, number, copy)):
                self._lay(file, extents, number, run.copy, run.start)
        else:
            self._scattered.append(Read(file, lying, (ReadCopy(number, copy._replace(source=0)),)))

    @staticmethod
    def _places(target: Target, offset: int, nbytes: int) -> tuple[Place, ...]:
        places = []
        for landing in target.landings:
            skip = 0
            for extent in ranges(landing.extents, offset, nbytes):
                places.append(Place(landing.sink, extent.offset, skip, extent.length))
                skip += extent.length
        return tuple(places)

    def finish(self, last: bool = False) -> Batch:
        """The batch so far; the builder starts anew."""
        reads = [read for file, spans in self._spans.items() for read in self._merge(file, spans)]
        batch = Batch(tuple(reads + self._scattered), tuple(self._stretches), last, tuple(self._computes))
        self._reset()
        return batch

    def _merge(self, file: int, spans: list[_Span]) -> Iterator[Read]:
        for cluster in _clusters(spans, self._limits.gap, self._limits.tile):
            length = max(span.stop for span in cluster) - cluster[0].start
            wanted = sum(span.copy.nbytes for span in cluster)
            if wanted < 0.8 * length and any(_wasteful(span.copy, self._limits.gap) for span in cluster):
                runs = [run for span in cluster for run in _explode(span)]
                for part in _clusters(runs, self._limits.gap, self._limits.tile):
                    yield _read(file, part)
            else:
                yield _read(file, cluster)


def _bounded(copy: StridedCopy, most: int) -> Iterator[StridedCopy]:
    """Cut a copy along its outer axes: a tile that is small in the target may lie far apart in the source."""
    if not copy.counts or copy.source_span <= most:
        yield copy
        return
    count, stride, landing = copy.counts[0], copy.source_strides[0], copy.target_strides[0]
    one = copy.source_span - (count - 1) * stride
    step = max(1, (most - one) // stride + 1)
    for first in range(0, count, step):
        part = copy._replace(source=copy.source + first * stride, target=copy.target + first * landing)
        if step > 1:
            yield part._replace(counts=(min(step, count - first), *copy.counts[1:]))
            continue
        inner = part._replace(
            counts=copy.counts[1:], source_strides=copy.source_strides[1:], target_strides=copy.target_strides[1:]
        )
        yield from _bounded(inner, most)


def _clusters(spans: list[_Span], gap: int, most: int) -> Iterator[list[_Span]]:
    """Group spans that overlap or lie at most `gap` apart, up to `most` bytes unless they overlap."""
    cluster: list[_Span] = []
    stop = 0
    for span in sorted(spans, key=lambda s: s.start):
        if cluster and not (span.start < stop or (span.start <= stop + gap and span.stop - cluster[0].start <= most)):
            yield cluster
            cluster = []
        stop = max(stop, span.stop) if cluster else span.stop
        cluster.append(span)
    if cluster:
        yield cluster


def _wasteful(copy: StridedCopy, gap: int) -> bool:
    depth, length = _solid(copy)
    return depth > 0 and copy.source_strides[depth - 1] - length > gap


def _solid(copy: StridedCopy) -> tuple[int, int]:
    """(axes with gaps between them in the source, bytes without one): a transposed piece is contiguous in no other."""
    depth, length = len(copy.counts), copy.run
    while depth and copy.source_strides[depth - 1] == length:
        depth -= 1
        length *= copy.counts[depth]
    return depth, length


def _explode(span: _Span) -> Iterator[_Span]:
    copy = span.copy
    depth, length = _solid(copy)
    outer = copy._replace(
        run=length,
        counts=copy.counts[:depth],
        source=span.start,
        source_strides=copy.source_strides[:depth],
        target_strides=copy.target_strides[:depth],
    )
    inner = (copy.counts[depth:], copy.source_strides[depth:], copy.target_strides[depth:])
    for source, target in outer.runs():
        part = StridedCopy(copy.run, inner[0], source, inner[1], target, inner[2])
        yield _Span(source, source + length, span.number, part)


def _read(file: int, cluster: list[_Span]) -> Read:
    start = cluster[0].start
    copies = []
    for low, _, number, (run, counts, _, strides, target, steps) in cluster:
        copies.append(ReadCopy(number, StridedCopy(run, counts, low - start, strides, target, steps)))
    stop = max(span.stop for span in cluster)
    return Read(file, (Extent(start, stop - start),), tuple(copies))

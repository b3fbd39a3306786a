"""From pieces to I/O: bounded batches of long reads, each carrying its copies.

1. Every target box is cut into *tiles*: boxes of at most `Limits.tile` bytes that are contiguous in the target. Tiles
   of different targets that cover the same rows of a parameter go into the same batch, so what they share is read once.
2. A tile's pieces become strided copies; their source spans, sorted and merged, become reads. A gap smaller than a
   page is read over (the kernel reads it anyway); a span that is mostly gap is read run by run instead.
3. A piece that is one long run on both sides and lands once needs no buffer: it becomes a `Direct` copy.
4. Of what is computed, a tile brings its operands into stretches of their own, which go nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from math import prod
from operator import itemgetter
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.strided import Form, StridedCopy, byte_box, strided_copy, strides_of
from ms_ckpt_ext.core.planning.copy_forms import CopyForms
from ms_ckpt_ext.core.planning.io_units import (
    Batch,
    Compute,
    Direct,
    Extent,
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
    paired,
    ranges,
    tile_blocks,
)
from ms_ckpt_ext.core.planning.pieces import Computed, Sourced, SourceTensor, locate


def schedule(tasks: Iterable[Task], stored: Stored, limits: Limits) -> Iterator[Unit]:
    """Turn tasks into units that can run in any order, on any worker.

    Raises CoverageError or LayoutMismatchError from planning, before the first unit that depends on it.
    """
    chooser = _Balance()
    batch = _BatchBuilder(stored, limits)
    before: Optional[Task] = None  # with whose end the batch may end
    for task in tasks:
        if before is not None and not (before.shares(task) and batch.nbytes + task.nbytes <= limits.tile * 3 // 2):
            yield batch.finish(last=True)
        before = None
        files = _files_of_small(task, limits)
        if files:
            batch.add_whole(task, files, chooser)
            if batch.is_half_full:
                yield batch.finish(last=True)
            continue
        staged = []
        for target in task.targets:
            copies = _long_copies(task.tensor, target, limits)
            if copies is None:
                staged.append(target)
            for sourced, copy in copies or ():
                file = chooser.pick(sourced.files, copy.nbytes)
                yield from _direct(file, stored(file, sourced.stored_name), target, copy, limits)
        if (yield from _tiles(batch, task.tensor, staged, chooser, limits)):
            before = task
    if batch.nbytes:
        yield batch.finish(last=True)


def _long_copies(tensor: SourceTensor, target: Target, limits: Limits) -> Optional[list[tuple[Sourced, StridedCopy]]]:
    """The copies that fill a target without a buffer; None when some of their runs are short, or it lands twice."""
    dtype = tensor.meta.dtype
    if dtype.nbytes(target.region.size) < limits.direct or len(target.landings) > 1:
        return None
    copies = [
        (sourced, strided_copy(sourced.piece, target.region.shape, dtype)) for sourced in locate(tensor, target.region)
    ]
    return None if any(sourced.computed or copy.run < limits.direct for sourced, copy in copies) else copies


def _tiles(
    batch: _BatchBuilder, tensor: SourceTensor, staged: list[Target], chooser: _Balance, limits: Limits
) -> Generator[Batch, None, bool]:
    """Add targets of one parameter to a batch, tile by tile; gives the batches that are full.

    Returns whether the last one is full enough to end with the parameter.
    """
    begun = False
    for block in tile_blocks([target.region for target in staged], tensor.meta.dtype, limits.tile):
        tiles = [(target, tile) for target in staged if (tile := target.region.intersect(block)) is not None]
        if tiles and batch.nbytes >= limits.tile:  # not sooner, for what is left after the last block ends the array
            begun = True
            yield batch.finish()
        for target, tile in tiles:
            batch.add(tensor, target, tile, chooser)
    return begun or batch.is_half_full


def _files_of_small(task: Task, limits: Limits) -> tuple[int, ...]:
    """The files that hold all that a task wants as one run, which fits a batch with others; () when it wants more."""
    tensor, targets = task
    if len(targets) != 1 or not tensor.placements:
        return ()
    ((region, landings),), placement = targets, tensor.placements[0]
    if len(landings) != 1 or region.stop != tensor.meta.shape or any(region.start) or prod(placement.parts) > 1:
        return ()
    (landing,) = landings
    nbytes = sum([length for _, length in landing.extents])
    return placement.holders.get(region.start, ()) if nbytes < limits.direct and nbytes <= limits.tile else ()


class _Balance:
    """Spreads reading over the files that hold the same bytes: the one with the least so far, then the first."""

    def __init__(self) -> None:
        self._assigned: defaultdict[int, int] = defaultdict(int)

    def pick(self, files: tuple[int, ...], nbytes: int) -> int:
        file = min(files, key=self._assigned.__getitem__)
        self._assigned[file] += nbytes
        return file


def _direct(
    file: int, extents: tuple[Extent, ...], target: Target, copy: StridedCopy, limits: Limits
) -> Iterator[Direct]:
    (landing,) = target.landings
    end = landing.extents[-1].offset + landing.extents[-1].length
    for source, into in copy.runs():
        for lying, landed in paired(ranges(extents, source, copy.run), ranges(landing.extents, into, copy.run)):
            for start in range(0, landed.length, limits.chunk):
                length = min(limits.chunk, landed.length - start)
                at = landed.offset + start
                yield Direct(file, lying.offset + start, landing.sink, at, length, at + length == end)


class _Span(NamedTuple):
    """A stretch of a file that a batch needs, and what it is for: a copy that begins at `start`, into a stretch."""

    start: int
    stop: int
    number: int
    target: int
    form: Form


class _BatchBuilder:
    """Collects tiles until a batch is full."""

    def __init__(self, stored: Stored, limits: Limits) -> None:
        self._stored = stored
        self._limits = limits
        self._forms = CopyForms(limits.tile)
        self._reset()

    def _reset(self) -> None:
        self.nbytes = 0
        self._spans: dict[int, list[_Span]] = {}
        self._scattered: list[Read] = []
        self._stretches: list[Stretch] = []
        self._computes: list[Compute] = []

    @property
    def is_half_full(self) -> bool:
        """Whether what is added next had better go into another batch."""
        return 2 * self.nbytes >= self._limits.tile

    def add_whole(self, task: Task, files: tuple[int, ...], chooser: _Balance) -> None:
        """Add all of a parameter, which these files hold whole: one run of bytes, with one landing."""
        tensor, ((_, ((sink, extents),)),) = task
        places, nbytes = [], 0
        for offset, length in extents:
            places.append(Place(sink, offset, nbytes, length))
            nbytes += length
        number = len(self._stretches)
        self._stretches.append(Stretch(nbytes, tuple(places)))
        self.nbytes += nbytes
        file = chooser.pick(files, nbytes)
        stored = self._stored(file, tensor.stored_name)
        self._lay(file, stored, number, 0, nbytes, 0, self._forms.run_of(nbytes))

    def add(self, tensor: SourceTensor, target: Target, tile: Region, chooser: _Balance) -> None:
        """Add one tile: a box of `target` that is contiguous there."""
        dtype = tensor.meta.dtype
        shape, box = byte_box(target.region.shape, tile.relative_to(target.region.start), dtype)
        offset = sum(low * stride for low, stride in zip(box.start, strides_of(shape)))
        self._bring(tensor, tile, target.places(offset, box.size), chooser)

    def _bring(self, tensor: SourceTensor, box: Region, places: tuple[Place, ...], chooser: _Balance) -> int:
        """Add a stretch for a box, and all that fills it; gives its number."""
        dtype, shape, number = tensor.meta.dtype, box.shape, len(self._stretches)
        nbytes = dtype.nbytes(box.size)
        self._stretches.append(Stretch(nbytes, places))
        self.nbytes += nbytes
        for piece, files, stored_name, computed in locate(tensor, box):
            if computed is not None:
                self._compute(computed, strided_copy(piece, shape, dtype), number, chooser)
                continue
            known = self._forms.of(piece, shape, dtype)
            file = chooser.pick(files, known.nbytes)
            extents = self._stored(file, stored_name)
            for source, span, target, form in known.parts:
                self._lay(file, extents, number, source, span, target, form)
        return number

    def _compute(self, computed: Computed, copy: StridedCopy, number: int, chooser: _Balance) -> None:
        """Add what is computed into a stretch, and stretches for its operands."""
        (operation, operands), box = computed
        taken = zip(operands, operation.takes(box))
        needed = tuple(Taken(self._bring(operand, part, (), chooser), part) for operand, part in taken)
        self._computes.append(Compute(operation, box, needed, number, copy))

    def _lay(
        self, file: int, extents: tuple[Extent, ...], number: int, source: int, span: int, target: int, form: Form
    ) -> None:
        """Note where in the file a copy's source lies; `source` counts from the beginning of its tensor."""
        start, length = extents[0]
        if source + span <= length:
            lying = start + source
            self._spans.setdefault(file, []).append(_Span(lying, lying + span, number, target, form))
            return
        scattered = tuple(ranges(extents, source, span))
        if len(scattered) == 1:
            self._lay(file, scattered, number, 0, span, target, form)
        elif form.gap() > self._limits.gap:
            for run in _explode(_Span(source, source + span, number, target, form)):
                self._lay(file, extents, number, run.start, run.stop - run.start, run.target, run.form)
        else:
            self._scattered.append(Read(file, scattered, (ReadCopy(number, form.at(0, target)),)))

    def finish(self, last: bool = False) -> Batch:
        """The batch so far; the builder starts anew."""
        reads = [read for file, spans in self._spans.items() for read in self._merge(file, spans)]
        batch = Batch(tuple(reads + self._scattered), tuple(self._stretches), last, tuple(self._computes))
        self._reset()
        return batch

    def _merge(self, file: int, spans: list[_Span]) -> Iterator[Read]:
        for cluster in _clusters(spans, self._limits.gap, self._limits.tile):
            length = max([span.stop for span in cluster]) - cluster[0].start
            wanted = sum([span.form.nbytes for span in cluster])
            if wanted < 0.8 * length and any(span.form.gap() > self._limits.gap for span in cluster):
                runs = [run for span in cluster for run in _explode(span)]
                for part in _clusters(runs, self._limits.gap, self._limits.tile):
                    yield _read(file, part)
            else:
                yield _read(file, cluster)


def _clusters(spans: list[_Span], gap: int, most: int) -> Iterator[list[_Span]]:
    """Group spans that overlap or lie at most `gap` apart, up to `most` bytes, or twice that where they overlap."""
    first, *others = sorted(spans, key=itemgetter(0))
    cluster, stop = [first], first.stop
    for span in others:
        reach = most if span.start >= stop else 2 * most
        if span.start > stop + gap or stop < span.stop > cluster[0].start + reach:
            yield cluster
            cluster, stop = [], span.stop
        cluster.append(span)
        stop = max(stop, span.stop)
    yield cluster


def _explode(span: _Span) -> Iterator[_Span]:
    inner, runs = span.form.apart(span.start, span.target)
    for source, target in runs:
        yield _Span(source, source + inner.nbytes, span.number, target, inner)


def _read(file: int, cluster: list[_Span]) -> Read:
    start = cluster[0].start
    stop = max([span.stop for span in cluster])
    return Read(file, (Extent(start, stop - start),), tuple(_folded(cluster, start)))


def _folded(cluster: list[_Span], start: int) -> Iterator[ReadCopy]:
    """The copies of a read. Those of one form at even distances, on both sides, are one: experts that are stacked."""
    alike: dict[tuple[int, int], list[_Span]] = {}
    for span in cluster:
        alike.setdefault((span.number, id(span.form)), []).append(span)
    for (number, _), spans in alike.items():
        first, *others = spans
        if not others:
            yield ReadCopy(number, first.form.at(first.start - start, first.target))
            continue
        at = 0
        while at < len(spans):
            low, target = spans[at].start, spans[at].target
            following = spans[min(at + 1, len(spans) - 1)]
            count, step, landing = 1, following.start - low, following.target - target
            while at + count < len(spans):
                other = spans[at + count]
                if other.start != low + count * step or other.target != target + count * landing:
                    break
                count += 1
            yield ReadCopy(number, first.form.at(low - start, target).repeated(count, step, landing))
            at += count

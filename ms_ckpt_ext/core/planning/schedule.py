"""From pieces to I/O: bounded batches of long reads, each carrying its copies.

1. Every target box is cut into *tiles*: boxes of at most `Limits.tile` bytes that are contiguous in the target. Tiles
   of different targets that cover the same rows of a parameter go into the same batch, so what they share is read once.
2. A tile's pieces become strided copies; their source spans, sorted and merged, become reads. A gap smaller than a
   page is read over (the kernel reads it anyway); a span that is mostly gap is read run by run instead.
3. A piece that is one long run on both sides and lands once needs no buffer: it becomes a `Direct` copy.
4. Of what is computed, a tile brings its operands into stretches of their own, which go nowhere else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DType, Region, Shape
from ms_ckpt_ext.core.geometry.strided import Form, StridedCopy, byte_box, strided_copy, strides_of
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
    paired,
    ranges,
    tile_blocks,
)
from ms_ckpt_ext.core.planning.pieces import Computed, Piece, Sourced, SourceTensor, locate

_PIECES = 1 << 15
"""Pieces whose copies are kept."""


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
        if _is_small_and_whole(task, limits):
            if batch.nbytes >= limits.tile:
                yield batch.finish()
            batch.add_whole(task.tensor, task.targets[0], chooser)
            if batch.nbytes >= limits.tile // 2:
                yield batch.finish(last=True)
            continue
        staged = []
        for target in task.targets:
            copies = _long_copies(task.tensor, target, limits)
            if copies is None:
                staged.append(target)
            for sourced, copy in copies or ():
                file = chooser.pick(sourced.files, copy.nbytes)
                yield from _direct(file, stored(file, sourced.stored_name), target.landings[0], copy, limits)
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
        if batch.nbytes >= limits.tile:  # not sooner, for what is left after the last block ends the array
            begun = True
            yield batch.finish()
        for target in staged:
            tile = target.region.intersect(block)
            if tile is not None:
                batch.add(tensor, target, tile, chooser)
    return batch.nbytes > 0 and (begun or batch.nbytes >= limits.tile // 2)


def _is_small_and_whole(task: Task, limits: Limits) -> bool:
    """Whether a task wants nothing but all of a parameter that files hold whole, and that fits a batch with others."""
    tensor, targets = task
    if len(targets) != 1 or len(targets[0].landings) != 1 or tensor.recipe is not None or not tensor.placements:
        return False
    shape, region, placement = tensor.meta.shape, targets[0].region, tensor.placements[0]
    if region.stop != shape or any(region.start) or max(placement.parts, default=1) > 1:
        return False
    nbytes = sum([extent.length for extent in targets[0].landings[0].extents])
    return nbytes < limits.direct and nbytes <= limits.tile and bool(placement.holders.get(region.start))


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
        for lying, landed in paired(ranges(extents, source, copy.run), ranges(landing.extents, target, copy.run)):
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


class _Cut(NamedTuple):
    """A copy as a span that is bounded: where it begins in its array, how much of that it spans."""

    source: int
    span: int
    target: int
    form: Form


class _Forms:
    """The copies of pieces, worked out once for a piece that comes again: those of parameters that are alike do.

    Equal forms are one object.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[int, tuple[Piece, Shape, DType, tuple[_Cut, ...], int]] = {}
        self._forms: dict[Form, Form] = {}
        self._runs: dict[int, Form] = {}

    def of(self, piece: Piece, shape: Shape, dtype: DType) -> tuple[tuple[_Cut, ...], int]:
        """The copy that moves a piece into an array of `shape`, cut along its outer axes; and its bytes."""
        known = self._known.get(id(piece))
        if known is None or known[0] is not piece or known[1] != shape or known[2] is not dtype:
            if len(self._known) >= _PIECES:
                self._known.clear()
            copy = strided_copy(piece, shape, dtype)
            cuts = tuple(map(self._cut, copy.bounded(self._most)))
            known = self._known[id(piece)] = (piece, shape, dtype, cuts, copy.nbytes)
        return known[3], known[4]

    def run_of(self, nbytes: int) -> Form:
        """The form of a copy of one run."""
        found = self._runs.get(nbytes)
        if found is None:
            form = Form(nbytes, (), (), (), nbytes)
            found = self._runs[nbytes] = self._forms.setdefault(form, form)
        return found

    def _cut(self, copy: StridedCopy) -> _Cut:
        form = copy.form
        return _Cut(copy.source, copy.source_span, copy.target, self._forms.setdefault(form, form))


class _BatchBuilder:
    """Collects tiles until a batch is full."""

    def __init__(self, stored: Stored, limits: Limits) -> None:
        self._stored = stored
        self._limits = limits
        self._forms = _Forms(limits.tile)
        self._reset()

    def _reset(self) -> None:
        self.nbytes = 0
        self._spans: dict[int, list[_Span]] = {}
        self._scattered: list[Read] = []
        self._stretches: list[Stretch] = []
        self._computes: list[Compute] = []

    def add_whole(self, tensor: SourceTensor, target: Target, chooser: _Balance) -> None:
        """Add all of a parameter, which files hold whole: one run of bytes."""
        sink, extents = target.landings[0]
        places, nbytes = [], 0
        for offset, length in extents:
            places.append(Place(sink, offset, nbytes, length))
            nbytes += length
        number = len(self._stretches)
        self._stretches.append(Stretch(nbytes, tuple(places)))
        self.nbytes += nbytes
        file = chooser.pick(tensor.placements[0].holders[target.region.start], nbytes)
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
            cuts, length = self._forms.of(piece, shape, dtype)
            file = chooser.pick(files, length)
            extents = self._stored(file, stored_name)
            for source, span, target, form in cuts:
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
    """Group spans that overlap or lie at most `gap` apart, up to `most` bytes unless they overlap."""
    cluster: list[_Span] = []
    stop = 0
    for span in sorted(spans, key=itemgetter(0)):
        if cluster and not (span.start < stop or (span.start <= stop + gap and span.stop - cluster[0].start <= most)):
            yield cluster
            cluster = []
        stop = max(stop, span.stop) if cluster else span.stop
        cluster.append(span)
    if cluster:
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
        form, at = spans[0].form, 0
        if len(spans) == 1:
            yield ReadCopy(number, form.at(spans[0].start - start, spans[0].target))
            continue
        while at < len(spans):
            low, target = spans[at].start, spans[at].target
            count, step, landing = 1, 0, 0
            if at + 1 < len(spans):
                step, landing = spans[at + 1].start - low, spans[at + 1].target - target
                while at + count < len(spans):
                    other = spans[at + count]
                    if other.start != low + count * step or other.target != target + count * landing:
                        break
                    count += 1
            yield ReadCopy(number, form.at(low - start, target).repeated(count, step, landing))
            at += count

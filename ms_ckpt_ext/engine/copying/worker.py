"""Runs units of I/O on worker threads: every read makes its copies, every stretch goes to all its places.

Threads suffice because everything long (read, write, copy inside the kernel, strided numpy copy) releases the
interpreter lock. A worker owns two buffers, one for a batch's stretches and one for the read under way, so memory is
`workers x about 2 tiles` whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Callable, Optional, Union

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.planning.io_units import (
    Batch,
    Compute,
    Direct,
    Extent,
    Landing,
    Limits,
    Read,
    Stored,
    Stretch,
    Target,
    Task,
    Unit,
)
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying.strides import copy_strided, scattered
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.digest_sink import DigestingSink
from ms_ckpt_ext.storage.linux import Buffer
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader, ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink, Sink, kernel_copy
from ms_ckpt_ext.storage.threads import spread

Landed = Callable[[int, int], None]
"""(sink, bytes): told after bytes reached a sink, from worker threads."""
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
_COPY = 1 << 20  # stays in a core's cache between read and write
_LIMITS = Limits()
_LARGEST_UNIT = 8 << 20
"""Bytes of the largest unit of an encrypted file that a copy takes at once."""


def shared_out(limits: Limits, nbytes: int, workers: int, by_blocks: bool) -> Limits:
    """The limits with what one worker takes of an array at once, where `nbytes` are written in all.

    Most arrays whole, for what two workers bring of one is read back to be digested; but no worker shall be left with
    more than an eighth of its share while the others have nothing to do. Of what was encrypted in large blocks
    (`by_blocks`) a block, or what lies in it: parts of one block then meet in the block that a reader keeps.
    """
    return limits._replace(share=0 if by_blocks else max(limits.share, nbytes // (8 * workers)))


def run(
    units: Iterator[Unit],
    readers: ReaderPool,
    sinks: Sequence[Sink],
    workers: int,
    landed: Landed,
    limits: Limits = _LIMITS,
) -> None:
    """Run all units, of which a worker takes an array's, or `limits.share`; the first error stops all and is raised."""

    def worker(stopped: Callable[[], bool]) -> Callable[[list[Unit]], None]:
        mine = _Worker(readers, sinks, landed, limits.run)

        def do(taken: list[Unit]) -> None:
            for unit in taken:
                if stopped():
                    return
                mine.unit(unit)

        return do

    spread(_shares(units, limits.share), workers, worker)


def _shares(units: Iterator[Unit], plenty: int) -> Iterator[list[Unit]]:
    """Units to be done in this order by one worker: an array to its end, or what is plenty."""
    share: list[Unit] = []
    nbytes = 0
    for unit in units:
        share.append(unit)
        nbytes += unit.nbytes
        if unit.last or nbytes >= plenty:
            yield share
            share, nbytes = [], 0
    if share:
        yield share


class Assembler:
    """Reads boxes of parameters into memory, one after another on the calling thread. Not for several threads."""

    def __init__(self, readers: ReaderPool, stored: Stored, limits: Limits) -> None:
        self._stored, self._limits = stored, limits
        self._sinks: list[Sink] = []
        self._worker = _Worker(readers, self._sinks, lambda _sink, _nbytes: None, limits.run)

    def read(self, tensor: SourceTensor, region: Region, into: Union[Bytes, memoryview]) -> None:
        """Fill `into` (flat bytes) with a box, row-major. Raises CoverageError, FormatError or StorageError."""
        self._sinks[:] = [MemorySink(into)]
        task = Task(tensor, (Target(region, (Landing(0, (Extent(0, len(into)),)),)),))
        for unit in schedule([task], self._stored, self._limits):
            self._worker.unit(unit)


def _grain(reader: ByteReader, source: int, sink: Sink, target: int) -> tuple[int, int]:
    """Bytes of one piece of a copy, and the offset from which they count.

    An encrypted file takes and gives whole units at no extra cost.
    """
    for unit, offset in ((sink.unit, target), (reader.traits.unit, source)):
        if 0 < unit <= _LARGEST_UNIT:
            return -(-_COPY // unit) * unit, offset
    return _COPY, 0


class _Worker:
    def __init__(self, readers: ReaderPool, sinks: Sequence[Sink], landed: Landed, long_run: int) -> None:
        self._readers, self._sinks, self._landed, self._long_run = readers, sinks, landed, long_run
        self._assembly, self._scratch = Buffer(), Buffer()

    def unit(self, unit: Unit) -> None:
        if isinstance(unit, Direct):
            self.direct(unit)
        else:
            self.batch(unit)

    def direct(self, unit: Direct) -> None:
        sink = self._sinks[unit.sink]
        if isinstance(sink, MemorySink):
            self._readers.read_into(unit.file, unit.source, sink.bytes[unit.target : unit.target + unit.length])
        else:
            with self._readers.use(unit.file) as reader:
                self._copy(reader, unit, sink)
            self._readers.tally(unit.file, unit.length)
        self._landed(unit.sink, unit.length)

    def _copy(self, reader: ByteReader, unit: Direct, sink: Sink) -> None:
        stream = reader.traits.stream
        if stream is not None:
            # Some of it comes before it is known to be authentic; its file appears only when all of it is.
            ahead = unit.target - unit.source
            stream(unit.source, unit.length, lambda at, part: sink.write(at + ahead, part))
            return
        copied = kernel_copy(reader, unit.source, sink, unit.target, unit.length)
        if copied and isinstance(sink, DigestingSink):
            for at, part in self._parts(reader, unit, sink, 0, copied):
                sink.landed(at, part)
        for at, part in self._parts(reader, unit, sink, copied, unit.length):
            sink.write(at, part)

    def _parts(
        self, reader: ByteReader, unit: Direct, sink: Sink, start: int, stop: int
    ) -> Iterator[tuple[int, memoryview]]:
        """(offset in the sink, bytes) of a stretch of a direct copy."""
        grain, origin = _grain(reader, unit.source, sink, unit.target)
        while start < stop:
            source, target = unit.source + start, unit.target + start
            part = self._scratch.take(min(grain - (origin + start) % grain, stop - start), source, target)
            reader.read_into(source, part)
            yield target, part
            start += len(part)

    def batch(self, batch: Batch) -> None:
        memories = [self._memory(stretch) for stretch in batch.stretches]
        staged = [memory is None for memory in memories]
        first = batch.stretches[0].places[0].offset
        arena = self._assembly.take(sum(s.nbytes for s, stage in zip(batch.stretches, staged) if stage), first)
        buffers, at = [], 0
        for stretch, memory in zip(batch.stretches, memories):
            buffers.append(arena[at : at + stretch.nbytes] if memory is None else memory)
            at += stretch.nbytes if memory is None else 0
        for read in batch.reads:
            self._read(read, buffers)
        for compute in batch.computes:
            self._compute(compute, buffers)
        self._write(batch, staged, arena)

    def _memory(self, stretch: Stretch) -> Optional[memoryview]:
        """The stretch's own memory, when that is the only place it goes."""
        if len(stretch.places) != 1:
            return None
        place = stretch.places[0]
        sink = self._sinks[place.sink]
        return sink.bytes[place.offset : place.offset + place.length] if isinstance(sink, MemorySink) else None

    def _compute(self, compute: Compute, buffers: list[memoryview]) -> None:
        """Compute right into the stretch, where the result is one run there."""
        from ms_ckpt_ext.core.planning.recipes import Operand  # rules only

        operands = [Operand(buffers[number], region) for number, region in compute.operands]
        copy, into = compute.copy, buffers[compute.stretch]
        if copy.counts:
            result = self._scratch.take(copy.nbytes)
            compute.operation.compute(compute.box, operands, result)
            copy_strided(copy, result, into)
        else:
            compute.operation.compute(compute.box, operands, into[copy.target : copy.target + copy.run])

    def _read(self, read: Read, buffers: list[memoryview]) -> None:
        nbytes = read.nbytes
        only = read.copies[0]
        if len(read.copies) == 1 and only.copy.nbytes == nbytes and not only.copy.counts:
            into = buffers[only.stretch][only.copy.target : only.copy.target + nbytes]
            self._fill(read, into)
            return
        if len(read.extents) == 1 and linux.can_scatter() and self._scatter(read, buffers):
            return
        scratch = self._scratch.take(nbytes, read.extents[0].offset)
        self._fill(read, scratch)
        for stretch, copy in read.copies:
            copy_strided(copy, scratch, buffers[stretch])

    def _scatter(self, read: Read, buffers: list[memoryview]) -> bool:
        """Have the kernel put every run in its place; False where that is no way, or the file is encrypted."""
        with self._readers.use(read.file) as reader:
            if not isinstance(reader, PlainReader):
                return False
            vector = scattered(read.copies, read.nbytes, buffers, self._long_run)
            if vector is None:
                return False
            reader.scatter(read.extents[0].offset, vector)
        self._readers.tally(read.file, read.nbytes)
        return True

    def _fill(self, read: Read, into: memoryview) -> None:
        at = 0
        for offset, length in read.extents:
            self._readers.read_into(read.file, offset, into[at : at + length])
            at += length

    def _write(self, batch: Batch, staged: list[bool], arena: memoryview) -> None:
        """Write every staged stretch to its places; neighbours in buffer and file go together."""
        pending: dict[int, tuple[int, int, int]] = {}  # sink -> (offset in sink, offset in arena, length)
        base = 0
        for stretch, stage in zip(batch.stretches, staged):
            for sink, offset, skip, length in stretch.places:
                if not stage:
                    self._landed(sink, length)
                    continue
                to, start, held = pending.get(sink, (0, 0, 0))
                if held and to + held == offset and start + held == base + skip:
                    pending[sink] = (to, start, held + length)
                    continue
                self._flush(sink, pending.pop(sink, None), arena)
                pending[sink] = (offset, base + skip, length)
            base += stretch.nbytes if stage else 0
        for sink, run_ in pending.items():
            self._flush(sink, run_, arena)

    def _flush(self, number: int, held: Optional[tuple[int, int, int]], arena: memoryview) -> None:
        if held is None:
            return
        offset, start, length = held
        self._sinks[number].write(offset, arena[start : start + length])
        self._landed(number, length)

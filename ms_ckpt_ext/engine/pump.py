"""Runs units of I/O on worker threads: every read makes its copies, every stretch goes to all its places.

Threads suffice because everything long (read, write, copy inside the kernel, strided numpy copy) releases the
interpreter lock. A worker owns two buffers, one for a batch's stretches and one for the read under way, so memory is
`workers x about 2 tiles` whatever the model's size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Callable, Optional

import numpy as np

from ms_ckpt_ext.core.reads import Batch, Direct, Read, Stretch, Unit
from ms_ckpt_ext.core.strided import StridedCopy
from ms_ckpt_ext.storage.digesting import DigestingSink
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.storage.reader import ByteReader
from ms_ckpt_ext.storage.sink import MemorySink, Sink, kernel_copy

Landed = Callable[[int, int], None]
"""(sink, bytes): told after bytes reached a sink, from worker threads."""
_COPY = 1 << 20  # stays in a core's cache between read and write
_PLENTY = 32 << 20  # bytes a worker takes at once: enough to go through files in long stretches, too little to idle for


def run(units: Iterator[Unit], readers: ReaderPool, sinks: Sequence[Sink], workers: int, landed: Landed) -> None:
    """Run all units; the first error stops the others and is raised."""
    source = _Shared(units)
    threads = [
        threading.Thread(target=_work, args=(source, readers, sinks, landed), name=f"pump-{n}", daemon=True)
        for n in range(workers - 1)
    ]
    try:
        for thread in threads:
            thread.start()
        _work(source, readers, sinks, landed)
    except BaseException as error:  # noqa: BLE001 - a thread that cannot start; raised below
        source.fail(error)
    for thread in threads:
        _join(thread, source)
    if source.error is not None:
        raise source.error


def _join(thread: threading.Thread, source: _Shared) -> None:
    """Wait for a thread even through a Ctrl-C: the caller closes the files it writes to."""
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:  # noqa: BLE001 - stops the threads; raised by run()
            source.fail(error)


class _Shared:
    """An iterator that threads take from, and the first error any of them met."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._units = units
        self._lock = threading.Lock()
        self.error: Optional[BaseException] = None

    def take(self) -> list[Unit]:
        """The next units, to be done in this order by one worker: an array to its end, or what is plenty; else []."""
        taken: list[Unit] = []
        with self._lock:
            nbytes = 0
            while self.error is None and nbytes < _PLENTY and not (taken and taken[-1].last):
                unit = next(self._units, None)
                if unit is None:
                    break
                taken.append(unit)
                nbytes += unit.nbytes
        return taken

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error


def _work(source: _Shared, readers: ReaderPool, sinks: Sequence[Sink], landed: Landed) -> None:
    worker = _Worker(readers, sinks, landed)
    try:
        while units := source.take():
            for unit in units:
                if source.error is not None:
                    return
                worker.direct(unit) if isinstance(unit, Direct) else worker.batch(unit)
    except BaseException as error:  # noqa: BLE001 - handed to the caller of run()
        source.fail(error)


class _Buffer:
    """Scratch memory that grows to the largest request and is reused."""

    def __init__(self) -> None:
        self._array = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        if self._array.size < nbytes:
            self._array = np.empty(nbytes, np.uint8)
        return self._array[:nbytes]


class _Worker:
    def __init__(self, readers: ReaderPool, sinks: Sequence[Sink], landed: Landed) -> None:
        self._readers, self._sinks, self._landed = readers, sinks, landed
        self._assembly, self._scratch = _Buffer(), _Buffer()

    def direct(self, unit: Direct) -> None:
        sink = self._sinks[unit.sink]
        if isinstance(sink, MemorySink):
            self._readers.read_into(
                unit.file, unit.source, memoryview(sink.array[unit.target : unit.target + unit.length])
            )
        else:
            with self._readers.use(unit.file) as reader:
                copied = kernel_copy(reader, unit.source, sink, unit.target, unit.length)
                if copied and isinstance(sink, DigestingSink):
                    for at, part in self._parts(reader, unit, 0, copied):
                        sink.landed(at, part)
                for at, part in self._parts(reader, unit, copied, unit.length):
                    sink.write(at, part)
            self._readers.tally(unit.file, unit.length)
        self._landed(unit.sink, unit.length)

    def _parts(self, reader: ByteReader, unit: Direct, start: int, stop: int) -> Iterator[tuple[int, memoryview]]:
        """(offset in the sink, bytes) of a stretch of a direct copy."""
        for at in range(start, stop, _COPY):
            part = memoryview(self._scratch.take(min(_COPY, stop - at)))
            reader.read_into(unit.source + at, part)
            yield unit.target + at, part

    def batch(self, batch: Batch) -> None:
        staged = [self._memory(stretch) is None for stretch in batch.stretches]
        arena = self._assembly.take(sum(s.nbytes for s, stage in zip(batch.stretches, staged) if stage))
        buffers, at = [], 0
        for stretch, stage in zip(batch.stretches, staged):
            memory = self._memory(stretch)
            buffers.append(arena[at : at + stretch.nbytes] if memory is None else memory)
            at += stretch.nbytes if stage else 0
        for read in batch.reads:
            self._read(read, buffers)
        self._write(batch, staged, arena)

    def _memory(self, stretch: Stretch) -> Optional[np.ndarray]:
        """The stretch's own memory, when that is the only place it goes."""
        place = stretch.places[0]
        sink = self._sinks[place.sink]
        if len(stretch.places) == 1 and isinstance(sink, MemorySink):
            return sink.array[place.offset : place.offset + place.length]
        return None

    def _read(self, read: Read, buffers: list[np.ndarray]) -> None:
        nbytes = read.nbytes
        only = read.copies[0]
        if len(read.copies) == 1 and only.copy.nbytes == nbytes and not only.copy.counts:
            into = buffers[only.stretch][only.copy.target : only.copy.target + nbytes]
            self._fill(read, into)
            return
        scratch = self._scratch.take(nbytes)
        self._fill(read, scratch)
        for stretch, copy in read.copies:
            copy_strided(copy, scratch, buffers[stretch])

    def _fill(self, read: Read, into: np.ndarray) -> None:
        at = 0
        for offset, length in read.extents:
            self._readers.read_into(read.file, offset, memoryview(into[at : at + length]))
            at += length

    def _write(self, batch: Batch, staged: list[bool], arena: np.ndarray) -> None:
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

    def _flush(self, number: int, held: Optional[tuple[int, int, int]], arena: np.ndarray) -> None:
        if held is None:
            return
        offset, start, length = held
        self._sinks[number].write(offset, memoryview(arena[start : start + length]))
        self._landed(number, length)


def copy_strided(copy: StridedCopy, source: np.ndarray, target: np.ndarray) -> None:
    """Make one strided copy between flat byte arrays."""
    if not copy.counts:
        target[copy.target : copy.target + copy.run] = source[copy.source : copy.source + copy.run]
        return
    grain = copy.run if copy.run in (2, 4, 8) else 1  # a transposed matrix: runs of one element
    shape, dtype = (*copy.counts, copy.run // grain), np.dtype(f"u{grain}")
    lying: np.ndarray = np.ndarray(shape, dtype, source.data, copy.source, (*copy.source_strides, grain))
    landing: np.ndarray = np.ndarray(shape, dtype, target.data, copy.target, (*copy.target_strides, grain))
    landing[...] = lying

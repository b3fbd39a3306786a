"""Chunks on their way from files to where they are cut: read on threads, moved on by the mover, reused.

The chunks of a round lie one after another in *slabs*, buffers of one size: a slab is read into host memory by several
threads, handed to the mover when it is full, and kept until the last round that cuts something out of it.

Where chunks are cut (host memory, or an NPU's) is the mover's business, and so is whether `stage` waits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Generic, Optional, Protocol, TypeVar

import numpy as np

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, SLAB, LocalPiece
from ms_ckpt_ext.core.exchange.one_rank import RankRound
from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import copy_box
from ms_ckpt_ext.engine.copying.strides import copy_strided
from ms_ckpt_ext.log import Trace
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.storage.threads import Pending, ThreadPool
from ms_ckpt_ext.transport.base import B, Bytes

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import SliceBytes

B_in = TypeVar("B_in", contravariant=True)


class Mover(Protocol[B]):
    """Takes staged bytes to where boxes are cut out of them, and cuts. Called by one thread."""

    def host(self, nbytes: int) -> Bytes:
        """Host memory to read into; `nbytes` is the same in every call."""

    def stage(self, host: Bytes, nbytes: int) -> B:
        """The first `nbytes` of what `host` returned, where `pack` and the sinks can cut them. `host` goes back."""

    def release(self, staged: B) -> None:
        """Nothing more is cut out of it."""

    def pack(self, source: B, offset: int, shape: Shape, box: Region, dtype: DType, target: B, at: int) -> None:
        """Copy a box of the array of `shape` at byte `offset` of `source` to byte `at` of `target`, contiguously."""

    def fetch(self, source: B, offset: int, nbytes: int) -> Bytes:
        """Bytes of a buffer in host memory, to be read before anything else is asked of the mover."""

    def put(self, host: Bytes) -> B:
        """A buffer of these bytes, for the sinks."""


class SliceSink(Protocol[B_in]):
    """Where one parameter of this rank lands."""

    def place(self, source: B_in, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]) -> None:
        """Copy a box of the array of `shape` at byte `offset` of `source` to `region` of the parameter's slice.

        With a view, `region` is a box of the slice seen through it.
        """

    def finish(self) -> None:
        """All pieces have landed."""

    def contents(self) -> SliceBytes:
        """What the slice holds, after `finish`."""


class HostMover:
    """Buffers are numpy arrays: staging costs nothing."""

    def __init__(self) -> None:
        self._idle: list[Bytes] = []

    def host(self, nbytes: int) -> Bytes:
        """Reused where there is one."""
        return self._idle.pop() if self._idle else np.frombuffer(linux.scratch(nbytes), np.uint8)

    def stage(self, host: Bytes, nbytes: int) -> Bytes:
        """The memory itself, whose turn to be reused comes with `release`."""
        return host

    def release(self, staged: Bytes) -> None:
        """To be read into again."""
        self._idle.append(staged)

    def pack(self, source: Bytes, offset: int, shape: Shape, box: Region, dtype: DType, target: Bytes, at: int) -> None:
        """One strided copy."""
        whole = Region((0,) * len(shape), box.shape)
        copy = copy_box(shape, box, box.shape, whole, dtype)
        copy_strided(copy._replace(source=copy.source + offset, target=at), source, target)

    def fetch(self, source: Bytes, offset: int, nbytes: int) -> Bytes:
        """The memory itself."""
        return source[offset : offset + nbytes]

    def put(self, host: Bytes) -> Bytes:
        """The memory itself."""
        return host


class HostSink:
    """A slice in host memory, as flat bytes."""

    def __init__(self, array: Bytes, shape: Shape, dtype: DType) -> None:
        self.array, self.shape, self.dtype = array, shape, dtype

    def place(
        self, source: Bytes, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]
    ) -> None:
        """One strided copy."""
        copy = copy_box(shape, box, self.shape, region, self.dtype, view)
        copy_strided(copy._replace(source=copy.source + offset), source, self.array)

    def finish(self) -> None:
        """Nothing is left to do."""

    def contents(self) -> SliceBytes:
        """The memory itself."""
        from ms_ckpt_ext.engine.load.replicas import SliceBytes

        return SliceBytes(self.dtype.name, iter((self.array,)))


@dataclass(frozen=True)
class Staged(Generic[B]):
    """Where a chunk lies: `offset` bytes into a buffer."""

    buffer: B
    offset: int


class ByteSource(Protocol[B]):
    """Where what this rank gives comes from, round by round."""

    @property
    def local(self) -> Sequence[LocalPiece]:
        """What this rank takes of its own memory."""

    def start(self, number: int) -> None:
        """Begin to read what round `number` needs, unless that was begun."""

    def stage(self, number: int) -> None:
        """Wait for it, and bring it to where it is cut. Raises what a read raised."""

    def __getitem__(self, chunk: int) -> Staged[B]:
        """Where a staged chunk lies."""

    def held(self, name: str) -> B:
        """What this rank has in memory under a name, as flat bytes."""

    def release(self, number: int) -> None:
        """Round `number` is over: give back what no later one cuts."""

    def close(self) -> None:
        """Stop reading."""


@dataclass
class _Slab(Generic[B]):
    """Some chunks of a round, one after another.

    Attributes:
        offsets: chunk -> where it begins.
        reads: under way.
    """

    host: Bytes
    nbytes: int
    offsets: dict[int, int]
    reads: list[Pending[None]] = field(default_factory=list)


class Slabs(Generic[B]):
    """A `ByteSource` of files: the chunks that this rank reads, round by round.

    Args:
        turns: this rank's side of every round.
        threads: reading threads.
    """

    local: tuple[LocalPiece, ...] = ()

    def __init__(
        self,
        plan: ExchangePlan,
        turns: Sequence[RankRound],
        mover: Mover[B],
        readers: ReaderPool,
        threads: int,
        trace: Trace,
    ) -> None:
        self._plan, self._turns, self._mover, self._readers, self._trace = plan, turns, mover, readers, trace
        self._pool = ThreadPool(threads, "read")
        sizes = [[plan.chunks[chunk].nbytes for chunk in turn.chunks] for turn in turns]
        shared = min(SLAB, max((sum(map(_aligned, each)) for each in sizes), default=0))
        self._slab = max([shared, *(nbytes for each in sizes for nbytes in each)])
        self._last_use = plan.last_use()
        self._reading: dict[int, list[_Slab[B]]] = {}
        self._staged: dict[int, Staged[B]] = {}
        self._until: dict[int, list[B]] = {}
        self._stop = threading.Event()

    def start(self, number: int) -> None:
        """Begin to read what round `number` needs, unless that was begun."""
        if number >= len(self._turns) or number in self._reading:
            return
        self._reading[number] = slabs = []
        for chunks in self._groups(self._turns[number].chunks):
            slab: _Slab[B] = _Slab(self._mover.host(self._slab), *self._laid_out(chunks))
            slabs.append(slab)
            slab.reads += [self._pool.submit(partial(self._read, chunk, slab)) for chunk in chunks]

    def stage(self, number: int) -> None:
        """Wait for the reads of round `number`, slab by slab, and move each on. Raises what a read raised."""
        for slab in self._reading[number]:
            with self._trace.span("wait for reads", round=number):
                for read in slab.reads:
                    read.result()
            with self._trace.span("stage", round=number, nbytes=slab.nbytes):
                buffer = self._mover.stage(slab.host, slab.nbytes)
            self._staged.update((chunk, Staged(buffer, offset)) for chunk, offset in slab.offsets.items())
            last = max(self._last_use[chunk] for chunk in slab.offsets)
            self._until.setdefault(last, []).append(buffer)
        self._reading[number] = []

    def __getitem__(self, chunk: int) -> Staged[B]:
        """Where a staged chunk lies."""
        return self._staged[chunk]

    def held(self, name: str) -> B:
        """Nothing is in memory."""
        raise KeyError(name)

    def release(self, number: int) -> None:
        """Round `number` is over: give back what no later one cuts."""
        for chunk in [chunk for chunk in self._staged if self._last_use[chunk] <= number]:
            del self._staged[chunk]
        for buffer in self._until.pop(number, ()):
            self._mover.release(buffer)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._pool.close()

    def _groups(self, chunks: Sequence[int]) -> list[list[int]]:
        """Chunks that share a slab, in their order."""
        groups: list[list[int]] = []
        room = 0
        for chunk in chunks:
            nbytes = self._plan.chunks[chunk].nbytes
            if not groups or nbytes > room:
                groups.append([])
                room = self._slab
            groups[-1].append(chunk)
            room -= _aligned(nbytes)
        return groups

    def _laid_out(self, chunks: Sequence[int]) -> tuple[int, dict[int, int]]:
        at, end = 0, 0
        offsets = {}
        for chunk in chunks:
            offsets[chunk], end = at, at + self._plan.chunks[chunk].nbytes
            at = _aligned(end)
        return end, offsets

    def _read(self, number: int, slab: _Slab[B]) -> None:
        chunk, at = self._plan.chunks[number], slab.offsets[number]
        with self._trace.span("read", chunk=number, nbytes=chunk.nbytes):
            for offset, length in chunk.extents:
                if self._stop.is_set():
                    return
                self._readers.read_into(chunk.file, offset, memoryview(slab.host[at : at + length]))
                at += length


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT

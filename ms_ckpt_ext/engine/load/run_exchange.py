"""Runs an exchange plan on one rank: read, exchange, place, round by round.

1. Reads of the next rounds run on threads while this round is exchanged; their host buffers are reused.
2. Every round begins with a status that all ranks share: an error on one (a failed read, a sink that refused) is
   raised on all of them before anybody waits in a collective for a rank that is not coming.
3. What a rank reads for others is packed, exchanged by one all-to-all and, for every group that wants the same, one
   all-gather of equal shares; what arrives is placed in the sinks. What it reads for itself goes there at once.
4. A sink is finished in the round that brings its last piece, and digested on a thread during the rounds that follow.

Where the buffers are (host memory, or an NPU's) is the mover's and the transport's business.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Optional, Protocol, TypeVar

import numpy as np

from ms_ckpt_ext.core.exchange.one_rank import Item, RankRound, SecondHop, rank_round
from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.geometry.dtype import DTYPES, DType
from ms_ckpt_ext.core.geometry.region import Region, Shape
from ms_ckpt_ext.core.geometry.strided import copy_box
from ms_ckpt_ext.core.geometry.view import View
from ms_ckpt_ext.engine.copying.strides import copy_strided
from ms_ckpt_ext.engine.load.replicas import Digester, SliceBytes
from ms_ckpt_ext.engine.load.trace import Trace
from ms_ckpt_ext.storage import buffers
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.base import B, Bytes, Transport

B_in = TypeVar("B_in", contravariant=True)


class Mover(Protocol[B]):
    """Cuts boxes out of staged bytes, wherever the transport's buffers are."""

    def stage(self, host: Bytes) -> B:
        """The bytes of a chunk where `pack` and the sinks can cut them; `host` stays untouched until released."""

    def pack(self, source: B, offset: int, shape: Shape, box: Region, dtype: DType, target: B, at: int) -> None:
        """Copy a box of the array of `shape` at byte `offset` of `source` to byte `at` of `target`, contiguously."""


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

    def stage(self, host: Bytes) -> Bytes:
        """The chunk itself."""
        return host

    def pack(self, source: Bytes, offset: int, shape: Shape, box: Region, dtype: DType, target: Bytes, at: int) -> None:
        """One strided copy."""
        whole = Region((0,) * len(shape), box.shape)
        copy = copy_box(shape, box, box.shape, whole, dtype)
        copy_strided(copy._replace(source=copy.source + offset, target=at), source, target)


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
        return SliceBytes(self.dtype.name, iter((self.array,)))


def run_exchange(
    plan: ExchangePlan,
    transport: Transport[B],
    mover: Mover[B],
    sinks: Mapping[int, SliceSink[B]],
    readers: ReaderPool,
    prefetch: int = 1,
    threads: int = 2,
    trace: Optional[Trace] = None,
    digester: Optional[Digester] = None,
) -> None:
    """Run the plan.

    Args:
        sinks: number of a demand -> where this rank's box of it lands.
        prefetch: rounds that are read ahead.
        threads: reading threads.
        digester: is given every slice when it is complete, and has digested all when this returns.

    Raises:
        the rank's own error, or PeerError on every other rank; TransportError when a rank has gone.
    """
    _Run(plan, transport, mover, sinks, readers, max(0, prefetch), threads, trace or Trace(), digester).go()


class _Run(Generic[B]):
    def __init__(
        self,
        plan: ExchangePlan,
        transport: Transport[B],
        mover: Mover[B],
        sinks: Mapping[int, SliceSink[B]],
        readers: ReaderPool,
        prefetch: int,
        threads: int,
        trace: Trace,
        digester: Optional[Digester],
    ) -> None:
        self._plan, self._transport, self._mover, self._sinks = plan, transport, mover, sinks
        self._readers, self._prefetch, self._trace, self._digester = readers, prefetch, trace, digester
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="read")
        self._free = _Buffers(max((chunk.nbytes for chunk in plan.chunks), default=0))
        self._reads: dict[int, Future[Bytes]] = {}
        self._held: dict[int, tuple[Bytes, B]] = {}
        self._buffers: dict[str, B] = {}
        self._last_use = plan.last_use()

    def go(self) -> None:
        rank = self._transport.rank
        turns = [rank_round(self._plan, round_, rank) for round_ in self._plan.rounds]
        self._allocate(turns)
        complete = _complete(turns)
        error: Optional[BaseException] = None
        try:
            for number, current in enumerate(turns):
                for ahead in turns[number : number + 1 + self._prefetch]:
                    self._start_reads(ahead)
                error = error or self._prepare(number, current)
                self._share_status(number, error)
                error = self._exchange(number, current) or self._finish(number, complete.get(number, ()))
                self._release(number)
            self._share_status(len(turns), error or self._await_digests())
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _allocate(self, turns: Sequence[RankRound]) -> None:
        sizes = {
            "send": max((sum(w.send_counts) for w in turns), default=0),
            "receive": max((sum(w.receive_counts) for w in turns), default=0),
        }
        for turn in turns:
            if turn.spread is not None:
                for name, counts in (("send on", turn.spread.send_counts), ("late", turn.spread.receive_counts)):
                    sizes[name] = max(sizes.get(name, 0), sum(counts))
            for number, gather in enumerate(turn.gathers):
                for name, nbytes in ((f"give {number}", gather.share), (f"gather {number}", gather.nbytes)):
                    sizes[name] = max(sizes.get(name, 0), nbytes)
        self._buffers = {name: self._transport.allocate(nbytes) for name, nbytes in sizes.items()}

    def _start_reads(self, current: RankRound) -> None:
        for chunk in current.chunks:
            if chunk not in self._reads and chunk not in self._held:
                self._reads[chunk] = self._pool.submit(self._read, chunk)

    def _read(self, number: int) -> Bytes:
        chunk = self._plan.chunks[number]
        host = self._free.take()
        at = 0
        with self._trace.span("read", chunk=number, nbytes=chunk.nbytes):
            for offset, length in chunk.extents:
                self._readers.read_into(chunk.file, offset, memoryview(host[at : at + length]))
                at += length
        return host

    def _prepare(self, number: int, current: RankRound) -> Optional[BaseException]:
        """Wait for this round's reads and pack what others get of them; an error is returned, not raised."""
        try:
            with self._trace.span("wait for reads", round=number):
                for chunk in current.chunks:
                    host = self._reads.pop(chunk).result()
                    self._held[chunk] = (host, self._mover.stage(host[: self._plan.chunks[chunk].nbytes]))
            with self._trace.span("pack", round=number):
                for item in current.outgoing:
                    self._pack(item, self._buffers["send"])
                for place, gather in enumerate(current.gathers):
                    for chunk, offset in gather.given:
                        self._give(chunk, self._buffers[f"give {place}"], offset)
        except BaseException as error:  # noqa: BLE001 - shared with all ranks before it is raised
            return error
        return None

    def _pack(self, item: Item, target: B) -> None:
        part = item.part
        staged = self._held[part.chunk][1]
        box, dtype = item.delivery.in_part, self._plan.dtype(part)
        self._mover.pack(staged, part.offset, part.shape, box, dtype, target, item.offset)

    def _give(self, chunk: int, target: B, offset: int) -> None:
        """A whole chunk, as bytes."""
        self._copy(self._held[chunk][1], 0, self._plan.chunks[chunk].nbytes, target, offset)

    def _copy(self, source: B, offset: int, nbytes: int, target: B, at: int) -> None:
        self._mover.pack(source, offset, (nbytes,), Region.whole((nbytes,)), DTYPES["U8"], target, at)

    def _share_status(self, number: int, error: Optional[BaseException]) -> None:
        with self._trace.span("status", round=number):
            share_status(self._transport, error)

    def _exchange(self, number: int, current: RankRound) -> Optional[BaseException]:
        """Exchange and place; an error of a sink is returned for the next status, one of the transport is raised."""
        handles = []
        with self._trace.span("exchange", round=number, nbytes=sum(current.receive_counts)):
            if current.exchanges:
                send, receive = self._buffers["send"], self._buffers["receive"]
                handles.append(
                    self._transport.start_all_to_all(send, current.send_counts, receive, current.receive_counts)
                )
            for place, gather in enumerate(current.gathers):
                give, into = self._buffers[f"give {place}"], self._buffers[f"gather {place}"]
                handles.append(self._transport.start_all_gather(give, gather.share, into, gather.ranks))
            error = self._place_own(number, current)
            for handle in handles:
                handle.wait()
        if current.spread is not None:
            error = self._send_on(number, current.spread) or error
        return error or self._place(number, current)

    def _send_on(self, number: int, spread: SecondHop) -> Optional[BaseException]:
        """Send on what this rank carries for others of its server. They wait for it: an error comes after that."""
        error = None
        send, late = self._buffers["send on"], self._buffers["late"]
        with self._trace.span("send on", round=number, nbytes=sum(spread.send_counts)):
            try:
                for forward in spread.outgoing:
                    self._copy(self._buffers["receive"], forward.source, forward.nbytes, send, forward.target)
            except BaseException as problem:  # noqa: BLE001 - shared with all ranks before it is raised
                error = problem
            self._transport.start_all_to_all(send, spread.send_counts, late, spread.receive_counts).wait()
        return error

    def _place_own(self, number: int, current: RankRound) -> Optional[BaseException]:
        try:
            with self._trace.span("place own", round=number):
                for part, delivery, offset, _ in current.own:
                    staged = self._held[part.chunk][1]
                    sink, box = self._sinks[part.demand], delivery.in_part
                    sink.place(staged, offset, part.shape, box, delivery.in_target, delivery.view)
        except BaseException as error:  # noqa: BLE001 - shared with all ranks before it is raised
            return error
        return None

    def _place(self, number: int, current: RankRound) -> Optional[BaseException]:
        try:
            with self._trace.span("place", round=number):
                gathered = [(gather.items, f"gather {place}") for place, gather in enumerate(current.gathers)]
                late = current.spread.incoming if current.spread is not None else ()
                for items, name in ((current.incoming, "receive"), (late, "late"), *gathered):
                    if not items:
                        continue
                    buffer = self._buffers[name]
                    for part, delivery, offset, _ in items:
                        shape = part.shape if part.gathered else delivery.in_part.shape
                        box = Region((0,) * len(shape), shape)
                        self._sinks[part.demand].place(buffer, offset, shape, box, delivery.in_target, delivery.view)
        except BaseException as error:  # noqa: BLE001 - shared with all ranks before it is raised
            return error
        return None

    def _finish(self, number: int, demands: Sequence[int]) -> Optional[BaseException]:
        """Finish the sinks that have all their pieces, and pass them on to be digested."""
        try:
            with self._trace.span("finish", round=number):
                for demand in demands:
                    self._sinks[demand].finish()
                    if self._digester is not None:
                        self._digester.add(demand, self._sinks[demand].contents())
        except BaseException as error:  # noqa: BLE001 - shared with all ranks before it is raised
            return error
        return None

    def _await_digests(self) -> Optional[BaseException]:
        try:
            if self._digester is not None:
                with self._trace.span("wait for digests"):
                    self._digester.wait()
        except BaseException as error:  # noqa: BLE001 - shared with all ranks before it is raised
            return error
        return None

    def _release(self, number: int) -> None:
        for chunk in [chunk for chunk in self._held if self._last_use[chunk] <= number]:
            host, _ = self._held.pop(chunk)
            self._free.give(host)


def _complete(turns: Sequence[RankRound]) -> dict[int, list[int]]:
    """Round -> the demands whose last piece it brings to this rank."""
    last: dict[int, int] = {}
    for number, current in enumerate(turns):
        late = current.spread.incoming if current.spread is not None else ()
        for items in (current.own, current.incoming, late, *(gather.items for gather in current.gathers)):
            last.update((item.part.demand, number) for item in items)
    complete: dict[int, list[int]] = {}
    for demand, number in last.items():
        complete.setdefault(number, []).append(demand)
    return complete


class _Buffers:
    """Host buffers for reads, all of one size, reused."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._idle: list[Bytes] = []

    def take(self) -> Bytes:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return np.frombuffer(buffers.scratch(self._nbytes), np.uint8)

    def give(self, buffer: Bytes) -> None:
        with self._lock:
            self._idle.append(buffer)

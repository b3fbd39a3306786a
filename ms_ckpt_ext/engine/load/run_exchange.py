"""Runs an exchange plan on one rank: read, exchange, place, round by round.

1. Reads of the next rounds run on threads while this round is exchanged; see `slabs`.
2. A status goes with every round: an error on one rank (a failed read, a sink that refused) is raised on all of them,
   and nothing of that round is placed. Where the transport overlaps it is told before the round is started, and heard
   before the next one is, while this one travels: nobody waits for it. A rank that failed starts that round as well,
   with what is in its buffers. The first status is waited for, before anything is changed, and so is the last; where
   nothing travels meanwhile, every one, so that nobody enters a collective in vain.
3. What a rank reads for others is packed, exchanged by one all-to-all and, for every group that wants the same, one
   all-gather of equal shares, or a broadcast by the rank that reads for it; what arrives is placed in the sinks. What a
   rank reads for itself goes there at once.
4. Where the transport overlaps, two rounds are under way: the next one is staged, packed and started before this one
   is waited for, in buffers of its own.
5. Of a parameter that is computed, what arrives is what it is computed from: see `engine.load.computing`.
6. A sink is finished in the round that brings its last piece, and digested on a thread during the rounds that follow.

Where the buffers are (host memory, or an NPU's) is the mover's and the transport's business. Where bytes come from is
that of the `ByteSource`: files (`slabs`), or what ranks hold in memory already. What a rank takes of its own memory is
placed while the first round is under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Callable, Generic, NamedTuple, Optional

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.one_rank import Item, RankRound, SecondHop, completed_by, turns_of
from ms_ckpt_ext.core.exchange.plan import Delivery, ExchangePlan, SlicePart
from ms_ckpt_ext.core.geometry.array import DTYPES, DType, Region, Shape, View
from ms_ckpt_ext.engine.load.slabs import ByteSource, Mover, Slabs, SliceSink
from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.log import Trace
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.agree import start_status
from ms_ckpt_ext.transport.base import B, Handle, Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.computing import Computing
    from ms_ckpt_ext.engine.load.replicas import Digester


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
    trace = trace or Trace()
    turns = turns_of(plan, transport.rank)
    slabs = Slabs(plan, turns, mover, readers, threads, trace)
    ExchangeRun(plan, turns, transport, mover, slabs, max(0, prefetch), trace).go(sinks, digester)


class _Step:
    """What a step of this rank raises, kept: it is shared with all ranks before it is raised."""

    def __init__(self) -> None:
        self.error: Optional[BaseException] = None

    def __enter__(self) -> _Step:
        return self

    def __exit__(self, kind: object, error: Optional[BaseException], where: object) -> bool:
        self.error = error
        return True


class _Flight(NamedTuple):
    """A round whose exchange was started."""

    number: int
    current: RankRound
    handles: list[Handle]


class _Landing(NamedTuple):
    """Where a piece lands: see `Delivery`."""

    demand: int
    dtype: DType
    region: Region
    view: Optional[View]
    into: int


def _landing(part: SlicePart, delivery: Delivery) -> _Landing:
    return _Landing(part.demand, part.dtype, delivery.in_target, delivery.view, delivery.into)


class ExchangeRun(Generic[B]):
    """A plan on one rank, with buffers that are made once: it may be run again where its bytes come from memory.

    Args:
        turns: this rank's side of every round.
        staging: where the bytes come from; closed at the end of every run.
        prefetch: rounds that are read ahead.

    Attributes:
        in_step: all ranks have left the last run in the same way. False while one is made, and after one that ended
            on this rank alone: the others may be in an exchange, so the transport is only good for `close()`.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        turns: Sequence[RankRound],
        transport: Transport[B],
        mover: Mover[B],
        staging: ByteSource[B],
        prefetch: int,
        trace: Trace,
    ) -> None:
        self._plan, self._transport, self._mover, self._slabs = plan, transport, mover, staging
        self._prefetch, self._trace, self._turns = prefetch, trace, turns
        self._complete = completed_by(turns, staging.local)
        self._buffers: list[dict[str, B]] = []
        self._flights: list[_Flight] = []
        self._verdict: Optional[Callable[[], None]] = None
        self._sinks: Mapping[int, SliceSink[B]] = {}
        self._digester: Optional[Digester] = None
        self._computing: dict[int, Computing[B]] = {}
        self.in_step = True

    def go(self, sinks: Mapping[int, SliceSink[B]], digester: Optional[Digester] = None) -> None:
        """Run it. Arguments and errors are those of `run_exchange`."""
        self._sinks, self._digester, self.in_step = sinks, digester, False
        under_way = 2 if self._transport.traits.overlaps and len(self._turns) > 1 else 1
        try:
            error = self._make_ready(under_way)
            if not self._turns:
                error = error or self._place_local() or self._finish(0, self._complete.get(0, ()))
            for number, current in enumerate(self._turns):
                error = error or self._prepare(number, current)
                self._tell(number, error)
                error = self._start(number, current, error)
                if len(self._flights) == under_way:
                    error = self._land() or error
            self._hear()
            while self._flights:
                error = self._land() or error
            error = error or self._finish(len(self._turns), self._without_pieces())
            self._tell(len(self._turns), error or self._await_digests(), wait=True)
            self.in_step = True
        finally:
            self._slabs.close()
            self._drain()
            self._verdict = None
            self._sinks, self._digester = {}, None

    def _make_ready(self, under_way: int) -> Optional[BaseException]:
        """Get what all rounds need; an error is returned, not raised."""
        with _Step() as step:
            if any(demand.tensor.is_computed for demand in self._plan.demands):
                from ms_ckpt_ext.engine.load.computing import computing_of

                self._computing = computing_of(self._plan.demands, self._transport.rank, self._sinks, self._mover)
            self._buffers = self._buffers or [self._allocate() for _ in range(under_way)]
        return step.error

    def _allocate(self) -> dict[str, B]:
        """The buffers of a round."""
        sizes = {"send": 0, "receive": 0}
        for turn in self._turns:
            needed = {"send": sum(turn.send_counts), "receive": sum(turn.receive_counts)}
            if turn.spread is not None:
                needed.update({"send on": sum(turn.spread.send_counts), "late": sum(turn.spread.receive_counts)})
            for number, gather in enumerate(turn.gathers):
                needed.update({f"give {number}": gather.gives, f"gather {number}": gather.nbytes})
            sizes.update({name: max(nbytes, sizes.get(name, 0)) for name, nbytes in needed.items()})
        return {name: self._transport.allocate(nbytes) for name, nbytes in sizes.items()}

    def _of(self, number: int) -> dict[str, B]:
        return self._buffers[number % len(self._buffers)]

    def _prepare(self, number: int, current: RankRound) -> Optional[BaseException]:
        """Read ahead, stage this round's chunks, pack what others get of them; an error is returned, not raised."""
        with _Step() as step:
            for ahead in range(number, number + 1 + self._prefetch):
                self._slabs.start(ahead)
            self._slabs.stage(number)
            buffers = self._of(number)
            with self._trace.span("pack", round=number):
                for item in current.outgoing:
                    self._pack(item, buffers["send"])
                for place, gather in enumerate(current.gathers):
                    target = buffers[f"give {place}" if gather.gives else f"gather {place}"]
                    for chunk, offset in gather.given:
                        self._give(chunk, target, offset)
        return step.error

    def _pack(self, item: Item, target: B) -> None:
        part = item.part
        staged = self._slabs[part.chunk]
        box, dtype = item.delivery.in_part, part.dtype
        self._mover.pack(staged.buffer, staged.offset + part.offset, part.shape, box, dtype, target, item.offset)

    def _give(self, chunk: int, target: B, offset: int) -> None:
        """A whole chunk, as bytes."""
        staged = self._slabs[chunk]
        self._copy(staged.buffer, staged.offset, self._plan.chunks[chunk].nbytes, target, offset)

    def _copy(self, source: B, offset: int, nbytes: int, target: B, at: int) -> None:
        self._mover.pack(source, offset, (nbytes,), Region.whole((nbytes,)), DTYPES["U8"], target, at)

    def _tell(self, number: int, error: Optional[BaseException], wait: bool = False) -> None:
        """Hear how all fared before, and tell how this rank does; see the module for who waits to hear of that."""
        self._hear()
        with self._trace.span("status", round=number):
            self._verdict = start_status(self._transport, error)
            if wait or number == 0 or not self._transport.traits.overlaps:
                self._hear()

    def _hear(self) -> None:
        """Raise what any rank told last; all ranks do."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            self.in_step = True
            verdict()
            self.in_step = False

    def _start(self, number: int, current: RankRound, error: Optional[BaseException]) -> Optional[BaseException]:
        """Start the exchange and place what is this rank's own; an error of a sink is returned for the next status.

        `error`: why there is nothing to place; the others, who have not heard of it yet, start the exchange too.
        """
        handles: list[Handle] = []
        self._flights.append(_Flight(number, current, handles))
        buffers = self._of(number)
        with self._trace.span("start", round=number):
            if current.exchanges:
                send, receive = buffers["send"], buffers["receive"]
                handles.append(
                    self._transport.start_all_to_all(send, current.send_counts, receive, current.receive_counts)
                )
            for place, gather in enumerate(current.gathers):
                give, into = buffers[f"give {place}"], buffers[f"gather {place}"]
                if gather.root == EVERYBODY:
                    handles.append(self._transport.start_all_gather(give, gather.share, into, gather.ranks))
                else:
                    handles.append(self._transport.start_broadcast(into, gather.nbytes, gather.root, gather.ranks))
        error = error or (None if number else self._place_local())
        return error or self._place_own(number, current)

    def _land(self) -> Optional[BaseException]:
        """Wait for the oldest exchange, place what came, and finish; an error of a sink is returned."""
        number, current, handles = self._flights[0]
        with self._trace.span("exchange", round=number, nbytes=sum(current.receive_counts)):
            for handle in handles:
                handle.wait()
        del self._flights[0]
        error = self._send_on(number, current.spread) if current.spread is not None else None
        error = error or self._place(number, current) or self._finish(number, self._complete.get(number, ()))
        self._slabs.release(number)
        return error

    def _drain(self) -> None:
        """After an error: buffers of an exchange that all have started must stay until it is over."""
        for flight in self._flights:
            for handle in flight.handles:
                with suppress(TransportError):
                    handle.wait()
        self._flights.clear()

    def _send_on(self, number: int, spread: SecondHop) -> Optional[BaseException]:
        """Send on what this rank carries for others of its server. They wait for it: an error comes after that."""
        buffers = self._of(number)
        send, late = buffers["send on"], buffers["late"]
        with self._trace.span("send on", round=number, nbytes=sum(spread.send_counts)):
            with _Step() as step:
                for forward in spread.outgoing:
                    self._copy(buffers["receive"], forward.source, forward.nbytes, send, forward.target)
            self._transport.start_all_to_all(send, spread.send_counts, late, spread.receive_counts).wait()
        return step.error

    def _place_own(self, number: int, current: RankRound) -> Optional[BaseException]:
        with _Step() as step, self._trace.span("place own", round=number):
            for part, delivery, offset, _ in current.own:
                staged = self._slabs[part.chunk]
                at, box = staged.offset + offset, delivery.in_part
                self._place_one(_landing(part, delivery), staged.buffer, at, part.shape, box)
        return step.error

    def _place_local(self) -> Optional[BaseException]:
        """Place what this rank takes of its own memory."""
        with _Step() as step, self._trace.span("place local"):
            for piece in self._slabs.local:
                landing = _Landing(piece.demand, piece.dtype, piece.in_target, piece.view, piece.into)
                self._place_one(landing, self._slabs.held(piece.name), 0, piece.shape, piece.in_source)
        return step.error

    def _place_one(self, to: _Landing, buffer: B, offset: int, shape: Shape, box: Region) -> None:
        """Place a box of the array of `shape` at byte `offset` of a buffer."""
        if to.into:
            self._computing[to.demand].place(to.into, buffer, offset, shape, box, to.dtype, to.region, to.view)
        else:
            self._sinks[to.demand].place(buffer, offset, shape, box, to.region, to.view)

    def _place(self, number: int, current: RankRound) -> Optional[BaseException]:
        with _Step() as step, self._trace.span("place", round=number):
            gathered = [(gather.items, f"gather {place}") for place, gather in enumerate(current.gathers)]
            for items, name in ((current.incoming, "receive"), (current.late, "late"), *gathered):
                if not items:
                    continue
                buffer = self._of(number)[name]
                for part, delivery, offset, _ in items:
                    shape = part.shape if part.gathered else delivery.in_part.shape
                    box = Region((0,) * len(shape), shape)
                    self._place_one(_landing(part, delivery), buffer, offset, shape, box)
        return step.error

    def _finish(self, number: int, demands: Sequence[int]) -> Optional[BaseException]:
        """Finish the sinks that have all their pieces, and pass them on to be digested."""
        with _Step() as step, self._trace.span("finish", round=number):
            for demand in demands:
                if demand in self._computing:
                    self._computing.pop(demand).finish()
                self._sinks[demand].finish()
                if self._digester is not None:
                    self._digester.add(demand, self._sinks[demand].contents())
        return step.error

    def _without_pieces(self) -> list[int]:
        """The demands of this rank of which nothing is read: they are computed from nothing."""
        finished = {demand for demands in self._complete.values() for demand in demands}
        return [demand for demand in self._sinks if demand not in finished]

    def _await_digests(self) -> Optional[BaseException]:
        with _Step() as step:
            if self._digester is not None:
                with self._trace.span("wait for digests"):
                    self._digester.wait()
        return step.error

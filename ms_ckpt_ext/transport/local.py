"""Ranks as threads of one process: the transport of a single process, and the world in which plans are tested.

Every exchange is a meeting, numbered per rank by the order of its calls. A rank lays a reference to its buffer down
when it starts, and takes what it wants from the others' buffers when it waits; nothing is copied on the way. It leaves
the meeting when everybody has taken theirs, so a buffer may be overwritten after `wait()` and not before, as on a
device. The first failure ends the world: whoever waits, or comes later, is told at once whose it was.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Generic, NoReturn, Optional, TypeVar

import numpy as np

from ms_ckpt_ext.errors import PeerError, TransportError, UsageError, name_ranks
from ms_ckpt_ext.transport.base import HOST_TRAITS, Bytes, Handle, check_counts, flat_bytes, offsets

_T = TypeVar("_T")


@dataclass
class _Meeting:
    """One exchange: what it is, what each rank brought, and how many have taken theirs."""

    call: str
    opened_by: int
    brought: dict[int, Any] = field(default_factory=dict)
    taken: int = 0


class LocalWorld:
    """`size` ranks in this process.

    Args:
        timeout: seconds that a rank waits for the others in one exchange.

    Attributes:
        errors: rank -> what it raised, of the last `run`.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        if size < 1:
            raise UsageError(f"a world has at least one rank, not {size}")
        self.size = size
        self.timeout = timeout
        self.errors: dict[int, BaseException] = {}
        self._changed = threading.Condition()
        self._meetings: dict[int, _Meeting] = {}
        self._left: set[int] = set()
        self._failure: Optional[tuple[int, BaseException]] = None

    def transport(self, rank: int) -> LocalTransport:
        """The end of `rank`; make one per rank."""
        return LocalTransport(self, rank)

    def run(self, fn: Callable[[LocalTransport], _T]) -> list[_T]:
        """Run `fn(transport)` on every rank, each in a thread, and return their results in rank order.

        Raises:
            what the first rank that failed raised; `errors` has the others' too. A world that failed stays failed.
        """
        results: dict[int, _T] = {}
        ended: set[int] = set()
        self.errors = {}
        self._left.clear()

        def work(rank: int) -> None:
            try:
                results[rank] = fn(self.transport(rank))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                self.errors[rank] = error
                self.abort(rank, error)
            self.leave(rank)
            with self._changed:
                ended.add(rank)
                self._changed.notify_all()

        for rank in range(self.size):
            threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: len(ended) == self.size or self._failure is not None)
            # Whoever is in an exchange now leaves it at once. One that is stuck elsewhere cannot be stopped; it is
            # waited for a little, because the cause is worth more than its company.
            self._changed.wait_for(lambda: len(ended) == self.size, self.timeout)
        if self._failure:
            raise self._failure[1]
        return [results[rank] for rank in range(self.size)]

    def abort(self, rank: int, error: BaseException) -> None:
        """End the world because of `rank`: every other rank raises PeerError from its present or next exchange."""
        with self._changed:
            self._failure = self._failure or (rank, error)
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        """`rank` makes no more calls."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()

    def bring(self, rank: int, number: int, call: str, item: Any) -> _Meeting:
        """Come to meeting `number` and lay `item` down; does not wait."""
        with self._changed:
            self._check(rank)
            meeting = self._meetings.setdefault(number, _Meeting(call, rank))
            if meeting.call != call:
                opener = f"rank {meeting.opened_by} called {meeting.call}"
                self._fail(rank, f"exchange {number}: rank {rank} called {call} where {opener}")
            meeting.brought[rank] = item
            self._changed.notify_all()
            return meeting

    def meet(self, rank: int, number: int, meeting: _Meeting, take: Callable[[list[Any]], _T]) -> _T:
        """Wait until everybody is there, `take` from what they brought, and wait until everybody has taken."""
        self._wait(rank, meeting, lambda: len(meeting.brought) == self.size)
        taken = take([meeting.brought[peer] for peer in range(self.size)])
        with self._changed:
            meeting.taken += 1
            self._changed.notify_all()
        self._wait(rank, meeting, lambda: meeting.taken == self.size)
        with self._changed:
            self._meetings.pop(number, None)
        return taken

    def _wait(self, rank: int, meeting: _Meeting, ready: Callable[[], bool]) -> None:
        def missing() -> list[int]:
            return [peer for peer in range(self.size) if peer not in meeting.brought]

        def settled() -> bool:
            return ready() or self._failure is not None or not self._left.isdisjoint(missing())

        with self._changed:
            self._changed.wait_for(settled, self.timeout)
            if ready():
                return
            self._check(rank)
            gone = sorted(self._left.intersection(missing()))
            why = f"{name_ranks(gone)} ended before" if gone else f"waited {self.timeout:g} s"
            self._fail(rank, f"rank {rank} is in {meeting.call} and {name_ranks(missing())} did not come ({why})")

    def _check(self, rank: int) -> None:
        if self._failure and self._failure[0] != rank:
            peer, error = self._failure
            raise PeerError(f"rank {peer} failed with {type(error).__name__}: {error}", peer) from error
        if self._failure:
            raise TransportError(f"rank {rank} has failed before; make a new world") from self._failure[1]

    def _fail(self, rank: int, message: str) -> NoReturn:
        error = TransportError(f"{message}; all ranks must make the same calls in the same order")
        self.abort(rank, error)
        raise error


class _LocalHandle(Generic[_T]):
    """An exchange whose meeting this rank has come to."""

    def __init__(self, finish: Callable[[], _T]) -> None:
        self._finish: Optional[Callable[[], _T]] = finish

    def wait(self) -> None:
        """Take what the others brought; a second call does nothing."""
        if self._finish is not None:
            self.result()

    def result(self) -> _T:
        """Same, once, with what was taken."""
        finish, self._finish = self._finish, None
        assert finish is not None
        return finish()


class LocalTransport:
    """One rank of a `LocalWorld`; `LocalTransport()` is a process on its own.

    Attributes:
        collectives: name of the call -> how often this rank made it.
        sent: bytes this rank gave to other ranks in bulk exchanges.
    """

    traits = HOST_TRAITS

    def __init__(self, world: Optional[LocalWorld] = None, rank: int = 0) -> None:
        self._world = world or LocalWorld(1)
        self.rank = rank
        self.size = self._world.size
        self.collectives: Counter[str] = Counter()
        self.sent = 0
        self._calls = 0

    def allocate(self, nbytes: int) -> Bytes:
        """An array of `nbytes` bytes."""
        return np.empty(nbytes, np.uint8)

    def upload(self, host: Bytes, buffer: Bytes, offset: int) -> None:
        """Copy `host` into `buffer`; nothing is copied where it already lies there."""
        source, target = flat_bytes(host), buffer[offset : offset + host.nbytes]
        if target.nbytes != source.nbytes:
            raise UsageError(f"{source.nbytes} bytes at offset {offset} do not fit into a buffer of {buffer.nbytes}")
        if source.ctypes.data != target.ctypes.data:
            np.copyto(target, source)

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        return self._start("share", payload, list).result()

    def start_all_gather(self, send: Bytes, counts: Sequence[int], recv: Bytes) -> Handle:
        """See `Transport`."""
        check_counts("all_gather", counts, self.size, "recv", recv.nbytes)
        check_counts("all_gather", [counts[self.rank]], 1, "send", send.nbytes)
        self.sent += counts[self.rank] * (self.size - 1)

        def take(brought: list[Bytes]) -> None:
            for start, count, theirs in zip(offsets(counts), counts, brought):
                recv[start : start + count] = theirs[:count]

        # The counts are part of the call: ranks that disagree on them get an error instead of shifted bytes.
        return self._start(f"all_gather {list(counts)}", send, take)

    def start_all_to_all(
        self, send: Bytes, send_counts: Sequence[int], recv: Bytes, recv_counts: Sequence[int]
    ) -> Handle:
        """See `Transport`."""
        check_counts("all_to_all", send_counts, self.size, "send", send.nbytes)
        check_counts("all_to_all", recv_counts, self.size, "recv", recv.nbytes)
        self.sent += sum(send_counts) - send_counts[self.rank]
        starts = offsets(send_counts)
        mine = [send[start : start + count] for start, count in zip(starts, send_counts)]

        def take(brought: list[list[Bytes]]) -> None:
            for peer, (start, count) in enumerate(zip(offsets(recv_counts), recv_counts)):
                piece = brought[peer][self.rank]
                if piece.nbytes != count:
                    raise TransportError(
                        f"all_to_all: rank {self.rank} expects {count} bytes of rank {peer}, which sends {piece.nbytes}"
                    )
                recv[start : start + count] = piece

        return self._start("all_to_all", mine, take)

    def close(self) -> None:
        """No more calls by this rank; others that wait for it are told."""
        self._world.leave(self.rank)

    def _start(self, call: str, item: Any, take: Callable[[list[Any]], _T]) -> _LocalHandle[_T]:
        number, self._calls = self._calls, self._calls + 1
        self.collectives[call.split()[0]] += 1
        meeting = self._world.bring(self.rank, number, call, item)
        return _LocalHandle(lambda: self._world.meet(self.rank, number, meeting, take))

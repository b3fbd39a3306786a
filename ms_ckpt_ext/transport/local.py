"""Ranks as threads of one process: the transport of a single process, and the world in which plans are tested.

Every exchange is a meeting, numbered per rank by the order of its calls. A rank leaves a reference to its buffer when
it starts, and takes what it needs from the others' buffers when it waits; nothing is copied in between. It leaves
the meeting when all have taken their part, so a buffer may be overwritten after `wait()` and not before, as on a
device. The first failure ends the world: every rank that waits, or comes later, is told at once whose it was.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Generic, NoReturn, Optional, TypeVar

import numpy as np

from ms_ckpt_ext.errors import PeerError, TransportError, UsageError, name_ranks, named
from ms_ckpt_ext.transport.base import (
    Bytes,
    Handle,
    Ranks,
    TransportTraits,
    check_counts,
    check_members,
    check_room,
    flat_bytes,
    offsets,
)
from ms_ckpt_ext.transport.select import lent

_T = TypeVar("_T")


@dataclass
class _Meeting:
    """One exchange: its call, its members, what each rank brought, and how many have taken their part."""

    call: str
    opened_by: int
    members: Ranks
    brought: dict[int, Any] = field(default_factory=dict)
    taken: int = 0


class LocalWorld:
    """`size` ranks in this process.

    Args:
        timeout: seconds that a rank waits for the others in one exchange.

    Attributes:
        errors: rank -> what it raised in the last `run`.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        if size < 1:
            raise UsageError(f"a world has at least one rank, not {size}")
        self.size = size
        self.timeout = timeout
        self.errors: dict[int, BaseException] = {}
        self._changed = threading.Condition()
        self._meetings: dict[tuple[Ranks, int], _Meeting] = {}
        self._left: set[int] = set()
        self._failure: Optional[tuple[int, BaseException]] = None

    def transport(self, rank: int) -> LocalTransport:
        """The end of `rank`; make one per rank."""
        return LocalTransport(self, rank)

    def run(self, fn: Callable[[LocalTransport], _T]) -> list[_T]:
        """Run `fn(transport)` on every rank, each in a thread, and return their results in rank order.

        Inside `fn`, `select_transport` returns this rank's transport as well, and closing that has no effect.

        Raises:
            what the first rank that failed raised; `errors` has the others' too. A world that failed stays failed.
            StorageError: the system gives a rank no thread, or no memory for one.
        """
        results: dict[int, _T] = {}
        ended: set[int] = set()
        self.errors = {}
        self._left.clear()

        def work(rank: int) -> None:
            try:
                transport = self.transport(rank)
                with lent(_Lent(transport)):
                    results[rank] = fn(transport)
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                self.errors[rank] = error
                self.abort(rank, error)
            self.leave(rank)
            with self._changed:
                ended.add(rank)
                self._changed.notify_all()

        begun = 0
        try:
            while begun < self.size:
                threading.Thread(target=work, args=(begun,), name=f"rank {begun}", daemon=True).start()
                begun += 1
        except (RuntimeError, MemoryError) as error:
            self.abort(begun, named(error, f"start a thread for rank {begun}"))
        with self._changed:
            self._changed.wait_for(lambda: len(ended) == begun or self._failure is not None)
            # A rank that is in an exchange now leaves it at once. One that is stuck elsewhere cannot be stopped; it is
            # waited for at most `timeout`, so that the cause is raised even if it never ends.
            self._changed.wait_for(lambda: len(ended) == begun, self.timeout)
        if self._failure:
            raise self._failure[1]
        return [results[rank] for rank in range(self.size)]

    def abort(self, rank: int, error: BaseException) -> None:
        """End the world because of `rank`: every other rank raises PeerError in its present or next exchange."""
        with self._changed:
            self._failure = self._failure or (rank, error)
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        """`rank` makes no more calls."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()

    def bring(self, rank: int, members: Ranks, number: int, call: str, item: Any) -> _Meeting:
        """Come to meeting `number` of these ranks and leave `item` there; does not wait."""
        with self._changed:
            self._check(rank)
            meeting = self._meetings.setdefault((members, number), _Meeting(call, rank, members))
            if meeting.call != call:
                opener = f"rank {meeting.opened_by} called {meeting.call}"
                self._fail(rank, f"exchange {number}: rank {rank} called {call} where {opener}")
            meeting.brought[rank] = item
            self._changed.notify_all()
            return meeting

    def meet(self, rank: int, number: int, meeting: _Meeting, take: Callable[[list[Any]], _T]) -> _T:
        """Wait until all members are there, `take` from what they brought, and wait until all have taken."""
        members = meeting.members
        self._wait(rank, meeting, lambda: len(meeting.brought) == len(members))
        taken = take([meeting.brought[peer] for peer in members])
        with self._changed:
            meeting.taken += 1
            self._changed.notify_all()
        self._wait(rank, meeting, lambda: meeting.taken == len(members))
        with self._changed:
            self._meetings.pop((members, number), None)
        return taken

    def _wait(self, rank: int, meeting: _Meeting, ready: Callable[[], bool]) -> None:
        def missing() -> list[int]:
            return [peer for peer in meeting.members if peer not in meeting.brought]

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
        """As `wait`, once; returns what was taken."""
        finish, self._finish = self._finish, None
        assert finish is not None
        return finish()


class LocalTransport:
    """One rank of a `LocalWorld`; `LocalTransport()` is a process on its own."""

    traits = TransportTraits(overlaps=True, groups=True)

    def __init__(self, world: Optional[LocalWorld] = None, rank: int = 0) -> None:
        self._world = world or LocalWorld(1)
        self.rank = rank
        self.size = self._world.size
        self._calls: Counter[Ranks] = Counter()

    def allocate(self, nbytes: int) -> Bytes:
        """An array of `nbytes` bytes."""
        return np.empty(nbytes, np.uint8)

    def pinned(self, nbytes: int) -> Bytes:
        """As `allocate`: there is no device."""
        return self.allocate(nbytes)

    def upload(self, host: Bytes, buffer: Bytes, offset: int) -> None:
        """Copy `host` into `buffer`, unless it lies there already."""
        source, target = flat_bytes(host), buffer[offset : offset + host.nbytes]
        if target.nbytes != source.nbytes:
            raise UsageError(f"{source.nbytes} bytes at offset {offset} do not fit into a buffer of {buffer.nbytes}")
        if source.ctypes.data != target.ctypes.data:
            np.copyto(target, source)

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        return self.start_share(payload)()

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """See `Transport`."""
        return self._start("share", payload, list).result

    def free_bytes(self) -> int:
        """Not known."""
        return 0

    def prove(self) -> None:
        """Nothing to prove: ranks are threads, and copy from each other's memory."""

    def start_all_gather(self, send: Bytes, nbytes: int, recv: Bytes, group: Ranks = ()) -> Handle:
        """See `Transport`."""
        members = check_members("all_gather", group, self.size, self.rank)
        check_room("all_gather", nbytes, "send", send.nbytes)
        check_room("all_gather", nbytes * len(members), "recv", recv.nbytes)

        def take(brought: list[Bytes]) -> None:
            for number, theirs in enumerate(brought):
                recv[number * nbytes : (number + 1) * nbytes] = theirs[:nbytes]

        # The size is part of the call: ranks that disagree on it get an error instead of shifted bytes.
        return self._start(f"all_gather of {nbytes} bytes each", send, take, members)

    def start_broadcast(self, buffer: Bytes, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """See `Transport`."""
        members = check_members("broadcast", group, self.size, self.rank, root)
        check_room("broadcast", nbytes, "buffer", buffer.nbytes)

        def take(brought: list[Bytes]) -> None:
            if self.rank != root:
                buffer[:nbytes] = brought[members.index(root)][:nbytes]

        return self._start(f"broadcast of {nbytes} bytes from rank {root}", buffer, take, members)

    def start_all_to_all(
        self, send: Bytes, send_counts: Sequence[int], recv: Bytes, recv_counts: Sequence[int]
    ) -> Handle:
        """See `Transport`."""
        check_counts("all_to_all", send_counts, self.size, "send", send.nbytes)
        check_counts("all_to_all", recv_counts, self.size, "recv", recv.nbytes)
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
        """This rank makes no more calls; others that wait for it are told."""
        self._world.leave(self.rank)

    def _start(self, call: str, item: Any, take: Callable[[list[Any]], _T], members: Ranks = ()) -> _LocalHandle[_T]:
        members = members or tuple(range(self.size))
        number = self._calls[members]
        self._calls[members] += 1
        meeting = self._world.bring(self.rank, members, number, call, item)
        return _LocalHandle(lambda: self._world.meet(self.rank, number, meeting, take))


class _Lent(LocalTransport):
    """The same end of the same world, for code that opens and closes transports of its own."""

    def __init__(self, transport: LocalTransport) -> None:
        self.__dict__ = transport.__dict__

    def close(self) -> None:
        """Nothing: the rank stays in its world."""

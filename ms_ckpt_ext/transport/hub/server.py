"""Where ranks meet: a thread that one of them runs. See `control` and `gate`; `frames` for the messages.

No peer can block it: it waits for none, neither to say who it is nor to read what it is sent; strangers are turned
away in time; when it may open no more files it goes on with those it has, and tries again later. If it ends, its
connections close, from which all ranks learn it.
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Callable, Optional

from ms_ckpt_ext.errors import name_ranks
from ms_ckpt_ext.transport.hub.descriptors import make_room
from ms_ckpt_ext.transport.hub.frames import BYE, FRAME, GONE, HERE, LATE, PING, TELL, Malformed, Message, frame
from ms_ckpt_ext.transport.hub.limits import DEFAULT, PULSES, ControlLimits
from ms_ckpt_ext.transport.hub.peer import Peer, tune, why_gone, why_silent
from ms_ckpt_ext.transport.hub.reduction import Reduction, Reply
from ms_ckpt_ext.transport.rendezvous.greeting import Door

_LOOK_SECONDS = 1.0
"""How often the hub checks whether it should end, unless something else is due earlier."""
_RETRY_SECONDS = 0.1
"""How long it accepts no connection after it could open no file."""
_PING = frame(PING)
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Hub:
    """A thread that reduces what ranks send, and answers all; it tells all when one is gone or late.

    Args:
        size: number of ranks expected.
        timeout: seconds that ranks that have come wait for the others.
        server: where they connect; owned by the hub from here on.
        token: what they have to know.
        keeper: the rank whose process this is.
        limits: see there.
        look: called now and then with the ranks that never came, while others wait for them; returns a message when it
            is known that not all of them will come. An empty one: they do not belong to this meeting, which goes on
            without them.

    Raises:
        TransportError: this process may not open that many files.
    """

    def __init__(
        self,
        size: int,
        timeout: float,
        server: socket.socket,
        token: str,
        keeper: int = 0,
        limits: ControlLimits = DEFAULT,
        look: Optional[Callable[[Sequence[int]], Optional[str]]] = None,
    ) -> None:
        self._token = token
        self._size = size
        self._timeout = timeout
        self._server = server
        self._keeper = keeper
        self._limits = limits
        self._look_for = look
        self._longest = limits.answer_bytes(size) + FRAME.size
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[Peer, None] = {}  # in the order in which they came
        self._peers: dict[int, Peer] = {}
        self._greeted: set[int] = set()
        self._left: dict[int, str] = {}
        self._share: Optional[Reduction] = None
        self._since = 0.0
        self._broken: Optional[bytes] = None
        self._failed: list[Peer] = []  # at sending
        self._accepts_at: Optional[float] = None
        self._pulse_at = time.monotonic() + limits.pulse_seconds(size)
        self._ends_at: Optional[float] = None
        try:
            make_room(size, limits.strangers + size)
        except BaseException:
            server.close()
            raise
        server.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="ms_ckpt_ext hub", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until every rank has left."""
        self._thread.join(timeout)

    def stop(self) -> None:
        """End within a second, even if ranks have not left, and at once when none waits: the meeting is over."""
        self._ends_at = time.monotonic() + _LOOK_SECONDS

    def _serve(self) -> None:
        try:
            self._selector.register(self._server, selectors.EVENT_READ)
            while len(self._left) < self._size and not self._stopped():
                for key, events in self._selector.select(self._pause()):
                    if isinstance(key.data, Peer):
                        self._attend(key.data, events)
                    else:
                        self._accept()
                self._look_around()
        finally:
            for peer in [*self._strangers, *self._peers.values()]:
                peer.close()
            self._server.close()
            self._selector.close()

    def _stopped(self) -> bool:
        waited_for = self._share is not None and self._broken is None
        return self._ends_at is not None and not (waited_for and time.monotonic() < self._ends_at)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as error:
            if error.errno in _NO_MORE_FILES:
                self._selector.unregister(self._server)
                self._accepts_at = time.monotonic() + _RETRY_SECONDS
            return  # for any other error: the peer has gone meanwhile
        tune(connection, self._limits)
        door = Door(self._token, self._keeper, self._size)
        peer = Peer(connection, self._selector, door, time.monotonic(), 2 * self._longest)
        self._strangers[peer] = None
        if len(self._strangers) > self._limits.strangers + self._size - len(self._greeted):
            self._forget(next(iter(self._strangers)))
        self._send(peer, door.hail)

    def _attend(self, peer: Peer, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                peer.written()
            if events & selectors.EVENT_READ:
                self._read(peer)
        except (OSError, Malformed) as error:
            self._lost(peer, peer.error or error)

    def _read(self, peer: Peer) -> None:
        received = peer.receive()
        if not received:
            self._lost(peer, peer.error)
        elif peer.rank is not None or self._greet(peer):
            for said in peer.frames(self._longest):
                self._hear(peer, said)

    def _greet(self, peer: Peer) -> bool:
        """Whether this is a rank of the job, which may have sent more already."""
        rank = peer.ask()
        if rank is None:
            return False
        reply, welcome = peer.door.answer(rank in self._greeted)
        self._send(peer, reply)
        if not welcome:
            self._forget(peer)
            return False
        del self._strangers[peer]
        self._greeted.add(rank)
        self._peers[rank] = peer
        peer.rank = rank
        if self._broken is not None:
            self._send(peer, self._broken)
        return True

    def _hear(self, peer: Peer, said: Message) -> None:
        assert peer.rank is not None
        if said.kind == BYE:
            self._left[peer.rank] = f"rank {peer.rank} has left: its transport was closed before"
        elif said.kind != HERE and self._broken is None:  # else it has been told
            self._shared(peer.rank, said)
        if self._share is not None and self._left:
            first = min(self._left)
            self._break(GONE, first, self._left[first])

    def _shared(self, rank: int, said: Message) -> None:
        if self._share is None:
            self._share = Reduction(self._size, self._limits.answer_bytes(self._size))
            self._since = time.monotonic()
        reply = self._share.take(rank, said)
        if reply is not None:
            self._reply(reply)

    def _reply(self, reply: Reply) -> None:
        if reply.ranks is None:
            self._share = None
            self._tell_all(reply.message)
        else:
            self._since = time.monotonic()
            for rank in reply.ranks:
                self._send(self._peers[rank], reply.message)

    def _look_around(self) -> None:
        """Do what is due now: report late ranks, drop strangers, accept connections again, pulse."""
        now = time.monotonic()
        if self._share is not None and self._broken is None and now - self._since > self._timeout:
            self._break(LATE, 0, self._late(self._share.awaited()))
        if self._look_for is not None and self._share is not None and self._broken is None:
            self._look_for_ended(self._look_for)
        while self._strangers and now - next(iter(self._strangers)).since > self._limits.greeting_seconds:
            self._forget(next(iter(self._strangers)))
        if self._accepts_at is not None and now >= self._accepts_at:
            self._accepts_at = None
            self._selector.register(self._server, selectors.EVENT_READ)
        if now >= self._pulse_at:
            self._pulse_at = now + self._limits.pulse_seconds(self._size)
            self._pulse()
        failed, self._failed = self._failed, []
        for peer in failed:
            self._lost(peer, peer.error)

    def _look_for_ended(self, look: Callable[[Sequence[int]], Optional[str]]) -> None:
        assert self._share is not None
        never = [rank for rank in self._share.awaited() if rank not in self._greeted]
        why = look(never) if never else None
        if why:
            self._break(GONE if len(never) == 1 else LATE, never[0], why)
        elif why is not None:
            for rank in never:
                self._shared(rank, Message(TELL, rank, b""))

    def _pulse(self) -> None:
        """Ask quiet ranks for a sign of life; one that has given none for long breaks the job."""
        silent = []
        for rank, peer in self._peers.items():
            peer.quiet += 1
            if peer.quiet >= PULSES:
                silent.append(rank)
            elif peer.quiet > 1:
                self._send(peer, _PING)
        if silent:
            seconds = self._limits.stopped_within(self._size)
            why = why_silent(sorted(silent), seconds)
            self._break(GONE if len(silent) == 1 else LATE, min(silent), why)
            self._left.update(dict.fromkeys(silent, why))  # given up: the hub ends when the others have left

    def _pause(self) -> float:
        """Seconds until the next look around."""
        now = time.monotonic()
        due = [_LOOK_SECONDS, self._pulse_at - now]
        if self._ends_at is not None:
            due.append(self._ends_at - now)
        if self._share is not None and self._broken is None:
            due.append(self._since + self._timeout - now)
            due.append(_LOOK_SECONDS if self._look_for is None else _LOOK_SECONDS / 4)
        if self._strangers:
            due.append(next(iter(self._strangers)).since + self._limits.greeting_seconds - now)
        if self._accepts_at is not None:
            due.append(self._accepts_at - now)
        return max(0.0, min(due))

    def _late(self, missing: Sequence[int]) -> str:
        never = [rank for rank in missing if rank not in self._greeted]
        deaf = [rank for rank in missing if rank in self._peers and self._peers[rank].unread]
        who = f"{name_ranks(never)} " if never != missing else ""
        why = (
            f"and {who}never did before: ended, or busy with something else?"
            if never
            else "though alive; what keeps them?"
        )
        stuck = f" ({name_ranks(deaf)} did not even read the last answer)" if deaf else ""
        full = "; this process can open no more files (ulimit -n)" if self._accepts_at is not None else ""
        return f"{name_ranks(missing)} did not come within {self._timeout:g} s, {why}{stuck}{full} Look at their logs"

    def _forget(self, stranger: Peer) -> None:
        self._strangers.pop(stranger, None)
        stranger.close()

    def _lost(self, peer: Peer, error: Optional[Exception]) -> None:
        peer.close()
        self._strangers.pop(peer, None)
        if peer.rank is None or self._peers.pop(peer.rank, None) is None or peer.rank in self._left:
            return
        self._left[peer.rank] = why_gone(peer.rank, error, self._limits)
        self._break(GONE, peer.rank, self._left[peer.rank])

    def _break(self, kind: bytes, rank: int, why: str) -> None:
        """Tell all ranks once, and those that come later: none is waited for any more."""
        if self._broken is None:
            self._broken = frame(kind, rank, why.encode())
            self._tell_all(self._broken)

    def _tell_all(self, message: bytes) -> None:
        for rank in sorted(self._peers, reverse=True):  # this process last, as the message may end it
            self._send(self._peers[rank], message)

    def _send(self, peer: Peer, message: bytes) -> None:
        peer.send(message)
        if peer.error is not None:
            self._failed.append(peer)

"""A process's connection to a hub: it sends a payload, and gets all ranks'; or hears which are gone. See `hub`."""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
from functools import partial
from typing import Callable, Optional

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.base import SAME_VERSION
from ms_ckpt_ext.transport.hub.frames import (
    ALIKE,
    ALL,
    BYE,
    GATHER,
    GIVE,
    GONE,
    HERE,
    LATE,
    NOTED,
    PING,
    TELL,
    Malformed,
    Message,
    decode_answer,
    frame,
    note_of,
    take_frames,
)
from ms_ckpt_ext.transport.hub.limits import DEFAULT, PULSES, ControlLimits
from ms_ckpt_ext.transport.hub.peer import tune, why_gone, why_silent
from ms_ckpt_ext.transport.rendezvous.search import Arrival

_HERE = frame(HERE)
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""A selector that needs no descriptor of its own, and accepts any."""
_LONGEST_SECONDS = 1e6
"""The operating system accepts at most 24 days as a socket's timeout."""


class Line:
    """One rank's end.

    Args:
        rank, size: among the ranks that meet.
        timeout: seconds that the hub waits for ranks that do not come. A hub that is silent for longer is given up.
        limits: see there; the hub has the same.
    """

    def __init__(self, rank: int, size: int, timeout: float, limits: ControlLimits = DEFAULT) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.limits = limits
        self._failure: Optional[TransportError] = None
        self._answers: queue.Queue[Optional[Message]] = queue.Queue()
        self._closed = False
        self._socket: Optional[socket.socket] = None
        self._listener: Optional[threading.Thread] = None
        self._keeper = 0
        self._sending = threading.Lock()

    def attach(self, arrival: Arrival) -> None:
        """Go on with a connection to a hub that has let this rank in; it is this line's from here on."""
        connection, self._keeper, received = arrival
        tune(connection, self.limits)
        # For a hub that does not read.
        connection.settimeout(min(self.timeout + self.limits.slack_seconds, _LONGEST_SECONDS))
        self._socket = connection
        self._listener = threading.Thread(
            target=self._listen, args=(connection, bytearray(received)), name="ms_ckpt_ext control", daemon=True
        )
        self._listener.start()

    def share(self, payload: bytes, doing: str = "share") -> list[bytes]:
        """Every rank's payload in rank order. Raises PeerError or TransportError; `doing` is for their messages."""
        return self.start_share(payload, doing)()

    def start_share(self, payload: bytes, doing: str = "share") -> Callable[[], list[bytes]]:
        """Send a payload; the function returned waits for the answer, and raises as `share`. One at a time."""
        self.check(doing)
        short = len(payload) <= self.limits.told_bytes(self.size)
        self._send(frame(TELL, self.rank, payload) if short else frame(NOTED, self.rank, note_of(payload)))
        return partial(self._answered, payload, doing)

    def _answered(self, payload: bytes, doing: str) -> list[bytes]:
        while True:
            answer = self._next(doing)
            if answer.kind == ALIKE:
                return [payload] * self.size
            if answer.kind == ALL:
                return self._decoded(answer.body)
            if answer.kind == GATHER:
                return self._gather(payload)
            self._send(frame(GIVE, self.rank, payload))  # it was asked for

    def _decoded(self, body: bytes) -> list[bytes]:
        try:
            return decode_answer(body)
        except Malformed as error:
            raise TransportError(f"rank {self._keeper} told {error}; {SAME_VERSION}") from None

    def check(self, doing: str) -> None:
        """Raise if the job is known to be broken."""
        if self._failure is not None:
            message = f"rank {self.rank}, in {doing}: {self._failure}"
            if isinstance(self._failure, PeerError):
                raise PeerError(message, self._failure.rank)
            raise TransportError(message)

    def close(self) -> None:
        """Leave; a rank that waits for this one in `share` is told. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._socket is None or self._listener is None:
            return
        with contextlib.suppress(OSError), self._sending:  # the hub is gone already
            self._socket.settimeout(self.limits.grace_seconds)
            self._socket.sendall(frame(BYE, self.rank))
            self._socket.shutdown(socket.SHUT_WR)
        self._listener.join(self.limits.grace_seconds)

    def _gather(self, payload: bytes) -> list[bytes]:
        """Share what is too large for a hub; a plain line cannot."""
        raise TransportError(f"rank {self.rank}: {len(payload)} bytes cannot be shared before the backend is there")

    def _send(self, message: bytes) -> None:
        assert self._socket is not None
        try:
            with self._sending:
                self._socket.sendall(message)
        except OSError as error:
            if _is_late(error):
                self._failure = self._failure or self._silent()
                self._answers.put(None)
            # else the hub is gone: the listener knows, or will in a moment

    def _next(self, doing: str) -> Message:
        """The hub's next message. What came before bad news still counts."""
        try:
            answer = self._answers.get(timeout=self.timeout + self.limits.slack_seconds)
        except queue.Empty:
            answer = None
            self._failure = self._failure or self._silent()
        if answer is None:
            self.check(doing)
        assert answer is not None
        return answer

    def _silent(self) -> TransportError:
        return TransportError(
            f"rank {self._keeper}, which hears the others and answers them, was silent for {self.timeout:g} s: its "
            "process was stopped, or does not let its threads run"
        )

    def _listen(self, connection: socket.socket, received: bytearray) -> None:
        """Thread: receive what the hub sends until it or this rank leaves, or the hub is silent for too long."""
        error: Optional[Exception] = None
        try:
            with _Selector() as selector:
                selector.register(connection, selectors.EVENT_READ)
                self._take(received)
                while self._comes(selector) and (chunk := connection.recv(1 << 16)):
                    received += chunk
                    self._take(received)
        except (OSError, Malformed) as problem:
            error = problem
        self._break(GONE, self._keeper, why_gone(self._keeper, error, self.limits))
        with contextlib.suppress(OSError):  # a thread that sends something meanwhile is woken
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _comes(self, selector: selectors.BaseSelector) -> bool:
        """Wait for a message of the hub, which sends one regularly; False when it was silent for too long."""
        if any(selector.select(self.limits.pulse_seconds(self.size)) for _ in range(PULSES - 1)):
            return True
        self._break(GONE, self._keeper, why_silent([self._keeper], self.limits.stopped_within(self.size)))
        return False

    def _take(self, received: bytearray) -> None:
        for said in take_frames(received, self.limits.longest_answer(self.size)):
            if said.kind in (GONE, LATE):
                self._break(said.kind, said.number, said.body.decode(errors="replace"))
            elif said.kind == PING:
                self._live()
            else:
                self._answers.put(said)

    def _live(self) -> None:
        """Give a sign of life, unless another is just being sent."""
        assert self._socket is not None
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    self._socket.sendall(_HERE)
            finally:
                self._sending.release()

    def _break(self, kind: bytes, rank: int, message: str) -> None:
        if self._failure is None:
            self._failure = PeerError(message, rank) if kind == GONE else TransportError(message)
        self._answers.put(None)


def _is_late(error: OSError) -> bool:
    """Whether the socket's own timeout expired, and not that of the connection, which raises the same class."""
    return isinstance(error, socket.timeout) and error.errno is None

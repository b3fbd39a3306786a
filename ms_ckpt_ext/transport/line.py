"""A process's connection to a hub: it sends a payload, and gets everybody's; or hears who is gone. See `hub`."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from typing import Optional

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.hub import BYE, DATA, FRAME, GONE, LENGTH, gone, take_frames, tune
from ms_ckpt_ext.transport.rendezvous.search import Arrival

GRACE_SECONDS = 2.0
"""How long to wait for threads that are about to end, and for news that are about to come."""
_SLACK_SECONDS = 3.0
"""By how much a hub may miss its own timeout, before it counts as stopped."""


class Line:
    """One rank's end.

    Args:
        rank, size: of those who meet.
        timeout: seconds that the hub waits for who does not come. A hub that is silent for longer is given up.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._failure: Optional[TransportError] = None
        self._answers: queue.Queue[Optional[bytes]] = queue.Queue()
        self._closed = False
        self._socket: Optional[socket.socket] = None
        self._listener: Optional[threading.Thread] = None
        self._keeper = 0

    def attach(self, arrival: Arrival) -> None:
        """Go on with a connection to a hub that has let this rank in; it is this line's from here on."""
        connection, self._keeper, received = arrival
        tune(connection)
        self._socket = connection
        self._listener = threading.Thread(
            target=self._listen, args=(connection, bytearray(received)), name="ms_ckpt_ext control", daemon=True
        )
        self._listener.start()

    def share(self, payload: bytes, doing: str = "share") -> list[bytes]:
        """Every rank's payload in rank order. Raises PeerError or TransportError; `doing` is for their messages."""
        self.check(doing)
        assert self._socket is not None
        with contextlib.suppress(OSError):  # the hub is gone: the listener knows, or will in a moment
            self._socket.sendall(FRAME.pack(DATA, self.rank, len(payload)) + payload)
        try:
            answer = self._answers.get(timeout=self.timeout + _SLACK_SECONDS)  # what came before bad news still counts
        except queue.Empty:
            answer = None
            self._failure = TransportError(
                f"rank {self._keeper}, which hears the others and answers them, was silent for {self.timeout:g} s: its "
                "process was stopped, or does not let its threads run"
            )
        if answer is None:
            self.check(doing)
        assert answer is not None
        return _split(answer, self.size)

    def check(self, doing: str) -> None:
        """Raise if the job is known to be broken."""
        if self._failure is not None:
            message = f"rank {self.rank}, in {doing}: {self._failure}"
            if isinstance(self._failure, PeerError):
                raise PeerError(message, self._failure.rank)
            raise TransportError(message)

    def close(self) -> None:
        """Leave; a rank that waits for this one in `share` is told so. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._socket is None or self._listener is None:
            return
        with contextlib.suppress(OSError):  # the hub is gone already
            self._socket.sendall(FRAME.pack(BYE, self.rank, 0))
            self._socket.shutdown(socket.SHUT_WR)
        self._listener.join(GRACE_SECONDS)

    def _listen(self, connection: socket.socket, received: bytearray) -> None:
        """Thread: receive what the hub sends until it or this rank leaves."""
        while True:
            try:
                chunk = connection.recv(1 << 16)
            except OSError:
                chunk = b""
            if not chunk:
                break
            received += chunk
            for kind, rank, body in take_frames(received):
                if kind == DATA:
                    self._answers.put(body)
                else:
                    self._break(kind, rank, body.decode(errors="replace"))
        keeper = self._keeper
        self._break(GONE, keeper, gone(keeper))
        connection.close()

    def _break(self, kind: bytes, rank: int, message: str) -> None:
        if self._failure is None:
            self._failure = PeerError(message, rank) if kind == GONE else TransportError(message)
        self._answers.put(None)


def _split(answer: bytes, size: int) -> list[bytes]:
    parts, at = [], 0
    for _ in range(size):
        (length,) = LENGTH.unpack_from(answer, at)
        at += LENGTH.size
        parts.append(answer[at : at + length])
        at += length
    return parts

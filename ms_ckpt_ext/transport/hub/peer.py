"""A hub's end of one connection: it never blocks, and keeps what the other end has not read yet."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
from collections import deque
from collections.abc import Sequence
from typing import Optional

from ms_ckpt_ext.errors import name_ranks
from ms_ckpt_ext.transport.base import SAME_VERSION
from ms_ckpt_ext.transport.hub.frames import Malformed, Message, take_frames
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from ms_ckpt_ext.transport.rendezvous.greeting import Door

_CHUNK = 1 << 14
_OUT_OF_REACH = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Peer:
    """The process at the other end.

    Args:
        connection: owned by this peer from here on.
        door: decides whether it is let in.
        since: when it came.
        most_queued: bytes that may wait to be read; a peer that lets more pile up is dropped.

    Attributes:
        rank: its number, once it was let in.
        unread: bytes that wait to be sent.
        quiet: pulses of the hub since its last message.
        error: what went wrong in sending to it. Its connection has ended, which the next read finds.
    """

    def __init__(
        self, connection: socket.socket, selector: selectors.BaseSelector, door: Door, since: float, most_queued: int
    ) -> None:
        self.door = door
        self.since = since
        self.rank: Optional[int] = None
        self.unread = 0
        self.quiet = 0
        self.error: Optional[OSError] = None
        self._socket = connection
        self._selector = selector
        self._most_queued = most_queued
        self._received = bytearray()
        self._outgoing: deque[memoryview] = deque()
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, self)

    def receive(self) -> int:
        """Read what has come, and return how many bytes; 0 at the end. Raises OSError."""
        chunk = self._socket.recv(_CHUNK)
        self._received += chunk
        self.quiet = 0
        return len(chunk)

    def ask(self) -> Optional[int]:
        """The rank that it says it is; see `Door.ask`."""
        return self.door.ask(self._received)

    def frames(self, longest: int) -> list[Message]:
        """What has come and is complete. Raises Malformed."""
        return take_frames(self._received, longest)

    def send(self, message: bytes) -> None:
        """Send what it accepts now, and the rest when it reads again. Errors are kept in `error`."""
        if self.error is not None:
            return
        if self._outgoing:
            self._queue(message)
        else:
            self._send_first(message)

    def _send_first(self, message: bytes) -> None:
        try:
            sent = self._socket.send(message)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.error = error
            return
        if sent < len(message):
            self._queue(message[sent:])
            self._selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def _queue(self, message: bytes) -> None:
        self._outgoing.append(memoryview(message))
        self.unread += len(message)
        if self.unread > self._most_queued:
            self.error = OSError(errno.ENOBUFS, f"it does not read: {self.unread} bytes wait for it")

    def _flush(self) -> None:
        """Send what it accepts now."""
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing[0])
                self.unread -= sent
                if sent < len(self._outgoing[0]):
                    self._outgoing[0] = self._outgoing[0][sent:]
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self.error = error
            self._outgoing.clear()

    def written(self) -> None:
        """Go on sending, as it reads again; stop watching for that when nothing waits any more."""
        self._flush()
        if not self._outgoing:
            self._selector.modify(self._socket, selectors.EVENT_READ, self)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._socket)
        self._socket.close()


def tune(connection: socket.socket, limits: ControlLimits) -> None:
    """Send small messages at once; notice a vanished host by its silence, whether or not something was sent to it."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = max(1, int(limits.vanished_seconds // 5))
    options = {
        "TCP_KEEPIDLE": step * 2,
        "TCP_KEEPINTVL": step,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": int(limits.vanished_seconds * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def why_gone(rank: int, error: Optional[Exception], limits: ControlLimits) -> str:
    """The message to the others about a rank whose connection ended."""
    if isinstance(error, OSError) and error.errno in _OUT_OF_REACH:
        return (
            f"rank {rank} is out of reach: its host did not answer for {limits.vanished_seconds:g} s; look at the host "
            "and the network between"
        )
    if isinstance(error, Malformed) or (isinstance(error, OSError) and error.errno == errno.ENOBUFS):
        return f"rank {rank} was put out: {error}; {SAME_VERSION}"
    return f"rank {rank} is gone: its process ended or was killed; look at its log for the cause"


def why_silent(ranks: Sequence[int], seconds: float) -> str:
    """The message to the others about ranks that answer nothing, though their connections stand."""
    host = "its host does" if len(ranks) == 1 else "their hosts do"
    return (
        f"{name_ranks(ranks)} answered nothing for {seconds:.0f} s, though {host}: a process was stopped "
        "(SIGSTOP, a debugger), or does not let its threads run; look at it with ps"
    )

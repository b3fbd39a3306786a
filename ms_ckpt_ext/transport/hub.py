"""Where ranks meet: a thread that one of them keeps, and the frames that travel. See `control` and `gate`."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence

from ms_ckpt_ext.errors import name_ranks
from ms_ckpt_ext.transport.rendezvous.greeting import Door

FRAME = struct.Struct("<4sIQ")  # kind, rank, length of what follows
DATA, BYE, GONE, LATE = b"data", b"bye.", b"gone", b"late"
LENGTH = struct.Struct("<Q")


class Hub:
    """A thread that collects one payload of every rank, and answers all; tells all when one is gone or late.

    Args:
        size: ranks that are to come.
        timeout: seconds that those who have come wait for the others.
        server: where they connect; the hub's from here on.
        token: what they have to know.
        keeper: the rank whose process this is.
    """

    def __init__(self, size: int, timeout: float, server: socket.socket, token: str, keeper: int = 0) -> None:
        self._token = token
        self._size = size
        self._timeout = timeout
        self._server = server
        self._keeper = keeper
        self._doors: dict[socket.socket, Door] = {}
        self._connections: dict[int, socket.socket] = {}
        self._greeted: set[int] = set()
        self._payloads: dict[int, bytes] = {}
        self._since = 0.0
        self._left: set[int] = set()
        self._thread = threading.Thread(target=self._serve, name="ms_ckpt_ext hub", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until every rank has left."""
        self._thread.join(timeout)

    def stop(self) -> None:
        """End within a second, whoever has not left: the job was not to be."""
        self._left.update(range(self._size))

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector, self._server:
            selector.register(self._server, selectors.EVENT_READ, bytearray())
            while len(self._left) < self._size:
                for key, _ in selector.select(1.0):
                    if key.fileobj is self._server:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket) and not self._read(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                        self._lost(key.fileobj)
                self._remind()
            for key in selector.get_map().values():  # also those that have not said yet who they are
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self._server.accept()
        tune(connection)
        door = self._doors[connection] = Door(self._token, self._keeper, self._size)
        with contextlib.suppress(OSError):  # its end is noticed by the next read
            connection.sendall(door.hail)
        selector.register(connection, selectors.EVENT_READ, bytearray())

    def _read(self, connection: socket.socket, received: bytearray) -> bool:
        """Take what has come; False when the connection is over."""
        try:
            chunk = connection.recv(1 << 16)
            received += chunk
            if connection in self._doors and not self._greet(connection, received):
                return False
        except OSError:
            return False
        for kind, rank, body in take_frames(received):
            if kind == DATA:
                self._since = self._since if self._payloads else time.monotonic()
                self._payloads[rank] = body
            elif kind == BYE:
                self._left.add(rank)
        self._answer()
        return bool(chunk)

    def _greet(self, connection: socket.socket, received: bytearray) -> bool:
        """True when the connection is that of a rank, or may yet become so. Raises OSError."""
        door = self._doors[connection]
        rank = door.ask(received)
        if rank is None:
            return True
        reply, welcome = door.answer(rank in self._greeted)
        if welcome:
            del self._doors[connection]
            self._greeted.add(rank)
            self._connections[rank] = connection
        connection.sendall(reply)
        return welcome

    def _answer(self) -> None:
        if len(self._payloads) == self._size:
            ordered = [self._payloads[rank] for rank in range(self._size)]
            self._payloads.clear()
            self._tell(DATA, 0, b"".join(LENGTH.pack(len(body)) + body for body in ordered))
        elif self._payloads and self._left:
            rank = min(self._left)
            self._tell(GONE, rank, f"rank {rank} has left: its transport was closed before".encode())

    def _remind(self) -> None:
        if self._payloads and time.monotonic() - self._since > self._timeout:
            missing = [rank for rank in range(self._size) if rank not in self._payloads]
            self._since = time.monotonic()
            self._tell(LATE, 0, self._late(missing).encode())

    def _late(self, missing: Sequence[int]) -> str:
        never = [rank for rank in missing if rank not in self._greeted]
        who = f"{name_ranks(never)} " if never != missing else ""
        why = (
            f"and {who}never did before: ended, or busy with something else?"
            if never
            else "though alive; what keeps them?"
        )
        return f"{name_ranks(missing)} did not come within {self._timeout:g} s, {why} Look at their logs"

    def _lost(self, connection: socket.socket) -> None:
        self._doors.pop(connection, None)
        connection.close()
        for rank, known in list(self._connections.items()):
            if known is connection:
                del self._connections[rank]
                if rank not in self._left:
                    self._left.add(rank)
                    self._tell(GONE, rank, gone(rank).encode())

    def _tell(self, kind: bytes, rank: int, body: bytes) -> None:
        message = FRAME.pack(kind, rank, len(body)) + body
        for receiver in sorted(self._connections, reverse=True):  # this process last: with this it may end
            with contextlib.suppress(OSError):  # its end is noticed by the next read
                self._connections[receiver].sendall(message)


def gone(rank: int) -> str:
    """What the others are told of a rank whose connection ended."""
    return f"rank {rank} is gone: its process ended or was killed; look at its log for the cause"


def tune(connection: socket.socket) -> None:
    """Small messages at once; a host that vanishes is noticed in half a minute."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def take_frames(received: bytearray) -> list[tuple[bytes, int, bytes]]:
    """Remove and return the complete frames at the front."""
    found = []
    while len(received) >= FRAME.size:
        kind, rank, length = FRAME.unpack_from(received)
        end = FRAME.size + length
        if len(received) < end:
            break
        found.append((kind, rank, bytes(received[FRAME.size : end])))
        del received[:end]
    return found

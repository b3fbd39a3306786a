"""A stand-in for the backend's all-gather that works whatever the network is like: a socket in the file system.

It is what MindSpore's communicator is to the ranks of a job before they have any connection of ours, without importing
MindSpore, and across the hosts of `tests.harness.hosts`, which see one file system.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from typing import Callable

_LENGTH = struct.Struct("<I")


class MeetingPoint:
    """Gathers messages of `size` ranks, as often as they come; a context manager."""

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(size)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> MeetingPoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, EOFError):
            ranks: dict[int, socket.socket] = {}
            while len(ranks) < self._size:
                connection = stack.enter_context(self._server.accept()[0])
                ranks[int(_receive(connection))] = connection
            while True:
                messages = [_receive(ranks[rank]) for rank in range(self._size)]
                for connection in ranks.values():
                    for message in messages:
                        _send(connection, message)


def gather_at(path: Path, rank: int, size: int) -> Callable[[bytes], list[bytes]]:
    """The collective of one rank."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    _send(connection, str(rank).encode())

    def gather(message: bytes) -> list[bytes]:
        assert len(message) <= 120, "longer than a cell"
        _send(connection, message)
        return [_receive(connection) for _ in range(size)]

    return gather


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = connection.recv(count - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received

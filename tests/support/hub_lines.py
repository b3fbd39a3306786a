"""A hub, and lines of ranks to it, in one process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, NamedTuple, Optional

import pytest

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.rendezvous.greeting import Guest
from ms_ckpt_ext.transport.rendezvous.search import arrive

HANG = 60.0
TOKEN = "of this job"
Took = Callable[[str, float], None]


@pytest.fixture
def took(request: pytest.FixtureRequest) -> Took:
    """Prints how many seconds something took."""
    return lambda what, seconds: print(f"TOOK {seconds:.2f} {what}, {request.node.name}")


class Job(NamedTuple):
    """A hub and lines to it."""

    hub: Hub
    port: int
    lines: list[Line]

    def connect(self, rank: int, token: str = TOKEN, size: Optional[int] = None) -> socket.socket:
        """A connection that has been let in, and belongs to no line."""
        connection = socket.create_connection(("127.0.0.1", self.port), HANG)
        try:
            return arrive(connection, Guest(token, rank, size or len(self.lines))).connection
        except BaseException:
            connection.close()
            raise


@contextlib.contextmanager
def job(size: int, timeout: float, limits: ControlLimits, absent: Sequence[int] = ()) -> Iterator[Job]:
    """A job of `size` ranks, of which those that are `absent` have not come yet."""
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = server.getsockname()[1]
    found = Job(Hub(size, timeout, server, TOKEN, limits=limits), port, [])
    try:
        found.lines.extend(Line(rank, size, timeout, limits) for rank in range(size))
        for line in found.lines:
            if line.rank not in absent:
                line.attach(arrive(socket.create_connection(("127.0.0.1", port), HANG), Guest(TOKEN, line.rank, size)))
        yield found
    finally:
        for line in found.lines:
            line.close()
        found.hub.stop()
        found.hub.join(HANG)
        assert "ms_ckpt_ext hub" not in [thread.name for thread in threading.enumerate()]


def all_share(lines: Sequence[Line], payload: bytes = b"") -> list[Any]:
    """What a share gives on each of these, or raises."""

    def one(line: Line) -> Any:
        try:
            return line.share(payload)
        except TransportError as error:
            return error

    with ThreadPoolExecutor(len(lines)) as pool:
        return list(pool.map(one, lines))

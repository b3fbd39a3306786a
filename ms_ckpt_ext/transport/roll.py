"""Which ranks have come to the first meeting, asked when it takes long, so that its error names those that have not.

The ranks of a host meet at its `gate`, and those of several hosts in a collective of the backend, which does not say
which are missing; before it there is no connection of ours. But all ranks know where MindSpore's scheduler is. A rank
that has waited for a tenth of the timeout, 10 s at most, reports there: the first to do so on that host opens a hub at
a port derived from the scheduler's address, which after nine tenths of the timeout tells all which have not reported.

Nothing depends on it. Where there is no scheduler, no rank of its host has come, or the port is taken or cannot be
reached, the error does not name them. A meeting that does not take long opens no port.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Optional

from ms_ckpt_ext.errors import PeerError, TransportError, name_ranks
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.rendezvous.addresses import Address
from ms_ckpt_ext.transport.rendezvous.greeting import Guest
from ms_ckpt_ext.transport.rendezvous.search import arrive

_PATIENCE_SECONDS = 10.0
_CONNECT_SECONDS = 2.0
_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below the ports that systems assign by themselves."""


@contextlib.contextmanager
def calling_roll(rank: int, size: int, timeout: float) -> Iterator[None]:
    """Add to a TransportError raised inside which ranks have not come, if that is found out.

    Args:
        rank, size: in the job.
        timeout: seconds after which such an error comes at the earliest.
    """
    where = _where()
    if where is None:
        yield
        return
    roll = _Roll(rank, size, timeout, where)
    try:
        yield
    except PeerError:
        raise
    except TransportError as error:
        if not roll.absent:
            raise
        raise TransportError(f"{error}. {roll.absent}") from error
    finally:
        roll.end()


def _where() -> Optional[Address]:
    host, port = os.environ.get("MS_SCHED_HOST"), os.environ.get("MS_SCHED_PORT")
    if not host or not port:
        return None
    digest = hashlib.blake2b(f"{host} {port}".encode(), digest_size=4).digest()
    return Address(host, _FIRST_PORT + int.from_bytes(digest, "little") % _PORTS)


class _Roll:
    """One rank's part.

    Attributes:
        absent: a sentence about the ranks that have not come; empty as long as they are not known.
    """

    def __init__(self, rank: int, size: int, timeout: float, where: Address) -> None:
        self.absent = ""
        self._where = where
        self._patience = min(_PATIENCE_SECONDS, timeout / 10)
        self._due = time.monotonic() + timeout * 0.9
        self._token = f"ms_ckpt_ext roll {where}"
        self._line = Line(rank, size, timeout)
        self._hub: Optional[Hub] = None
        self._over = threading.Event()
        self._attaching = threading.Lock()
        self._thread = threading.Thread(target=self._report, name="ms_ckpt_ext roll", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the thread, the line and the hub."""
        with self._attaching:
            self._over.set()
        self._line.close()
        if self._hub is not None:
            self._hub.stop()
        self._thread.join(2 * _CONNECT_SECONDS)

    def _report(self) -> None:
        """Thread: report that this rank has come, and hear which have not."""
        while not self._over.wait(self._patience):
            try:
                self._hub = self._hub or self._open()
                if self._enter():
                    self._line.share(b"", "the roll of all ranks")
                    return
            except TransportError as error:
                self.absent = str(error)
                return
            except OSError:  # nothing listens there, or not yet, or it cannot be reached
                continue

    def _open(self) -> Optional[Hub]:
        """A hub, if the scheduler is on this host and no other rank has been faster."""
        for family, _, _, _, target in socket.getaddrinfo(*self._where, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError):
                server = socket.create_server(target[:2], family=family, backlog=1024)
                line = self._line
                return Hub(line.size, line.timeout, server, self._token, line.rank, line.limits, self._look)
        return None

    def _enter(self) -> bool:
        """Whether this rank is let in, and has not ended meanwhile. Raises OSError."""
        connection = socket.create_connection(self._where, _CONNECT_SECONDS)
        try:
            arrival = arrive(connection, Guest(self._token, self._line.rank, self._line.size))
            with self._attaching:
                if self._over.is_set():
                    raise ConnectionAbortedError
                self._line.attach(arrival)
        except BaseException:
            connection.close()
            raise
        return True

    def _look(self, missing: Sequence[int]) -> Optional[str]:
        if time.monotonic() < self._due:
            return None
        return (
            f"{name_ranks(missing)} of {self._line.size} did not come, or cannot reach {self._where}, where the others "
            "report; look at their logs"
        )

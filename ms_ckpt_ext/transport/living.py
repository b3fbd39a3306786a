"""How many ranks of this host are still alive, by the connections that each keeps to MindSpore's scheduler.

A rank that has come to a hub is known to be alive by its connection there. One that has not is known only to the
scheduler, which says nothing for half a minute. But the kernel lists the connections to it from this network, and
closes those of a process that ends: where each of them is held by a process whose sockets can be listed, the number of
such processes is the number of live ranks. Otherwise (another container, another user, no Linux) nothing is known.

A connection to the scheduler whose other end is not in this network leads to another host. In a job of several hosts
that MindSpore counts as one, because they have one name, the ranks that are not here run elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from ms_ckpt_ext.errors import name_ranks

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_ESTABLISHED = "01"
_MAPPED = "0000000000000000FFFF0000"
"""What an IPv4 address begins with in the table of IPv6."""
_AGAIN_SECONDS = 0.4
_LOOKS = 3
"""How many looks, `_AGAIN_SECONDS` apart, must agree, since a rank may be reconnecting."""


class Watch:
    """Looks for ranks that have ended before they came.

    Args:
        size: ranks of this host.
        port: of MindSpore's scheduler.
        everybody: these are all ranks of the job, as MindSpore counts hosts.
    """

    def __init__(self, size: int, port: int, everybody: bool = True) -> None:
        self._size = size
        self._port = port
        self._everybody = everybody
        self._due = time.monotonic() + _AGAIN_SECONDS  # usually all come before
        self._fewer = 0

    def look(self, missing: Sequence[int]) -> Optional[str]:
        """What to report of ranks that have not come yet, when some of them never will; None when that is not known.

        Empty when they are on another host, so that there is nothing to report.
        """
        now = time.monotonic()
        if now < self._due:
            return None
        self._due = now + _AGAIN_SECONDS
        living = living_ranks(self._port, self._size)
        self._fewer = 0 if living is None or living >= self._size else self._fewer + 1
        if living is None or self._fewer < _LOOKS:
            return None
        if self._everybody and leads_elsewhere(self._port):
            return "" if living == self._size - len(missing) else None
        ended = self._size - living
        some = "" if ended >= len(missing) else f"{ended} of "
        return (
            f"{some}{name_ranks(missing)} ended before coming: of {self._size} processes of this host {living} still "
            "hold a connection to MindSpore's scheduler; look at their logs"
        )


def living_ranks(port: int, size: int) -> Optional[int]:
    """How many processes of this host are connected to the scheduler: `size` when all seem to be; None if unknown."""
    try:
        held = _connections(port)
        mine = len(held & _sockets("self"))
        if not mine:
            return None
        return size if len(held) >= size * mine else _holders(held)
    except OSError:
        return None


def leads_elsewhere(port: int) -> bool:
    """Whether a connection with the scheduler, from here or to here, has its other end in another network."""
    found = {(end.here, end.there) for end in _ends() if port in (end.here.port, end.there.port)}
    return any((there, here) not in found for here, there in found)


class _Endpoint(NamedTuple):
    """An address as the kernel writes it, in hexadecimal digits, and a port."""

    address: str
    port: int


class _End(NamedTuple):
    """This network's end of an established connection, and the number of the socket."""

    here: _Endpoint
    there: _Endpoint
    inode: str


def _ends() -> Iterator[_End]:
    for table in _TABLES:
        with contextlib.suppress(FileNotFoundError), open(table, encoding="utf-8") as lines:
            for fields in (line.split() for line in lines):
                if fields[3] == _ESTABLISHED:
                    yield _End(_endpoint(fields[1]), _endpoint(fields[2]), fields[9])


def _endpoint(text: str) -> _Endpoint:
    """IPv4 is the same in both tables.

    >>> _endpoint("0000000000000000FFFF00000100007F:1FB6") == _endpoint("0100007F:1FB6")
    True
    """
    address, _, port = text.rpartition(":")
    return _Endpoint(address[len(_MAPPED) :] if address.startswith(_MAPPED) else address, int(port, 16))


def _connections(port: int) -> set[str]:
    """Inodes of the established connections from this network to a port."""
    return {end.inode for end in _ends() if end.there.port == port}


def _holders(held: set[str]) -> Optional[int]:
    """How many processes hold them, each counted with its children; None when a holder of any cannot be seen."""
    groups: list[set[str]] = []
    for sockets in _all_sockets():
        mine = sockets & held
        if mine:
            shared = [group for group in groups if group & mine]
            groups = [group for group in groups if not group & mine] + [mine.union(*shared)]
    return len(groups) if held == set().union(*groups) else None


def _all_sockets() -> Iterator[set[str]]:
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            yield _sockets(process)


def _sockets(process: str) -> set[str]:
    """Inodes of a process's sockets."""
    folder = f"/proc/{process}/fd"
    found = set()
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found

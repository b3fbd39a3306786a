"""Trying every address that may lead to a hub.

A rank goes on until one of them is the hub of its job, which the greeting shows: hosts may have an address in
common (a bridge for containers), or one at which another program listens. A silent address does not delay the
next, which is tried at the same time.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.rendezvous.addresses import Address, Invitation, told_address
from ms_ckpt_ext.transport.rendezvous.greeting import Guest, Unwelcome
from ms_ckpt_ext.transport.rendezvous.interfaces import own_addresses

_STAGGER_SECONDS = 0.5
"""How long an address may be silent before the next is tried at the same time."""
_CHUNK = 4096


class Arrival(NamedTuple):
    """A connection to a hub that has let this rank in.

    Attributes:
        connection: blocking, without a timeout.
        keeper: the rank whose process runs the hub.
        received: what came after the greeting.
    """

    connection: socket.socket
    keeper: int
    received: bytes


def connect(invitation: Invitation, rank: int, size: int, seconds: float, near: bool = False) -> Arrival:
    """Connect to the hub of this job, by whichever address leads there.

    Args:
        rank, size: this rank, and the number of ranks of the job.
        seconds: how long to try.
        near: this process is in the network of the hub, so that loopback leads there.

    Raises:
        UsageError: MS_CKPT_EXT_CONTROL_ADDRESS is no address.
        TransportError: no address leads there; names each that was tried, and what happened.
    """
    ways = _ways(invitation.addresses, told_address(), near)
    return _Search(ways, invitation.token, rank, size).run(seconds)


def greet(connection: socket.socket, guest: Guest, received: bytearray) -> Optional[Arrival]:
    """Read what has come, and answer; returns None until this rank is let in. Raises OSError when it is refused."""
    chunk = connection.recv(_CHUNK)
    if not chunk:
        raise Unwelcome("it ended the connection without a word")
    received += chunk
    reply = guest.hear(received)
    if reply:
        connection.sendall(reply)
    return None if guest.keeper is None else Arrival(connection, guest.keeper, bytes(received))


def arrive(connection: socket.socket, guest: Guest) -> Arrival:
    """Be let in over an open connection, within its timeout, which is removed then. Raises OSError."""
    received = bytearray()
    while True:
        arrival = greet(connection, guest, received)
        if arrival is not None:
            connection.settimeout(None)
            return arrival


def _ways(addresses: Sequence[Address], told: Optional[Address], near: bool) -> list[Address]:
    """The addresses to try, in this order."""
    ports = dict.fromkeys(address.port for address in addresses)
    loopback = [Address(host, port) for port in ports for host in ("127.0.0.1", "::1")] if near else []
    named = [told] if told and told.host else []
    if near:
        return list(dict.fromkeys([*loopback, *addresses, *named]))
    shared = set(own_addresses())  # an address that both hosts have does not lead from one to the other
    return list(dict.fromkeys([*named, *sorted(addresses, key=lambda address: address.host in shared)]))


class _Attempt:
    """A connection that is being made, or greeted. Its constructor and methods raise OSError when it fails."""

    def __init__(self, name: str, family: int, target: Any, guest: Guest) -> None:
        self.name = name
        self._guest = guest
        self._received = bytearray()
        self._connected = False
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                self.socket.connect(target)
        except BaseException:
            self.socket.close()
            raise

    def connected(self) -> bool:
        """True when the connection stands now and did not before. Raises OSError."""
        if self._connected:
            return False
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._connected = True
        return True

    def greet(self) -> Optional[Arrival]:
        """See the function of this name."""
        return greet(self.socket, self._guest, self._received)


class _Search:
    """Tries addresses, several at the same time, until one lets this rank in."""

    def __init__(self, ways: Sequence[Address], token: str, rank: int, size: int) -> None:
        self._ways = deque(ways)
        self._guest = (token, rank, size)
        self._problems: dict[str, str] = {}
        self._selector = selectors.DefaultSelector()

    def run(self, seconds: float) -> Arrival:
        """Return the first connection over which this rank is let in; close all others. Raises TransportError."""
        began = time.monotonic()
        arrival: Optional[Arrival] = None
        try:
            arrival = self._first(began + seconds)
        finally:
            for key in list(self._selector.get_map().values()):
                if arrival is None or key.fileobj is not arrival.connection:
                    key.data.socket.close()
            self._selector.close()
        if arrival is None:
            tried = "; ".join(f"{name}: {problem}" for name, problem in self._problems.items()) or "no address is known"
            raise TransportError(f"tried for {time.monotonic() - began:.1f} s, {tried}")
        arrival.connection.setblocking(True)
        return arrival

    def _first(self, deadline: float) -> Optional[Arrival]:
        due = 0.0
        while (self._ways or self._selector.get_map()) and time.monotonic() < deadline:
            if self._ways and (time.monotonic() >= due or not self._selector.get_map()):
                self._try(self._ways.popleft())
                due = time.monotonic() + _STAGGER_SECONDS
            until = min(due, deadline) if self._ways else deadline
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                arrival = self._goes_on(key.data)
                if arrival is not None:
                    return arrival
        return None

    def _try(self, address: Address) -> None:
        name = str(address)
        try:
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self._problems[name] = _why(error)
            return
        for family, _, _, _, target in found:
            full = name if str(target[0]) == address.host else f"{name} ({target[0]})"
            self._problems[full] = "no answer"
            try:
                attempt = _Attempt(full, family, target, Guest(*self._guest))
            except OSError as error:
                self._problems[full] = _why(error)
            else:
                self._selector.register(attempt.socket, selectors.EVENT_WRITE, attempt)

    def _goes_on(self, attempt: _Attempt) -> Optional[Arrival]:
        try:
            if not attempt.connected():
                return attempt.greet()
        except OSError as error:
            self._problems[attempt.name] = _why(error)
            self._selector.unregister(attempt.socket)
            attempt.socket.close()
            return None
        self._problems[attempt.name] = "it takes the connection, and says nothing"
        self._selector.modify(attempt.socket, selectors.EVENT_READ, attempt)
        return None


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

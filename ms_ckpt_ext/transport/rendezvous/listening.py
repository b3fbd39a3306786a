"""Listening on the addresses that the job needs, and no more.

all ranks in one network            the loopback interface
MS_CKPT_EXT_CONTROL_ADDRESS         that port; on that address alone, if it is one of this host
MS_WORKER_IP                        that address, if it is one of this host
otherwise                           all addresses of this host, IPv4 and IPv6
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.rendezvous.addresses import CONTROL_ADDRESS_VARIABLE, Address, told_address
from ms_ckpt_ext.transport.rendezvous.interfaces import own_addresses

_WORKER_IP_VARIABLE = "MS_WORKER_IP"
"""MindSpore's variable: the address of this host that the job should use."""
_MOST_ADDRESSES = 16
_PORT_SECONDS = 3.0
"""How long to wait for a requested port that is taken: by the previous load, which is about to end."""
_RETRY_SECONDS = 0.1
_BACKLOG = 4096
_EVERYWHERE = ("::", "0.0.0.0")
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""The address is another host's, or this host has no IPv6."""


class Listening(NamedTuple):
    """A listening socket, and the addresses at which other ranks may reach it."""

    server: socket.socket
    addresses: tuple[Address, ...]


def listen(alone: bool) -> Listening:
    """Listen on the addresses that the job needs.

    Args:
        alone: all ranks of the job are in the network of this process, see `interfaces.network_identity`.

    Raises:
        UsageError: MS_CKPT_EXT_CONTROL_ADDRESS is no address.
        TransportError: no socket can be made, the requested port is taken, or this host has no address.
    """
    if alone:
        server = _bound(["127.0.0.1", "::1"], 0)
        return Listening(server, (Address(*server.getsockname()[:2]),))
    told, worker = told_address() or Address("", 0), os.environ.get(_WORKER_IP_VARIABLE, "")
    host = told.host or worker
    server = _bound([host, ""] if _is_literal(host) else [""], told.port)
    bound, port = server.getsockname()[:2]
    hosts = [*filter(None, [host, worker]), *own_addresses()] if bound in _EVERYWHERE else [host]
    if not hosts:
        server.close()
        raise TransportError(
            "this host has no address that another may reach; give it one, or name one by "
            f"{CONTROL_ADDRESS_VARIABLE}=host:port"
        )
    return Listening(server, tuple(Address(each, port) for each in dict.fromkeys(hosts[:_MOST_ADDRESSES])))


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _bound(hosts: Sequence[str], port: int) -> socket.socket:
    """A socket that listens on the first of `hosts` that is an address of this host; "" is all addresses."""
    deadline = time.monotonic() + (_PORT_SECONDS if port else 0)
    while True:
        try:
            return _first_of(hosts, port)
        except OSError as error:
            if time.monotonic() > deadline:
                why = (
                    f"is port {port}, of {CONTROL_ADDRESS_VARIABLE}, in use?" if port else "are sockets forbidden here?"
                )
                raise TransportError(f"cannot listen for the other ranks: {error.strerror or error}; {why}") from error
        time.sleep(_RETRY_SECONDS)


def _first_of(hosts: Sequence[str], port: int) -> socket.socket:
    *others, last = hosts
    for host in others:
        try:
            return _server(host, port)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    return _server(last, port)


def _server(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)

"""The addresses of this host, and what distinguishes its network from others."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any, Optional

_UP = 1
"""IFF_UP of netdevice(7)."""
_ANY_PORT = 9
"""Only to look up a route: nothing is sent."""


class _Entry(ctypes.Structure):
    """struct ifaddrs of getifaddrs(3), as Linux has it."""

    _fields_ = [
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
        ("netmask", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    ]


def own_addresses() -> list[str]:
    """IPv4 and IPv6 addresses of this host that another host may reach: no loopback, no IPv6 link-local ones.

    The one of the interface that leads to MindSpore's scheduler comes first, where there is one.
    """
    found = list(dict.fromkeys([*_towards_scheduler(), *_of_interfaces()]))
    return [address for address in found if _leads_here(address)]


def network_identity() -> str:
    """Equal in two processes only when they share one loopback interface.

    The network namespace and the boot of the machine decide that on one host; machines that were cloned from a running
    image may have both in common, and differ in their names and addresses.
    """
    with contextlib.suppress(OSError):
        status = os.stat("/proc/self/ns/net")
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            told = [
                file.read(),
                str(status.st_dev),
                str(status.st_ino),
                socket.gethostname(),
                *sorted(_of_interfaces()),
            ]
            return _digest(told)
    return _digest([socket.gethostname(), *sorted(own_addresses())])


def _digest(words: list[str]) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=12).hexdigest()


def _leads_here(address: str) -> bool:
    known = ipaddress.ip_address(address)
    return not (known.is_loopback or known.is_unspecified or (known.version == 6 and known.is_link_local))


def _towards_scheduler() -> Iterator[str]:
    """The address from which this host speaks to MindSpore's scheduler."""
    scheduler = os.environ.get("MS_SCHED_HOST")
    if not scheduler:
        return
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, protocol, _, address = socket.getaddrinfo(scheduler, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            yield probe.getsockname()[0].partition("%")[0]


def _of_interfaces() -> Iterator[str]:
    """The addresses of every interface that is up; where these cannot be listed, those of the host's name."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    first = ctypes.c_void_p()
    if libc is None or libc.getifaddrs(ctypes.byref(first)) != 0:
        yield from _of_name()
        return
    try:
        at: Optional[int] = first.value
        while at:
            entry = _Entry.from_address(at)
            address = _read_address(entry.address) if entry.flags & _UP else None
            if address is not None:
                yield address
            at = entry.next
    finally:
        libc.freeifaddrs(first)


def _read_address(pointer: Any) -> Optional[str]:
    """The address in a struct sockaddr; None for families that are not of the Internet."""
    if not pointer:
        return None
    family = ctypes.c_ushort.from_address(pointer).value
    if family == socket.AF_INET:
        return socket.inet_ntop(family, ctypes.string_at(pointer + 4, 4))
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, ctypes.string_at(pointer + 8, 16))
    return None


def _of_name() -> Iterator[str]:
    with contextlib.suppress(OSError, UnicodeError):
        for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            yield str(address[0]).partition("%")[0]

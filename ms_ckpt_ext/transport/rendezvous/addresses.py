"""Where a hub is: what the other ranks are told of it."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional

from ms_ckpt_ext.errors import UsageError

CONTROL_ADDRESS_VARIABLE = "MS_CKPT_EXT_CONTROL_ADDRESS"
"""host:port, [IPv6]:port or :port. On rank 0: where to listen. On another rank: where to find rank 0."""


class Address(NamedTuple):
    """Where to connect; an empty host means any address of rank 0's host."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Invitation(NamedTuple):
    """What a rank has to know to reach a hub."""

    addresses: tuple[Address, ...]
    token: str

    def encode(self) -> bytes:
        """For `decode`."""
        return " ".join([self.token, *map(str, self.addresses)]).encode()

    @classmethod
    def decode(cls, message: bytes) -> Invitation:
        """What was encoded."""
        token, *addresses = message.decode().split(" ")
        return cls(tuple(map(parse_address, addresses)), token)


def parse_address(text: str) -> Address:
    """Parse host:port, [IPv6]:port or :port. Raises UsageError for anything else."""
    host, colon, port = text.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    ambiguous = ":" in bare and bare is host
    if (
        not colon
        or ambiguous
        or not (port.isascii() and port.isdecimal())
        or not 0 < int(port) < 1 << 16
        or any(map(str.isspace, bare))
    ):
        raise UsageError(f"{text!r} is no address: write host:port, [IPv6 address]:port, or :port for any host")
    return Address(bare, int(port))


def told_address() -> Optional[Address]:
    """The address in MS_CKPT_EXT_CONTROL_ADDRESS; None where it is not set. Raises UsageError."""
    told = os.environ.get(CONTROL_ADDRESS_VARIABLE)
    if not told:
        return None
    try:
        return parse_address(told)
    except UsageError as error:
        raise UsageError(f"{CONTROL_ADDRESS_VARIABLE}: {error}") from error

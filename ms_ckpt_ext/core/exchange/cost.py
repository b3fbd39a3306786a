"""How long a load would take: a small model of storage and links, for choosing a mode and for dry runs.

A direct load moves every rank's bytes out of the storage; a cooperative one moves each byte once, then over the links.
Reading and exchanging overlap, so a cooperative load takes the longer of the two, plus a latency per round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Hardware(NamedTuple):
    """What the model needs to know of a machine.

    Attributes:
        storage: bytes per second that the storage delivers, to all ranks together if `shared`, else to each host.
        shared: the storage is one for all hosts.
        ranks_per_host: ranks that share a host's storage, or its way to the shared one.
        link: bytes per second that one rank can receive from others.
        latency: seconds one collective takes beside the bytes.
        host: bytes per second that one host can take from shared storage.
    """

    storage: float
    shared: bool
    ranks_per_host: int
    link: float
    latency: float
    host: float = math.inf


def direct_seconds(wanted: Sequence[int], hardware: Hardware) -> float:
    """Every rank reads `wanted[rank]` bytes."""
    return _storage_seconds(wanted, hardware)


def cooperative_seconds(read: Sequence[int], received: Sequence[int], rounds: int, hardware: Hardware) -> float:
    """Every rank reads `read[rank]` bytes and receives `received[rank]`, in `rounds` rounds."""
    exchange = max(received, default=0) / hardware.link
    return max(_storage_seconds(read, hardware), exchange) + rounds * hardware.latency


def cooperates(
    wanted: Sequence[int], read: Sequence[int], received: Sequence[int], rounds: int, hardware: Hardware
) -> bool:
    """What mode "auto" chooses: the cheaper of the two; direct when nothing would be exchanged anyway."""
    return any(received) and cooperative_seconds(read, received, rounds, hardware) < direct_seconds(wanted, hardware)


def _storage_seconds(read: Sequence[int], hardware: Hardware) -> float:
    size = hardware.ranks_per_host
    busiest = max((sum(read[first : first + size]) for first in range(0, len(read), size)), default=0)
    if hardware.shared:
        return max(sum(read) / hardware.storage, busiest / hardware.host)
    return busiest / hardware.storage

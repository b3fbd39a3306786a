"""How long a load would take: a small model of storage and links, for choosing a mode and for dry runs.

A direct load moves every rank's bytes out of the storage; a cooperative one moves each byte once, then over the links.
Reading and exchanging overlap, so a cooperative load takes the longer of the two, plus a latency per round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Hardware(NamedTuple):
    """What the model needs to know of a machine.

    Attributes:
        storage: bytes per second that the storage delivers, to all ranks together if `shared`, else to each host.
        shared: the storage is one for all hosts.
        ranks_per_host: ranks that share a host's storage.
        link: bytes per second that one rank can receive from others.
        latency: seconds one collective takes beside the bytes.
    """

    storage: float
    shared: bool
    ranks_per_host: int
    link: float
    latency: float


CPU = Hardware(storage=2e9, shared=False, ranks_per_host=8, link=27e6, latency=5e-3)
"""MindSpore's MCCL over loopback: the measured 27 MB/s per rank make reading twice cheaper than sending."""
ASCEND = Hardware(storage=8e9, shared=True, ranks_per_host=8, link=20e9, latency=2e-4)
"""Order of magnitude of an Atlas 800T A2 (HCCS within a host, RoCE between hosts) on a parallel file system."""


def direct_seconds(wanted: Sequence[int], hardware: Hardware) -> float:
    """Every rank reads `wanted[rank]` bytes."""
    return _storage_seconds(wanted, hardware)


def cooperative_seconds(read: Sequence[int], received: Sequence[int], rounds: int, hardware: Hardware) -> float:
    """Every rank reads `read[rank]` bytes and receives `received[rank]`, in `rounds` rounds."""
    exchange = max(received, default=0) / hardware.link
    return max(_storage_seconds(read, hardware), exchange) + rounds * hardware.latency


def _storage_seconds(read: Sequence[int], hardware: Hardware) -> float:
    if hardware.shared:
        return sum(read) / hardware.storage
    size = hardware.ranks_per_host
    hosts = [sum(read[first : first + size]) for first in range(0, len(read), size)]
    return max(hosts, default=0) / hardware.storage

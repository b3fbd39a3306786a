"""How long a load would take: a small model of storage, buses and links, for choosing a way and for dry runs.

A direct load moves every rank's bytes out of the storage; a cooperative one moves each byte once, then over the links.
Reading, uploading and exchanging overlap, so a load takes the longest of the three, plus a latency per collective that
grows with the ranks. Bytes between servers take another link than those inside one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Hardware(NamedTuple):
    """What the model needs to know of a machine.

    Attributes:
        storage: bytes per second that the storage delivers, to all ranks together if `shared`, else to each host.
        shared: the storage is one for all hosts.
        ranks_per_host: ranks that share a host's storage, or its way to the shared one.
        link: bytes per second that one rank can send or receive inside its server.
        latency: seconds one collective takes beside the bytes.
        host: bytes per second that one host can take from shared storage.
        between: the same as `link`, from and to other servers; 0: as inside.
        upload: bytes per second from the memory of the host to that of one device.
        reader: bytes per second that one rank can read.
        per_rank: seconds by which each rank of the job lengthens a collective.
        counts: bytes that an all-to-all of N ranks moves to each of them beside the payload, divided by N squared.
        memory: bytes of a device; 0 where ranks have none.
        call: bytes of one call above which it slows down (HCCL_BUFFSIZE); 0 where there is no such limit.
    """

    storage: float
    shared: bool
    ranks_per_host: int
    link: float
    latency: float
    host: float = math.inf
    between: float = 0.0
    upload: float = math.inf
    reader: float = math.inf
    per_rank: float = 0.0
    counts: float = 0.0
    memory: float = 0.0
    call: float = 0.0


class Traffic(NamedTuple):
    """What a cooperative load moves, in bytes.

    Attributes:
        read, received: of every rank, the payload.
        rounds: how many.
        calls: collectives of a rank, over all rounds; 0 where it is one a round.
        inside, between: what every rank sends to its server and to others; none where that is not known.
        crossing: what arrives on every server from others.
    """

    read: Sequence[int]
    received: Sequence[int]
    rounds: int
    calls: int = 0
    inside: Sequence[int] = ()
    between: Sequence[int] = ()
    crossing: Sequence[int] = ()


def direct_seconds(wanted: Sequence[int], hardware: Hardware) -> float:
    """Every rank reads `wanted[rank]` bytes."""
    return max(_storage_seconds(wanted, hardware), _most(wanted) / hardware.upload)


def cooperative_seconds(traffic: Traffic, hardware: Hardware) -> float:
    """The ranks read and exchange what `traffic` says."""
    reading = _storage_seconds(traffic.read, hardware)
    uploading = _most(traffic.read) / hardware.upload
    calls = traffic.calls or traffic.rounds
    return max(reading, uploading, _exchange_seconds(traffic, hardware)) + calls * _latency(len(traffic.read), hardware)


def cooperates(wanted: Sequence[int], traffic: Traffic, hardware: Hardware) -> bool:
    """What mode "auto" chooses: the cheaper of the two; direct when nothing would be exchanged anyway."""
    return any(traffic.received) and cooperative_seconds(traffic, hardware) < direct_seconds(wanted, hardware)


def _exchange_seconds(traffic: Traffic, hardware: Hardware) -> float:
    between = hardware.between or hardware.link
    sending = (near / hardware.link + far / between for near, far in zip(traffic.inside, traffic.between))
    arriving = _most(traffic.crossing) / (between * hardware.ranks_per_host)
    return max(_most(traffic.received) / hardware.link, _most(sending), arriving)


def _latency(ranks: int, hardware: Hardware) -> float:
    counts = hardware.counts * ranks**2 / (hardware.between or hardware.link)
    return hardware.latency + hardware.per_rank * ranks + counts


def _storage_seconds(read: Sequence[int], hardware: Hardware) -> float:
    size = hardware.ranks_per_host
    busiest = _most(sum(read[first : first + size]) for first in range(0, len(read), size))
    alone = _most(read) / hardware.reader
    if hardware.shared:
        return max(sum(read) / hardware.storage, busiest / hardware.host, alone)
    return max(busiest / hardware.storage, alone)


def _most(values: Iterable[float]) -> float:
    return max(values, default=0)

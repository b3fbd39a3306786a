"""What a machine does, measured by the ranks of a job together: reading, uploading, exchanging.

Every step is timed on all ranks at once, after they have met: the rate is the bytes of all of them over the time of the
slowest. How often a step is repeated follows from its first time, which all ranks share, so all make the same calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional

from ms_ckpt_ext.errors import DiscoveryError, storage_error
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.transport.agree import NATURAL, share_numbers, share_status, share_values
from ms_ckpt_ext.transport.base import Bytes, Transport

_STEP = 4 << 20
"""Bytes of a read: that of a chunk."""
_BLOCK = 16 << 20
"""Bytes that a rank uploads, or sends to the others of an exchange together, in one go."""
_MOST_REPEATS = 1000


class Measured(NamedTuple):
    """Figures of a machine; bytes per second, 0 where there was nothing to measure.

    Attributes:
        ranks, hosts: who measured.
        shared: all hosts see the same files.
        reader: one rank alone reads.
        host: the ranks of one host read.
        storage: all ranks read.
        upload: a rank copies to its device, all at once.
        link, between: a rank receives from ranks of its host, and of others.
        latency: seconds of a small all-to-all with the status before it.
        memory, call: free bytes of a device, and HCCL_BUFFSIZE.
    """

    ranks: int
    hosts: int
    shared: bool
    reader: float
    host: float
    storage: float
    upload: float
    link: float
    between: float
    latency: float
    memory: int
    call: int


def measure_machine(transport: Transport[Any], folder: str, host: str, seconds: float) -> Measured:
    """Measure for about `seconds`. Collective.

    Args:
        folder: files that are read, as large as a rank's share of them is meant to be: what is read twice comes from
            the page cache, unless the operating system drops it.
        host: this rank's host.

    Raises:
        DiscoveryError: a rank sees no file that is worth reading.
        StorageError: a file cannot be read; PeerError on the other ranks.
        TransportError: an exchange delivers other bytes than were sent.
    """
    transport.prove()
    told: list[tuple[str, str]] = share_values(transport, (host, _identity(folder)), (str, str))
    hosts, seen = [name for name, _ in told], {files for _, files in told}
    step = _Step(transport, seconds / 6)
    reading = _Reading(transport, folder)
    everyone, first = range(transport.size), [rank for rank, name in enumerate(hosts) if name == hosts[0]]
    alone, one_host, together = (step.rate(reading.read, members) for members in ([0], first, everyone))
    upload = step.rate(_Upload(transport).run, everyone) / transport.size if transport.traits.on_device else 0.0
    near = [peer for peer in everyone if hosts[peer] == host and peer != transport.rank]
    far = [peer for peer in everyone if hosts[peer] != host]
    link, between = (step.exchange(peers, _BLOCK) for peers in (near, far))
    memory = min(share_numbers(transport, transport.free_bytes()))
    figures = (alone, one_host, together, upload, link, between, step.latency(), memory, transport.traits.call_bytes)
    return Measured(transport.size, len(set(hosts)), len(seen) == 1, *figures)


class _Step:
    """Times steps that all ranks make together."""

    def __init__(self, transport: Transport[Any], seconds: float) -> None:
        self._transport, self._seconds = transport, seconds

    def rate(self, work: Callable[[], int], members: Sequence[int]) -> float:
        """Bytes per second of `members` together, who repeat `work` for the time that there is; `work` gives bytes."""
        error: Optional[BaseException] = None
        nbytes = 0
        self._transport.share(b"")
        begin = time.perf_counter()
        try:
            while self._transport.rank in members and time.perf_counter() - begin < self._seconds:
                nbytes += work()
        except Exception as problem:  # noqa: BLE001 - shared with all ranks before it is raised
            error = problem
        took = time.perf_counter() - begin
        share_status(self._transport, error)
        total, longest = self._sums(nbytes, took)
        return total / longest

    def exchange(self, peers: Sequence[int], nbytes: int) -> float:
        """Bytes per second that a rank receives while all send to their `peers`; 0 where no rank has any."""
        if not any(answer != b"" for answer in self._transport.share(b"some" if peers else b"")):
            return 0.0
        each = nbytes // max(1, *share_numbers(self._transport, len(peers)))
        counts = [each * (peer in peers) for peer in range(self._transport.size)]
        took = self._repeated(self._all_to_all(counts))
        received, _ = self._sums(sum(counts), 0.0)
        return received / self._transport.size / took

    def latency(self) -> float:
        """Seconds of an all-to-all of 16 bytes a rank, and the status before it."""
        small = self._all_to_all([16] * self._transport.size)

        def both() -> None:
            share_status(self._transport)
            small()

        return self._repeated(both)

    def _all_to_all(self, counts: Sequence[int]) -> Callable[[], None]:
        send, receive = self._transport.allocate(sum(counts)), self._transport.allocate(sum(counts))
        return lambda: self._transport.start_all_to_all(send, counts, receive, counts).wait()

    def _repeated(self, call: Callable[[], None]) -> float:
        """Mean seconds of a `call`, made many times; the first, which may set something up, is left out."""
        call()
        begin = time.perf_counter()
        call()
        _, longest = self._sums(0, time.perf_counter() - begin)
        repeats = max(1, min(_MOST_REPEATS, int(self._seconds / max(longest, 1e-6))))
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        _, longest = self._sums(0, time.perf_counter() - begin)
        return longest / repeats

    def _sums(self, nbytes: int, took: float) -> tuple[int, float]:
        """Bytes of all ranks, and the longest time."""
        answers: list[tuple[int, float]] = share_values(self._transport, (nbytes, took), (NATURAL, float))
        return sum(total for total, _ in answers), max(max(each for _, each in answers), 1e-9)


def _files(folder: str) -> list[tuple[str, int]]:
    """(path, size) of what is in a folder and below, in order."""
    found = sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return [(path, os.path.getsize(path)) for path in found if os.path.isfile(path)]


def _identity(folder: str) -> str:
    """What tells the same files on shared storage from copies."""
    return repr([(path, size, os.stat(path).st_ino) for path, size in _files(folder)[:64]])


class _Reading:
    """This rank's share of the stretches of all files, again and again, in order."""

    def __init__(self, transport: Transport[Any], folder: str) -> None:
        stretches = [(path, at) for path, size in _files(folder) for at in range(0, size - _STEP + 1, _STEP)]
        error = None
        if not stretches:
            error = DiscoveryError(f"no file of {_STEP >> 20} MiB or more in {folder!r}: name a checkpoint's directory")
        share_status(transport, error)
        mine = stretches[transport.rank :: transport.size] or stretches
        self._stretches = self._endless(mine)
        self._buffer = linux.scratch(_STEP)

    @staticmethod
    def _endless(stretches: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        while True:
            yield from stretches

    def read(self) -> int:
        """Read one stretch from the storage; bytes."""
        path, at = next(self._stretches)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, at, _STEP, os.POSIX_FADV_DONTNEED)
                return os.preadv(descriptor, [self._buffer], at)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("read", path, error) from error


class _Upload:
    """Copies from host memory to the device."""

    def __init__(self, transport: Transport[Any]) -> None:
        self._transport = transport
        self._host: Bytes = transport.pinned(_BLOCK)
        self._host.fill(1)
        self._device = transport.allocate(_BLOCK)

    def run(self) -> int:
        """Copy once; bytes."""
        self._transport.upload(self._host, self._device, 0)
        return _BLOCK


def profile_of(found: Measured, when: str) -> dict[str, Any]:
    """A profile for `engine.load.profiles`, as JSON can write it. What was not measured is left out."""
    told = f"measured: {found.ranks} ranks on {found.hosts} host{'s' * (found.hosts > 1)}, {when}"

    def rate(value: float, **more: Any) -> dict[str, Any]:
        return {"bytes_per_second": value, **more, "from": told}

    shared = found.shared and found.hosts > 1
    described: dict[str, Any] = {
        "title": f"measured by {found.ranks} ranks, {when}",
        "ranks_per_host": max(1, found.ranks // found.hosts),
        "storage": rate(found.storage if shared else found.host, shared=shared),
        "reader": rate(found.reader),
        "link": rate(found.link or found.between or _NO_LINK),
        "latency": {"seconds": found.latency, "from": told},
    }
    if not (found.link or found.between):
        described["link"]["from"] = "assumed: one rank has nobody to exchange with"
    more = {"host": found.host if shared else 0.0, "between": found.between, "upload": found.upload}
    described |= {name: rate(value) for name, value in more.items() if value}
    sizes = {"memory": found.memory, "call": found.call}
    return described | {name: {"bytes": value, "from": told} for name, value in sizes.items() if value}


_NO_LINK = 1e9
"""Bytes per second that stand for a link which nothing could be sent over."""

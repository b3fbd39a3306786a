"""The transport of processes without MindSpore: the project's control plane, over which bulk goes as well.

Ranks meet, are told who is gone or silent, and compare their calls by the code that every job uses. Only the backend's
collectives are missing: what they move travels in shares, so a load must be small.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np

from ms_ckpt_ext.transport.base import HOST_TRAITS, Bytes, Done, Handle, Ranks
from ms_ckpt_ext.transport.control import FIRST_MEETING, ControlPlane
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from tests.harness.meeting_point import gather_at

TIMEOUT = 8.0
LIMITS = ControlLimits(slack_seconds=1.0, vanished_seconds=4.0, stopped_seconds=4.0, share_bytes=256 << 20)


class Sockets:
    """One rank of `size` processes that meet at a socket in the file system."""

    traits = HOST_TRAITS

    def __init__(self, meeting: Path, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.given: Counter[int] = Counter()
        self._control = ControlPlane(rank, size, TIMEOUT, limits=LIMITS)
        self._gather = gather_at(meeting, rank, size)
        self._control.enter(self._announce)

    def _announce(self, message: bytes) -> list[bytes]:
        def gathered() -> list[bytes]:
            try:
                return self._gather(message)
            except (OSError, EOFError) as error:
                raise RuntimeError(f"the backend failed: {error}") from error

        return self._control.guard(gathered, FIRST_MEETING)

    def allocate(self, nbytes: int) -> Bytes:
        """An array of `nbytes` bytes."""
        return np.empty(nbytes, np.uint8)

    pinned = allocate

    def upload(self, host: Bytes, buffer: Bytes, offset: int) -> None:
        """Copy `host` into `buffer`."""
        buffer[offset : offset + host.nbytes] = host.reshape(-1).view(np.uint8)

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        return self._control.share(payload)

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """See `Transport`."""
        return self._control.start_share(payload)

    def free_bytes(self) -> int:
        """Not known."""
        return 0

    def prove(self) -> None:
        """Shares are known to work."""

    def start_all_gather(self, send: Bytes, nbytes: int, recv: Bytes, group: Ranks = ()) -> Handle:
        """See `Transport`."""
        for rank, part in enumerate(self.share(send[:nbytes].tobytes())):
            recv[rank * nbytes : (rank + 1) * nbytes] = np.frombuffer(part, np.uint8)
        return Done()

    def start_broadcast(self, buffer: Bytes, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """See `Transport`."""
        told = self.share(buffer[:nbytes].tobytes() if self.rank == root else b"")
        buffer[:nbytes] = np.frombuffer(told[root], np.uint8)
        return Done()

    def start_all_to_all(
        self, send: Bytes, send_counts: Sequence[int], recv: Bytes, recv_counts: Sequence[int]
    ) -> Handle:
        """See `Transport`."""
        ends = np.cumsum([0, *send_counts])
        mine = [send[a:b].tobytes() for a, b in zip(ends, ends[1:])]
        told: list[Any] = [pickle.loads(part) for part in self.share(pickle.dumps(mine))]
        for peer, start in enumerate(np.cumsum([0, *recv_counts])[:-1]):
            part = np.frombuffer(told[peer][self.rank], np.uint8)
            assert part.size == recv_counts[peer]
            recv[start : start + part.size] = part
        return Done()

    def close(self) -> None:
        """Leave the control plane."""
        self._control.close()

"""One rank of test_hosts.py: `meeting_worker.py MEETING_POINT RANK SIZE CONNECT_SECONDS`. Tells what happens."""

from __future__ import annotations

import sys
from pathlib import Path

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport import control
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from ms_ckpt_ext.transport.rendezvous.search import Arrival
from tests.harness.meeting_point import gather_at


def tell(*words: object) -> None:
    """Print at once."""
    print(*words, flush=True)


class Plane(control.ControlPlane):
    """Tells by which address it came."""

    def attach(self, arrival: Arrival) -> None:
        """See `Line`."""
        tell("came to", arrival.connection.getpeername()[0].replace("::ffff:", ""))
        super().attach(arrival)


def main(path: str, rank: int, size: int, seconds: float) -> None:
    """Meet, share, and share once more when told to."""
    plane = Plane(rank, size, 60.0, limits=ControlLimits(connect_seconds=seconds))
    try:
        plane.enter(gather_at(Path(path), rank, size))
        assert plane.share(b"%d" % rank) == [b"%d" % number for number in range(size)]
        tell("met")
        sys.stdin.readline()
        plane.share(b"")
        tell("shared")
    except PeerError as error:
        tell("PeerError", error.rank, error)
    except TransportError as error:
        tell("TransportError", error)
    plane.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))

"""One rank of a job that has nothing but a control plane.

    hub_worker.py RANK SIZE TIMEOUT VANISHED STOPPED ADDRESS [PORT]

Rank 0 has the hub, at that address. VANISHED and STOPPED are after how many seconds of silence a host counts as out of
reach, and a process as stopped.

It prints its port, "ready" when it has been let in, and, after a line on its standard input, what it is told in a
share, and when.
"""

from __future__ import annotations

import socket
import sys
import time

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.rendezvous.greeting import Guest
from ms_ckpt_ext.transport.rendezvous.search import arrive

TOKEN = "of this job"


def main() -> None:
    """See the module."""
    rank, size, timeout, vanished, stopped = *map(int, sys.argv[1:3]), *map(float, sys.argv[3:6])
    host = sys.argv[6]
    limits = ControlLimits(slack_seconds=1.0, vanished_seconds=vanished, stopped_seconds=stopped)
    if rank == 0:
        server = socket.create_server((host, 0))
        port = server.getsockname()[1]
        Hub(size, timeout, server, TOKEN, limits=limits)
        print(port, flush=True)
    else:
        port = int(sys.argv[7])
    line = Line(rank, size, timeout, limits)
    line.attach(arrive(socket.create_connection((host, port), 10), Guest(TOKEN, rank, size)))
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        line.share(b"")
    except TransportError as error:
        print(f"{time.monotonic():.2f}", type(error).__name__, getattr(error, "rank", None), error, flush=True)


if __name__ == "__main__":
    main()

"""One rank of a job that has nothing but a control plane: `hub_worker.py RANK SIZE TIMEOUT [PORT]`. Rank 0 has the hub.

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
LIMITS = ControlLimits(slack_seconds=1.0)


def main() -> None:
    """See the module."""
    rank, size, timeout = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    if rank == 0:
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        Hub(size, timeout, server, TOKEN, limits=LIMITS)
        print(port, flush=True)
    else:
        port = int(sys.argv[4])
    line = Line(rank, size, timeout, LIMITS)
    line.attach(arrive(socket.create_connection(("127.0.0.1", port), 10), Guest(TOKEN, rank, size)))
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        line.share(b"")
    except TransportError as error:
        print(time.monotonic(), type(error).__name__, getattr(error, "rank", None), error, flush=True)


if __name__ == "__main__":
    main()

"""All ranks of a host, before any of them calls the backend for the first time.

A collective that not all ranks join cannot be cancelled. MCCL waits 30 s for them and HCCL half an hour, neither says
which are missing, and the process cannot end meanwhile. So ranks meet here first: the first to come opens a socket
under a name that all ranks of the job on this host know, and runs a hub there. When all have come they go on; when one
has not come in time, all that have are told which, and the backend was never called. A rank that ended before it came
is noticed within seconds where the kernel shows it (`living`).

MindSpore counts ranks by host name. Where several hosts have one name, so that all ranks seem to be of one host, those
that are here go on without the others, which meet on their own host.

The name is in the kernel's abstract namespace, made of the address of MindSpore's scheduler, which only this job has:
no port that another program may want, nothing to delete. Where there is no scheduler (a job started by a rank table),
or no such namespace, ranks do not meet here. Ranks of other hosts are not waited for: they meet in the collective that
follows, which `control` bounds.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from typing import Optional

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.agree import decode_all, number_told
from ms_ckpt_ext.transport.hub.limits import DEFAULT, ControlLimits
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.living import Watch
from ms_ckpt_ext.transport.rendezvous.greeting import Guest
from ms_ckpt_ext.transport.rendezvous.search import arrive

_TOKEN = "ms_ckpt_ext"
_RETRY_SECONDS = 0.02
_DOING = "the first meeting of ranks"


def meet(
    rank: int, size: int, timeout: float, everybody: bool, limits: ControlLimits = DEFAULT, number: Optional[int] = None
) -> list[int]:
    """Wait until all ranks of this host have come; returns their numbers in the job, or none where they do not meet.

    Args:
        rank, size: among the ranks of this host.
        timeout: seconds to wait.
        everybody: these are all ranks of the job, so that their numbers are those of the job.
        limits: see there; all ranks have the same.
        number: this rank's number in the job, where that is not `rank`.

    Raises:
        PeerError, TransportError: on all ranks that have come, when one of them left, or another did not come in time.
    """
    name = _name()
    mine = rank if number is None else number
    if size == 1:
        return [mine]
    if name is None:
        return []
    line, hub, deadline = Line(rank, size, timeout, limits), None, time.monotonic() + timeout
    try:
        while not _enter(line, name, deadline - time.monotonic()):
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank {rank}, in {_DOING}: it was not let in within {timeout:g} s. Another process of this host "
                    "has its number, or a rank was stopped; look at the other ranks' logs"
                )
            opened = _open(name, line, everybody) if hub is None else None
            hub = hub or opened
            time.sleep(0 if opened else _RETRY_SECONDS)
        told = decode_all(line.share(str(mine).encode(), _DOING), lambda each: number_told(each) if each else None)
        return [each for each in told if each is not None]
    except TransportError as error:
        if everybody:
            raise
        where = (
            f"{error} (counted among the ranks of host {socket.gethostname()!r}; if several hosts have this name, give "
            "each another, or set MS_CKPT_EXT_HOST to what tells them apart)"
        )
        raise TransportError(where) from error
    finally:
        line.close()
        if hub is not None:
            hub.stop()


def _name() -> Optional[str]:
    scheduler, port = os.environ.get("MS_SCHED_HOST"), os.environ.get("MS_SCHED_PORT")
    if not scheduler or not port or not sys.platform.startswith("linux"):
        return None
    return f"\0{_TOKEN} {scheduler[:60]} {port[:8]}"


def _open(name: str, line: Line, everybody: bool) -> Optional[Hub]:
    """A hub of this name; None where there is one already. Raises TransportError."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(name)
        server.listen(line.size)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise TransportError(f"rank {line.rank}, in {_DOING}: no socket can be made: {error}") from error
    port = os.environ.get("MS_SCHED_PORT", "")
    look = Watch(line.size, int(port), everybody).look if port.isdecimal() else None
    return Hub(line.size, line.timeout, server, _TOKEN, line.rank, line.limits, look)


def _enter(line: Line, name: str, seconds: float) -> bool:
    """Whether there is a hub that lets this rank in; one of an earlier meeting, which has had this rank, does not."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(max(seconds, _RETRY_SECONDS))
    try:
        connection.connect(name)
        line.attach(arrive(connection, Guest(_TOKEN, line.rank, line.size)))
        return True
    except OSError:
        connection.close()
        return False

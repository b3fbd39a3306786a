"""Room for connections: each takes one of the files that a process may have open."""

from __future__ import annotations

import contextlib
import os

from ms_ckpt_ext.errors import TransportError

with contextlib.suppress(ImportError):  # not on Windows
    import resource

_SPARE = 32
"""How many files the process itself can still open meanwhile, at least."""
_ELSEWHERE = 256
"""How many files are assumed to be open where the system does not show it."""


def make_room(connections: int, strangers: int) -> None:
    """Raise this process's limit of open files, where the system allows it, so that `connections` more fit.

    Args:
        connections: how many have to fit.
        strangers: room for how many more is made where that is allowed.

    Raises:
        TransportError: the system does not allow `connections` more.
    """
    if "resource" not in globals():
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_files() + connections + _SPARE
    if soft != resource.RLIM_INFINITY and soft < needed + strangers:
        allowed = needed + strangers if hard == resource.RLIM_INFINITY else min(hard, needed + strangers)
        with contextlib.suppress(OSError, ValueError):  # forbidden: the present limit may be enough
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        soft = max(soft, allowed)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise TransportError(
            f"{connections} ranks connect to this process, which may not open more than {hard} files and has "
            f"{needed - connections - _SPARE} open: raise the hard limit where the job is started (ulimit -Hn)"
        )


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return _ELSEWHERE

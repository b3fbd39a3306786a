"""Room for connections: each takes one of the files that a process may have open."""

from __future__ import annotations

import contextlib
import os

from ms_ckpt_ext.errors import TransportError

with contextlib.suppress(ImportError):  # not on Windows
    import resource

_SPARE = 32
"""Files that the process itself may open meanwhile, at least."""
_ELSEWHERE = 256
"""Files that are taken to be open where the system does not tell how many are."""


def make_room(connections: int, strangers: int) -> None:
    """Raise this process's limit of open files, as far as the system lets it, so that `connections` more fit.

    Args:
        connections: that have to fit.
        strangers: as many more are made room for where that is allowed.

    Raises:
        TransportError: they do not fit, whatever this process does.
    """
    if "resource" not in globals():
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_files() + connections + _SPARE
    if soft != resource.RLIM_INFINITY and soft < needed + strangers:
        allowed = needed + strangers if hard == resource.RLIM_INFINITY else min(hard, needed + strangers)
        with contextlib.suppress(OSError, ValueError):  # forbidden: what there is may do
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

"""Which transport fits this process. mindspore is imported only if one of its backends is asked for or in use."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from ms_ckpt_ext.errors import PeerError, TransportError, UsageError, name_ranks
from ms_ckpt_ext.transport.base import Transport

TRANSPORT_VARIABLE = "MS_CKPT_EXT_TRANSPORT"
HOST_VARIABLE = "MS_CKPT_EXT_HOST"
"""The name of this rank's host, where host names do not tell hosts apart."""
_NAMES = ("local", "mccl", "hccl")
DEFAULT_TIMEOUT = 600.0
"""Seconds. A rank that died is noticed at once; this bounds waiting for one that is alive and does not come, and must
be longer than the slowest rank's read of one round from a busy file system."""


_LONGEST = 1e7
"""Seconds, a third of a year: longer means for ever, and the operating system limits how long a wait may be."""


_LENT = threading.local()


@contextlib.contextmanager
def lent(transport: Transport[Any]) -> Iterator[None]:
    """Make this thread a rank: inside, `select_transport` returns `transport` in it."""
    before = getattr(_LENT, "transport", None)
    _LENT.transport = transport
    try:
        yield
    finally:
        _LENT.transport = before


def select_transport(
    device_target: Optional[str] = None,
    override: Optional[str] = None,
    timeout: float = DEFAULT_TIMEOUT,
    group: Optional[str] = None,
) -> Transport[Any]:
    """The transport between the ranks of this job.

    A process whose communication was not initialized, or that is alone in its job, gets "local". All ranks must get
    the same transport: they call this together, and with the same arguments. A thread of a `LocalWorld` is a rank
    of that, whatever the arguments.

    Args:
        device_target: "Ascend" or "CPU"; default: what mindspore is set to.
        override: "local", "mccl" or "hccl"; default: the environment variable MS_CKPT_EXT_TRANSPORT, if set.
        timeout: seconds that one call may last while all ranks are alive.
        group: an existing communication group instead of the whole job (Ascend only).

    Raises:
        UsageError: unknown name or device target, or `group` where it has no meaning.
        TransportError: a backend was asked for whose communication is not initialized; or a rank did not come in time.
        PeerError: a rank ended while the others still waited.
    """
    found: Optional[Transport[Any]] = getattr(_LENT, "transport", None)
    if found is not None:
        return found
    timeout = min(timeout, _LONGEST)
    name = override or os.environ.get(TRANSPORT_VARIABLE) or _fitting(device_target)
    if name not in _NAMES:
        source = "override" if override else TRANSPORT_VARIABLE
        raise UsageError(f"{source}={name!r}: choose one of {', '.join(_NAMES)}, or leave it unset")
    if group is not None and name != "hccl":
        raise UsageError(f"group={group!r} needs the hccl transport, and this job uses {name}")
    if name == "local":
        from ms_ckpt_ext.transport.local import LocalTransport

        return LocalTransport()
    if not _initialized():
        raise TransportError(
            f"the {name} transport was asked for, but this process is not part of a job: start it with msrun and call "
            "mindspore.communication.init() (Ascend: mint.distributed.init_process_group()) before"
        )
    with _first_meeting(timeout) if group is None else contextlib.nullcontext():
        if name == "mccl":
            from ms_ckpt_ext.transport.mccl import Mccl

            return Mccl(timeout)
        from ms_ckpt_ext.transport.hccl import Hccl

        return Hccl(timeout, group)


@contextlib.contextmanager
def _first_meeting(timeout: float) -> Iterator[None]:
    """The ranks of this host meet; the body, in which all ranks do, is part of it. An error names those missing."""
    from ms_ckpt_ext.transport.roll import calling_roll

    communication = sys.modules["mindspore"].communication
    rank, size = communication.get_rank(), communication.get_group_size()
    with calling_roll(rank, size, timeout), naming_absent(*_meet(timeout)):
        yield


def _meet(timeout: float) -> tuple[list[int], int]:
    """Wait for the ranks of this host, where their number is known; returns them, and the size of the job."""
    communication = sys.modules["mindspore"].communication
    everybody = communication.get_group_size()
    if os.environ.get(HOST_VARIABLE):  # MindSpore counts the ranks of a host name, which several hosts may have
        return [], everybody
    try:
        rank, size = communication.get_local_rank(), communication.get_local_rank_size()
    except RuntimeError:  # the backend does not count hosts
        return [], everybody
    from ms_ckpt_ext.transport import gate

    return gate.meet(rank, size, timeout, size == everybody, number=communication.get_rank()), everybody


@contextlib.contextmanager
def naming_absent(here: Sequence[int], size: int) -> Iterator[None]:
    """Add to the error of a first meeting that is incomplete which ranks may be missing.

    Args:
        here: ranks of this host, all of which have come; empty where that is not known.
        size: ranks of the job.
    """
    try:
        yield
    except TransportError as error:
        from ms_ckpt_ext.transport.control import FIRST_MEETING

        others = [rank for rank in range(size) if rank not in here]
        if not here or not others or isinstance(error, PeerError) or FIRST_MEETING not in str(error):
            raise
        raise TransportError(
            f"{error}. Of this host {name_ranks(here)} have come; look at the logs of the others: {name_ranks(others)}"
        ) from error


def _fitting(device_target: Optional[str]) -> str:
    if not _initialized():
        return "local"
    mindspore = sys.modules["mindspore"]
    if mindspore.mint.distributed.get_world_size() == 1:
        return "local"
    target = device_target or mindspore.get_context("device_target")
    fitting = {"CPU": "mccl", "Ascend": "hccl"}.get(target)
    if fitting is None:
        raise UsageError(f"device target {target!r}: only CPU and Ascend are known")
    return fitting


def _initialized() -> bool:
    """Whether this process is one of several that can communicate, which takes mindspore to be imported."""
    mindspore = sys.modules.get("mindspore")
    return mindspore is not None and bool(mindspore.mint.distributed.is_initialized())

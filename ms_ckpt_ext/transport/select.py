"""Which transport fits the process as it is. mindspore is imported only if a backend of its is asked for or in use."""

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
"""What this rank's host is called, where host names do not tell hosts apart."""
_NAMES = ("local", "mccl", "hccl")
DEFAULT_TIMEOUT = 600.0
"""Seconds. A rank that died is noticed at once; this bounds waiting for one that lives and does not come, and must be
longer than the slowest rank's read of one round from a loaded file system."""


_LONGEST = 1e7
"""Seconds, a third of a year: who waits longer waits for ever, and the operating system's clocks have an end."""


_LENT = threading.local()


@contextlib.contextmanager
def lent(transport: Transport[Any]) -> Iterator[None]:
    """Meanwhile this thread is a rank of its own: `select_transport` gives it `transport`."""
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

    A process whose communication was not initialized, or is alone in its job, is on its own: "local". All ranks must
    come to the same answer: they call this together, and with the same arguments. A thread of a `LocalWorld` is a rank
    of that, whatever the arguments.

    Args:
        device_target: "Ascend" or "CPU"; default: what mindspore is set to.
        override: "local", "mccl" or "hccl"; default: the environment variable MS_CKPT_EXT_TRANSPORT, if set.
        timeout: seconds that one call may last while all ranks are alive.
        group: an existing communication group instead of the whole job (Ascend only).

    Raises:
        UsageError: unknown name or device target, or `group` where it has no meaning.
        TransportError: a backend was asked for whose communication is not initialized; or a rank did not come in time.
        PeerError: a rank has gone while the others waited for more.
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
    """The ranks of this host meet; what all ranks do then is part of it. An error says who has not come."""
    from ms_ckpt_ext.transport.roll import calling_roll

    communication = sys.modules["mindspore"].communication
    rank, size = communication.get_rank(), communication.get_group_size()
    with calling_roll(rank, size, timeout), naming_absent(*_meet(timeout)):
        yield


def _meet(timeout: float) -> tuple[list[int], int]:
    """Wait for the ranks of this host, where it is known how many they are; which they are, of how many."""
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
    """Say in the error of a first meeting that not all come to which ranks that may be.

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
    """Whether this process is one of several that can communicate. Nobody could have done that without mindspore."""
    mindspore = sys.modules.get("mindspore")
    return mindspore is not None and bool(mindspore.mint.distributed.is_initialized())

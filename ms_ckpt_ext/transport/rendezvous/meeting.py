"""All ranks connect to the hub that rank 0 opens, or none does and all learn why.

1. Every rank says where it is, so that rank 0 knows whether the loopback interface is enough.
2. Rank 0 listens, and says where; or why it cannot.
3. Every rank tries to connect, and reports the result; when one cannot, all give up.

All three use a collective of the backend, whose communicator works before there is any connection of ours.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

from ms_ckpt_ext.errors import CheckpointError, TransportError, name_ranks
from ms_ckpt_ext.transport.agree import decode_all, understanding
from ms_ckpt_ext.transport.rendezvous.addresses import CONTROL_ADDRESS_VARIABLE, Invitation
from ms_ckpt_ext.transport.rendezvous.cells import gather_messages
from ms_ckpt_ext.transport.rendezvous.greeting import new_token
from ms_ckpt_ext.transport.rendezvous.interfaces import network_identity
from ms_ckpt_ext.transport.rendezvous.listening import listen
from ms_ckpt_ext.transport.rendezvous.search import Arrival, connect

_LONGEST_PROBLEM = 2000
_FAILED = b"!"
"""Start of a message that says why there is no invitation."""

AllGather = Callable[[bytes], list[bytes]]
"""All-gathers at most `cells.CELL_ROOM` bytes from every rank."""
OpenHub = Callable[[socket.socket, str], object]
"""Opens a hub that owns the listening socket from here on, and knows the token. Raises TransportError."""


class Site(NamedTuple):
    """Where a rank is: its network, see `interfaces.network_identity`, and the name of its host."""

    network: str
    name: str


def come_to_hub(gather: AllGather, rank: int, size: int, open_hub: OpenHub, seconds: float) -> Arrival:
    """Connect this rank to the hub. Collective; `open_hub` is called on rank 0.

    Args:
        seconds: how long a rank tries to reach rank 0.

    Raises:
        TransportError: on all ranks, when rank 0 cannot listen or any rank cannot reach it; reports what was tried.
    """
    sites = decode_all(gather_messages(gather, f"{network_identity()} {socket.gethostname()}".encode()), site_told)
    mine = _invite(open_hub, alone=len({site.network for site in sites}) == 1) if rank == 0 else b""
    invitation = gather_messages(gather, mine)[0]
    if invitation.startswith(_FAILED):
        raise TransportError(f"rank 0 (on {sites[0].name}): {invitation[1:].decode(errors='replace')}")
    with understanding(0):
        invited = Invitation.decode(invitation)
    arrival, problem = _try(invited, rank, size, seconds, sites[rank].network == sites[0].network)
    problems = [message.decode(errors="replace") for message in gather_messages(gather, problem.encode())]
    if any(problems):
        if arrival is not None:
            arrival.connection.close()
        raise TransportError(_told(problems, sites, rank))
    assert arrival is not None
    return arrival


def site_told(message: bytes) -> Site:
    """Where a rank says that it is. Raises ValueError."""
    network, name = message.decode().split(" ", 1)
    return Site(network, name)


def _invite(open_hub: OpenHub, alone: bool) -> bytes:
    token = new_token()
    try:
        server, addresses = listen(alone)
        open_hub(server, token)
    except CheckpointError as error:
        return _FAILED + str(error).encode()[:_LONGEST_PROBLEM]
    return Invitation(addresses, token).encode()


def _try(invitation: Invitation, rank: int, size: int, seconds: float, near: bool) -> tuple[Optional[Arrival], str]:
    """The arrival, or why there is none."""
    try:
        return connect(invitation, rank, size, seconds, near), ""
    except CheckpointError as error:
        return None, str(error)[:_LONGEST_PROBLEM]


def _told(problems: Sequence[str], sites: Sequence[Site], rank: int) -> str:
    failed = [number for number, problem in enumerate(problems) if problem]
    shown = rank if problems[rank] else failed[0]
    others = "" if failed == [shown] else f" ({name_ranks(failed)} cannot)"
    return (
        f"rank {shown} (on {sites[shown].name}) cannot reach rank 0 (on {sites[0].name}){others}: {problems[shown]}. "
        f"Allow TCP connections to one of these addresses, or open a port and name it by {CONTROL_ADDRESS_VARIABLE}="
        "host:port"
    )

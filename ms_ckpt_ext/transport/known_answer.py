"""Known bytes before real ones: a backend may return success and deliver other bytes than were sent.

Once per process every rank sends every rank bytes that both can compute, by each bulk exchange that loads make. What
arrives is compared, and all ranks learn the first difference: which call, which ranks, what was expected and found.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.agree import share_texts
from ms_ckpt_ext.transport.base import B, Bytes, Ranks, Transport

_EACH = 16
"""Bytes of every stretch; also what a plan aligns stretches to."""


def prove(transport: Transport[B], to_host: Callable[[B], Bytes], backend: str) -> None:
    """Compare what each bulk exchange delivers with what it should. Collective.

    Args:
        to_host: returns the contents of one of the transport's buffers.
        backend: what the error calls the transport's backend and device.

    Raises TransportError on every rank: some rank got other bytes than were sent to it.
    """
    answers = {
        "all_to_all": _all_to_all(transport),
        "all_gather": _all_gather(transport),
        "broadcast": _broadcast(transport),
    }
    wrong = [_difference(call, to_host(came), wanted) for call, (came, wanted) in answers.items()]
    told = share_texts(transport, "; ".join(filter(None, wrong)))
    if any(told):
        where = "; ".join(f"rank {rank}: {differs}" for rank, differs in enumerate(told) if differs)
        raise _untrue(backend, where)


def prove_group(transport: Transport[B], group: Ranks, to_host: Callable[[B], Bytes], backend: str) -> None:
    """`prove` in a group, by its members. Raises TransportError on those that got other bytes than were sent."""
    came, wanted = _all_gather(transport, group)
    wrong = _difference("all_gather", to_host(came), wanted)
    if wrong:
        raise _untrue(backend, f"rank {transport.rank}, in a group of {len(group)}: {wrong}")


def _untrue(backend: str, where: str) -> TransportError:
    return TransportError(
        f"{backend} returned success and other bytes than were sent, in a test with known contents "
        f'({where}). Load with mode="direct", which needs no exchange, or install a release of the backend '
        "without this fault"
    )


def _all_to_all(transport: Transport[B]) -> tuple[B, Bytes]:
    rank, peers = transport.rank, range(transport.size)
    counts = [_EACH] * transport.size
    send = _sent(transport, np.concatenate([_known(rank, peer) for peer in peers]))
    wanted = np.concatenate([_known(peer, rank) for peer in peers])
    receive = _sent(transport, _other(wanted))
    transport.start_all_to_all(send, counts, receive, counts).wait()
    return receive, wanted


def _all_gather(transport: Transport[B], group: Ranks = ()) -> tuple[B, Bytes]:
    wanted = np.concatenate([_known(peer, transport.size) for peer in group or range(transport.size)])
    send, receive = _sent(transport, _known(transport.rank, transport.size)), _sent(transport, _other(wanted))
    transport.start_all_gather(send, _EACH, receive, group).wait()
    return receive, wanted


def _broadcast(transport: Transport[B]) -> tuple[B, Bytes]:
    root, wanted = transport.size - 1, _known(transport.size, transport.size)
    buffer = _sent(transport, wanted if transport.rank == root else _other(wanted))
    transport.start_broadcast(buffer, _EACH, root).wait()
    return buffer, wanted


def _sent(transport: Transport[B], contents: Bytes) -> B:
    """A buffer of the transport that holds `contents`."""
    host = transport.pinned(contents.nbytes)
    host[:] = contents
    buffer = transport.allocate(contents.nbytes)
    transport.upload(host, buffer, 0)
    return buffer


def _known(source: int, target: int) -> Bytes:
    """No two pairs of neighbors have the same bytes, and none is zero."""
    return ((np.arange(_EACH) * 7 + source * 31 + target * 101) % 251 + 1).astype(np.uint8)


def _other(contents: Bytes) -> Bytes:
    """As many bytes, each different from the one in `contents`."""
    return np.invert(contents)


def _difference(call: str, came: Bytes, wanted: Bytes) -> str:
    """The first stretch that differs, in words; nothing if none does."""
    rows: Any = came[: wanted.nbytes].reshape(-1, _EACH), wanted.reshape(-1, _EACH)
    for number, (found, expected) in enumerate(zip(*rows)):
        if not np.array_equal(found, expected):
            source = "" if call == "broadcast" else f" of rank {number}"
            return f"{call}: expected {expected[:8].tobytes().hex()}…{source}, found {found[:8].tobytes().hex()}…"
    return ""

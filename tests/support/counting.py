"""Counts the calls of one rank of a `LocalWorld`, and the bytes that it gives to others."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Callable

from ms_ckpt_ext.transport.local import LocalTransport


class Counts:
    """What one rank did.

    Attributes:
        collectives: name of the call -> how often the rank made it.
        given: bytes that it gave to every other rank in bulk exchanges.
        messages: how many stretches of it; a share of an all-gather is one for every rank that gets it.
    """

    def __init__(self) -> None:
        self.collectives: Counter[str] = Counter()
        self.given: Counter[int] = Counter()
        self.messages = 0

    @property
    def sent(self) -> int:
        """Bytes that the rank gave to others in bulk exchanges."""
        return sum(self.given.values())


def counted(transport: LocalTransport) -> Counts:
    """Count from here on, also the calls of code that gets this transport from `select_transport`.

    The counter holds no reference to the transport, which is freed, with its connections, when nobody else has one.
    """
    counts, everybody, rank, its = Counts(), range(transport.size), transport.rank, weakref.ref(transport)

    def counting(call: str, given: Callable[..., Mapping[int, int]]) -> None:
        start = getattr(type(transport), f"start_{call}")
        counted_before = vars(transport).get(f"start_{call}")

        def counted_call(*args: Any) -> Any:
            started = counted_before(*args) if counted_before else start(its(), *args)
            counts.collectives[call] += 1
            for peer, nbytes in given(*args).items():
                if peer != rank:
                    counts.given[peer] += nbytes
                    counts.messages += nbytes > 0
            return started

        setattr(transport, f"start_{call}", counted_call)

    def of_share(payload: bytes) -> Mapping[int, int]:
        return {}

    def of_all_gather(send: Any, nbytes: int, recv: Any, group: Sequence[int] = ()) -> Mapping[int, int]:
        return dict.fromkeys(group or everybody, nbytes)

    def of_broadcast(buffer: Any, nbytes: int, root: int, group: Sequence[int] = ()) -> Mapping[int, int]:
        return dict.fromkeys(group or everybody, nbytes) if root == rank else {}

    def of_all_to_all(send: Any, send_counts: Sequence[int], *_: Any) -> Mapping[int, int]:
        return dict(enumerate(send_counts))

    counting("share", of_share)
    counting("all_gather", of_all_gather)
    counting("broadcast", of_broadcast)
    counting("all_to_all", of_all_to_all)
    return counts

"""Payloads that are too large for a hub: they go over the backend, so no process sends them to all others.

First all ranks gather a note of each payload; notes are equally long. Then every distinct payload is sent once, by the
lowest rank that has it: its front in one all-gather, to which all contribute equally much, and the rest in a
broadcast of its own. The length of the fronts is the one that costs least in bytes and calls.

A collective that one rank does not join cannot be cancelled. So before each, buffers are made and filled, and a status
says whether all ranks could.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Callable

import numpy as np

from ms_ckpt_ext.errors import naming
from ms_ckpt_ext.transport.agree import MOST_SHARED, decode_all, on_all
from ms_ckpt_ext.transport.base import B, Bytes, Transport
from ms_ckpt_ext.transport.hub.frames import NOTE_BYTES, length_noted, note_of

_CALL_BYTES = 1 << 16
"""Bytes that move in the time that a call takes, as an order of magnitude."""


def gather(transport: Transport[B], payload: bytes, to_host: Callable[[B], Bytes]) -> list[bytes]:
    """Every rank's payload, in rank order. A collective.

    Args:
        to_host: returns the contents of one of the transport's buffers.
    """
    with naming("gather what the ranks tell each other"):
        return _gather(transport, payload, to_host)


def _gather(transport: Transport[B], payload: bytes, to_host: Callable[[B], Bytes]) -> list[bytes]:
    notes = _gather_fronts(transport, note_of(payload), NOTE_BYTES, to_host)
    noted = decode_all(notes, _length)
    first = {note: rank for rank, note in reversed(list(enumerate(notes)))}
    lengths = [length if first[note] == rank else 0 for rank, (note, length) in enumerate(zip(notes, noted))]
    width = front_width(lengths)
    contents = _gather_fronts(transport, payload[:width], width, to_host) if width else [b""] * transport.size
    longer = {root: length - width for root, length in enumerate(lengths) if length > width}
    for root, rest in _broadcast_rests(transport, payload[width:], longer, to_host).items():
        contents[root] += rest
    distinct = {note: contents[rank][: length_noted(note)] for note, rank in first.items()}
    return [distinct[note] for note in notes]


def _length(note: bytes) -> int:
    """The length of a payload. Raises ValueError where no rank shares that much."""
    length = length_noted(note)
    if length > MOST_SHARED:
        raise ValueError(f"a payload of {length} bytes, where {MOST_SHARED} are the most")
    return length


def front_width(lengths: Sequence[int]) -> int:
    """How many bytes every rank gives to the all-gather, for payloads of these lengths.

    >>> front_width([0, 0, 5_000_000, 0]), front_width([9, 10, 8, 7]), front_width([9, 10, 8, 5_000_000])
    (0, 10, 10)
    """
    ordered = sorted(lengths, reverse=True)
    longer = [0, *accumulate(ordered)]  # bytes of the n longest
    best = min(
        (len(lengths) * width + longer[n] - n * width + n * _CALL_BYTES, width) for n, width in enumerate([*ordered, 0])
    )
    return best[1]


def _gather_fronts(transport: Transport[B], mine: bytes, width: int, to_host: Callable[[B], Bytes]) -> list[bytes]:
    def prepare() -> tuple[B, B]:
        send, receive = transport.allocate(width), transport.allocate(width * transport.size)
        _upload(transport, mine.ljust(width, b"\0"), send)
        return send, receive

    send, receive = on_all(transport, prepare)
    transport.start_all_gather(send, width, receive).wait()
    return [row.tobytes() for row in to_host(receive).reshape(transport.size, width)]


def _broadcast_rests(
    transport: Transport[B], mine: bytes, lengths: dict[int, int], to_host: Callable[[B], Bytes]
) -> dict[int, bytes]:
    """What follows the fronts of payloads: rank -> as many bytes as `lengths` says."""

    def prepare() -> dict[int, B]:
        buffers = {root: transport.allocate(nbytes) for root, nbytes in lengths.items()}
        if transport.rank in buffers:
            _upload(transport, mine, buffers[transport.rank])
        return buffers

    buffers = on_all(transport, prepare) if lengths else {}
    for root, nbytes in lengths.items():
        transport.start_broadcast(buffers[root], nbytes, root).wait()
    return {root: to_host(buffer).tobytes() for root, buffer in buffers.items()}


def _upload(transport: Transport[B], payload: bytes, buffer: B) -> None:
    host = transport.pinned(len(payload))
    host[:] = np.frombuffer(payload, np.uint8)
    transport.upload(host, buffer, 0)

"""Messages of any length over a collective that gathers short ones."""

from __future__ import annotations

import struct
from typing import Callable

from ms_ckpt_ext.transport.agree import decode_all

CELL_BYTES = 128
"""Bytes of each rank in one all-gather of the backend."""
CELL_ROOM = CELL_BYTES - 8
"""How much of a cell a message may take; see `control.pack_cell`."""
_TOTAL = struct.Struct("<I")
_LONGEST = 1 << 16
"""Bytes of a message at most: an invitation by all addresses of a host, or an error, is shorter."""


def gather_messages(cells: Callable[[bytes], list[bytes]], message: bytes) -> list[bytes]:
    """Every rank's message, in rank order. A collective: one call of `cells` for short ones, more for longer.

    Args:
        cells: all-gathers at most `CELL_ROOM` bytes from every rank.

    Raises TransportError: on all ranks alike, when one tells a length that no message has.
    """
    rest = _TOTAL.pack(len(message)) + message
    received = [bytearray(cell) for cell in cells(rest[:CELL_ROOM])]
    totals = [total + _TOTAL.size for total in decode_all(map(bytes, received), _length)]
    for at in range(CELL_ROOM, max(totals), CELL_ROOM):
        for got, cell in zip(received, cells(rest[at : at + CELL_ROOM])):
            got += cell
    return [bytes(got[_TOTAL.size : total]) for got, total in zip(received, totals)]


def _length(cell: bytes) -> int:
    """The length of a message, from its first cell. Raises ValueError or struct.error."""
    (total,) = _TOTAL.unpack_from(cell)
    if total > _LONGEST:
        raise ValueError(f"a message of {total} bytes, where {_LONGEST} are the most")
    return int(total)

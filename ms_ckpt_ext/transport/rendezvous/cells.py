"""Messages of any length over a collective that gathers short ones."""

from __future__ import annotations

import struct
from typing import Callable

CELL_BYTES = 128
"""Bytes of each rank in one all-gather of the backend."""
CELL_ROOM = CELL_BYTES - 8
"""How much of a cell a message may take; see `control.pack_cell`."""
_TOTAL = struct.Struct("<I")


def gather_messages(cells: Callable[[bytes], list[bytes]], message: bytes) -> list[bytes]:
    """Every rank's message, in rank order. A collective: one call of `cells` for short ones, more for longer.

    Args:
        cells: all-gathers at most `CELL_ROOM` bytes from every rank.
    """
    rest = _TOTAL.pack(len(message)) + message
    received = [bytearray(cell) for cell in cells(rest[:CELL_ROOM])]
    totals = [_TOTAL.unpack_from(got)[0] + _TOTAL.size for got in received]
    for at in range(CELL_ROOM, max(totals), CELL_ROOM):
        for got, cell in zip(received, cells(rest[at : at + CELL_ROOM])):
            got += cell
    return [bytes(got[_TOTAL.size : total]) for got, total in zip(received, totals)]

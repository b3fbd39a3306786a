"""What every rank holds of one side of a transfer, shared with all ranks.

A slice says how it lies: as one cell of a layout, or as a box. One that does not is whole, and alike on all ranks that
hold it, which is checked. The n-th rank of a side has the n-th place in its layouts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DTYPES, Shape
from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.layout import Layout, layout_from_json
from ms_ckpt_ext.errors import UsageError, name_ranks
from ms_ckpt_ext.transport.agree import LAYOUT, NATURAL, WHOLE, Maybe, parsed, share_alike
from ms_ckpt_ext.transport.base import Transport


class HeldSlice(NamedTuple):
    """What a rank holds under a name.

    Attributes:
        dtype: as safetensors names it.
        shape: of the slice.
        layout: the one of which it is a cell; None where none is known.
        box: the box that it is; None where a layout says so.
    """

    dtype: str
    shape: Shape
    layout: Optional[Layout] = None
    box: Optional[Box] = None

    @property
    def listed(self) -> bool:
        """Whether something says how it lies."""
        return self.layout is not None or self.box is not None


Holds = Mapping[str, HeldSlice]
_BOX = ([NATURAL], [NATURAL], [NATURAL])
"""The form of a `Box`: see `transport.agree.JsonForm`."""


def members_of(
    transport: Transport[Any], takes_part: bool, named: Optional[Sequence[int]], side: str
) -> tuple[int, ...]:
    """The ranks of a side, in the order of their places. Collective.

    Args:
        takes_part: whether this rank belongs to the side.
        named: the ranks given by the user instead; the same on all ranks.
        side: "source" or "target".

    Raises UsageError: on all ranks, when no rank takes part, or a named one does not.
    """
    there = [rank for rank, answer in enumerate(transport.share(b"y" if takes_part else b"")) if answer]
    ranks = tuple(there) if named is None else tuple(named)
    if len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(transport.size)):
        raise UsageError(f"{side}_ranks must be different ranks below {transport.size}, got {list(ranks)}")
    absent = [rank for rank in ranks if rank not in there]
    if absent:
        raise UsageError(
            f"{side}_ranks names {name_ranks(absent)}, where `{side}` is None: give the network there, or leave the "
            "rank out"
        )
    if not ranks:
        raise UsageError(f"`{side}` is None on all ranks: some must hold what is to be moved, and some take it")
    return ranks


def share_holds(transport: Transport[Any], mine: Holds) -> list[Holds]:
    """What every rank holds, by rank. Ranks that hold the same in the same layouts share one mapping. Collective."""
    return share_alike(transport, _encode(mine), _decode)


def _encode(holds: Holds) -> bytes:
    layouts = list(dict.fromkeys(each.layout for each in holds.values() if each.layout is not None))
    number: dict[Optional[Layout], int] = {layout: n for n, layout in enumerate(layouts)}
    rows = [[name, h.dtype, h.shape, number.get(h.layout, -1), h.box] for name, h in holds.items()]
    return json.dumps([layouts, rows]).encode()


def _decode(content: bytes) -> Holds:
    described, rows = parsed(content, ([LAYOUT], [(str, str, [NATURAL], WHOLE, Maybe(_BOX))]))
    layouts = [layout_from_json(each) for each in described]
    return {
        name: HeldSlice(
            DTYPES[dtype].name, tuple(shape), layouts[number] if number >= 0 else None, Box(*box) if box else None
        )
        for name, dtype, shape, number, box in rows
    }

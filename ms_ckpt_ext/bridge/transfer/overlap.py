"""Memory shared by both sides, or within the target, of a transfer: writing one would change what the other gives.

A Parameter that takes exactly its own bytes is no such case: there is nothing to move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ms_ckpt_ext.bridge.match import Match
from ms_ckpt_ext.bridge.transfer.sides import plain
from ms_ckpt_ext.core.exchange.demand import LocalPiece
from ms_ckpt_ext.errors import UsageError


class _Stretch(NamedTuple):
    """Where a Parameter lies in memory."""

    start: int
    stop: int
    name: str
    written: bool


def stays(match: Match, pieces: Sequence[LocalPiece], source: Mapping[str, Any]) -> bool:
    """Whether a Parameter is the very one that it would be filled from, at the same places."""
    if len(pieces) != 1 or plain(source[pieces[0].name]) is not plain(match.parameter):
        return False
    (piece,) = pieces
    return (
        piece.view is None
        and not piece.into
        and piece.in_source == piece.in_target
        and piece.in_source.shape == piece.shape
    )


def refuse_overlaps(written: Iterable[Any], read: Mapping[str, Any]) -> None:
    """Raise UsageError where Parameters that are written share memory with others that are, or with those read."""
    stretches = [_stretch(parameter, parameter.name, True) for parameter in written]
    stretches += [_stretch(parameter, name, False) for name, parameter in read.items()]
    known = sorted(each for each in stretches if each.stop > each.start)
    reach: dict[bool, _Stretch] = {}
    for each in known:
        for before in reach.values():
            if before.stop > each.start and (before.written or each.written):
                raise UsageError(
                    f"{_told(each)} and {_told(before)} share memory, and one is written while the other is moved: "
                    "give the target Parameters of its own"
                )
        last = reach.get(each.written)
        if last is None or last.stop < each.stop:
            reach[each.written] = each


def _told(each: _Stretch) -> str:
    return f"{each.name!r} of the {'target' if each.written else 'source'}"


def _stretch(parameter: Any, name: str, written: bool) -> _Stretch:
    start, stop = _span(parameter)
    return _Stretch(start, stop, name, written)


def _span(parameter: Any) -> tuple[int, int]:
    """First byte and the one after the last; (0, 0) where there is no memory yet."""
    if parameter.has_init or getattr(parameter, "is_meta", False):
        return 0, 0
    start = int(parameter.data_ptr())
    return (start, start + _nbytes(parameter)) if start else (0, 0)


def _nbytes(parameter: Any) -> int:
    return int(parameter.itemsize * math.prod(parameter.shape))

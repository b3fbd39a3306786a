"""Of a plan's columns, what concerns one rank, and what all ranks do alike whether or not it concerns them.

A rank makes objects only of the parts that it gives or takes. In which rounds anybody exchanges anything, or sends it
on, it must know of all parts, for collectives are called by all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import Chunks
from ms_ckpt_ext.core.exchange.demand import Servers
from ms_ckpt_ext.core.exchange.ragged import Ints, Sets
from ms_ckpt_ext.core.exchange.tiers import teams_of

_NONE, _SEVERAL = -1, -2


def concerning(chunks: Chunks, rank: int) -> Ints:
    """Of every part, whether this rank reads it, or gets some of it."""
    rows = chunks.parts.rows
    inside = np.array([rank in members for members in chunks.parts.sets.members], bool)
    gets = _any(inside[rows.ranks], rows.start)[chunks.parts.row]
    found: Ints = gets | (chunks.reader == rank)[chunks.of_part]
    return found


class Moving(NamedTuple):
    """By round, in order: whether some rank sends another some by all-to-all; and whether any sends some on."""

    exchanges: tuple[bool, ...]
    spreads: tuple[bool, ...]


def moving(chunks: Chunks, world: int, round_of: Ints, servers: Servers) -> Moving:
    """What happens in every round; `servers`: of the ranks in a tiered plan, none in a flat one."""
    rows, sets = chunks.parts.rows, chunks.parts.sets
    single = np.array([members[0] if len(members) == 1 else _SEVERAL for members in sets.members], np.int64)
    reader = chunks.reader.astype(np.int64)[chunks.of_part]
    alone = reader < world  # what groups are fed goes otherwise
    exchanged = alone & (_alike(single[rows.ranks], rows.start)[chunks.parts.row] != reader)
    rounds = int(round_of.max(initial=-1)) + 1
    exchanges = np.bincount(round_of[exchanged], minlength=rounds) > 0
    spread = np.zeros(len(reader), bool)
    if servers:
        of_rank = np.append(np.array(servers, np.int64), _NONE)
        full = _alike(_full_servers(sets, servers)[rows.ranks], rows.start)[chunks.parts.row]
        spread = alone & (full != _NONE) & (full != of_rank[np.minimum(reader, world)])
    spreads = np.bincount(round_of[spread], minlength=rounds) > 0
    return Moving(tuple(exchanges.tolist()), tuple(spreads.tolist()))


def _full_servers(sets: Sets, servers: Servers) -> Ints:
    """Of every set, the server that several of its ranks are on; or that there is none, or are several."""
    found = []
    for members in sets.members:
        full = [server for server, team in teams_of(members, servers).items() if len(team) > 1]
        found.append(full[0] if len(full) == 1 else _SEVERAL if full else _NONE)
    return np.array(found, np.int64)


def _any(values: Ints, start: Ints) -> Ints:
    """Of every row of a ragged table whether any of its values is true."""
    before = np.concatenate([[0], np.cumsum(values)])
    found: Ints = before[start[1:]] > before[start[:-1]]
    return found


def _alike(values: Ints, start: Ints) -> Ints:
    """Of every row of a ragged table, none of them empty, the value that all have but for `_NONE`; or `_SEVERAL`."""
    if not len(values):
        return np.empty(0, np.int64)
    none, least, most = values == _NONE, np.iinfo(np.int64).min, np.iinfo(np.int64).max
    high = np.maximum.reduceat(np.where(none, least, values), start[:-1])
    low = np.minimum.reduceat(np.where(none, most, values), start[:-1])
    found: Ints = np.where(high == least, _NONE, np.where(low == high, high, _SEVERAL))
    return found

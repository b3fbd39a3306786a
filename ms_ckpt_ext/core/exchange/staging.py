"""Reads in memory: how they lie there, and how much of every rank's they take at once.

The chunks that a rank reads for a round lie one after another in *slabs*, buffers of one size; one that no longer fits
begins another. A rank takes the slabs of a round when it begins to read it, some rounds ahead, and gives each back when
the last round that needs some of it is over. While a round is made ready the one before it is still under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, SLAB
from ms_ckpt_ext.core.exchange.plan import ExchangeTable
from ms_ckpt_ext.core.exchange.ragged import Ints, by_number, joined, narrow
from ms_ckpt_ext.core.exchange.streams import Gathering


class Reads(NamedTuple):
    """All reads, as columns: the rank, the file, the bytes, and the first and last round that needs them."""

    reader: Ints
    file: Ints
    nbytes: Ints
    first: Ints
    last: Ints


def reads_of(table: ExchangeTable, gathered: Sequence[Gathering]) -> Reads:
    """The chunks that one rank reads, and the pieces of streams, in the order of the plan's chunks."""
    chunks, start = table.chunks, table.chunks.start[:-1]
    alone = (chunks.reader < table.world) & (not chunks.parts.in_memory)
    first, last = (by.reduceat(table.round_of, start)[alone] for by in (np.minimum, np.maximum))
    columns = [[chunks.reader[alone], chunks.file[alone], chunks.nbytes[alone].astype(np.int64), first, last]]
    for each in gathered:
        pieces = each.stream.pieces
        members = np.array(chunks.parts.sets.members[each.group.ranks])
        when = np.full(len(pieces.member), each.round)
        columns.append([members[pieces.member], pieces.file, pieces.nbytes, when, when])
    return Reads(*(joined(column, column[0].dtype) for column in zip(*columns)))


def held_bytes(reads: Reads, world: int, rounds: int, prefetch: int) -> Ints:
    """Bytes of the slabs that every rank holds at once, at the peak; `prefetch`: rounds that are read ahead."""
    slabs = _slabs_of(reads, world)
    by_first, begin = by_number(slabs.first, rounds)
    by_last, end = by_number(slabs.last, rounds)
    now, most = np.zeros(world, np.int64), np.zeros(world, np.int64)
    begun = over = 0
    for number in range(rounds):
        ahead = begin[min(number + prefetch + 1, rounds)]
        now += np.bincount(slabs.reader[by_first[begun:ahead]], minlength=world)
        np.maximum(most, now, out=most)
        now -= np.bincount(slabs.reader[by_last[over : end[number]]], minlength=world)
        begun, over = ahead, end[number]
    return most * slabs.size


class _Slabs(NamedTuple):
    """Slabs, as columns: the rank, the round that they are read for, and the last that needs some of them; and by rank
    the bytes of each of its slabs."""

    reader: Ints
    first: Ints
    last: Ints
    size: Ints


def _slabs_of(reads: Reads, world: int) -> _Slabs:
    """As large as what is read for a round, up to `SLAB`, and as the largest chunk."""
    order = np.lexsort((reads.first, reads.reader)).astype(narrow(len(reads.reader)))
    reader, first, nbytes = reads.reader[order], reads.first[order], reads.nbytes[order]
    before = np.concatenate([[0], np.cumsum(nbytes + -nbytes % ALIGNMENT)])
    begins = np.append(True, (np.diff(reader) != 0) | (np.diff(first) != 0))[: len(order)]
    runs = np.append(np.flatnonzero(begins), len(order))
    at, stop = runs[:-1], runs[1:]
    size = np.zeros(world, np.int64)
    np.maximum.at(size, reader[at], np.minimum(before[stop] - before[at], SLAB))
    np.maximum.at(size, reader, nbytes)
    ends = before[:-1] + nbytes
    while len(at):  # every run at once: fill a slab, go on with what is left
        at = np.searchsorted(ends, before[at] + size[reader[at]], side="right")
        at, stop = at[at < stop], stop[at < stop]
        begins[at] = True
    of_each = np.flatnonzero(begins)
    return _Slabs(reader[of_each], first[of_each], np.maximum.reduceat(reads.last[order], of_each), size)

"""What a plan costs every rank: bytes, messages, memory, counted round by round without running anything.

The numbers are those that a load with this plan counts itself: payload by the plan, staging by the byte layout of
`core.exchange.one_rank` (blocks padded, buffers as large as the largest round needs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT
from ms_ckpt_ext.core.exchange.plan import ExchangeTable
from ms_ckpt_ext.core.exchange.ragged import Ints, entries_of, narrow, starts, sums

MATRIX = 64
"""Rows and columns of the matrix of traffic at most; larger worlds are shown by groups of neighbouring ranks."""


class RoundTally(NamedTuple):
    """One round, in bytes: all ranks together, and the rank with the most."""

    read: int
    most_read: int
    moved: int
    most_received: int
    messages: int


@dataclass(frozen=True)
class RankTotals:
    """Per rank, as arrays.

    Attributes:
        wanted: bytes of its own slices.
        read, reads: bytes and calls of its reading.
        sent, received: payload bytes to and from other ranks.
        messages: blocks it sends to other ranks, over all rounds.
        staging: bytes of its exchange buffers and of chunks held at once, at the peak.
        rounds: the rounds, in order.
        matrix: bytes that a group of ranks (row) sends to another (column), reads of a group for itself not counted.
        group: ranks of a group.
        files: bytes that a group of ranks (row) reads of a group of files (column).
        file_group: files of a group.
    """

    wanted: Ints
    read: Ints
    reads: Ints
    sent: Ints
    received: Ints
    messages: Ints
    staging: Ints
    rounds: tuple[RoundTally, ...]
    matrix: Ints
    group: int
    files: Ints
    file_group: int


def tally(table: ExchangeTable, prefetch: int = 1) -> RankTotals:
    """Count a plan. `prefetch`: rounds that are read ahead."""
    return _Counter(table, prefetch).count()


class _Counter:
    def __init__(self, table: ExchangeTable, prefetch: int) -> None:
        world = table.world
        self._table, self._world = table, world
        self._reader = np.repeat(table.chunks.reader, np.diff(table.chunks.start))
        self._group = -(-world // MATRIX)
        self._groups = -(-world // self._group)
        self._matrix = np.zeros(self._groups**2, np.int64)
        place = table.classes.of_rank.astype(np.int64) * self._groups + np.arange(world) // self._group
        places, self._ranks_there = np.unique(place, return_counts=True)
        self._there = places % self._groups
        self._places = starts(np.bincount(places // self._groups, minlength=len(table.classes.size)))
        self._wanted, self._sent, self._received, self._messages = (np.zeros(world, np.int64) for _ in range(4))
        self._buffers = {name: np.zeros(world, np.int64) for name in ("send", "receive", "give")}
        self._gather = 0
        self._held = _Held(table, prefetch)

    def count(self) -> RankTotals:
        table, world = self._table, self._world
        order, start = _by_number(table.round_of, int(table.round_of.max(initial=-1)) + 1)
        counted = tuple(
            self._round(number, order[low:high]) for number, (low, high) in enumerate(zip(start, start[1:]))
        )
        chunks = table.chunks
        buffers = sum(self._buffers.values(), np.zeros(world, np.int64)) + self._gather
        staging = buffers + self._held.most * int(chunks.nbytes.max(initial=0))
        read = sums(chunks.reader, chunks.nbytes, world)
        reads = np.bincount(chunks.reader, minlength=world)
        columns = (self._wanted, read, reads, self._sent, self._received, self._messages, staging, counted)
        return RankTotals(*columns, self._matrix.reshape(self._groups, self._groups), self._group, *self._files())

    def _files(self) -> tuple[Ints, int]:
        chunks = self._table.chunks
        count = int(chunks.file.max(initial=0)) + 1
        group = -(-count // MATRIX)
        columns = -(-count // group)
        cell = chunks.reader.astype(np.int64) // self._group * columns + chunks.file // group
        return sums(cell, chunks.nbytes, self._groups * columns).reshape(self._groups, columns), group

    def _round(self, number: int, parts: Ints) -> RoundTally:
        fresh = self._held.enter(number)
        rows = self._table.chunks.parts.rows
        # Parameters that are alike give a reader the same row several times.
        pairs = self._table.chunks.parts.row[parts].astype(np.int64) * self._world + self._reader[parts]
        pairs, times = np.unique(pairs, return_counts=True)
        row, reader = pairs // self._world, pairs % self._world
        classes = self._table.classes
        owner, entry = entries_of(classes.start, row)
        gets, nbytes, sender = classes.gets[entry], classes.nbytes[entry] * times[owner], reader[owner]
        own = classes.of_rank[sender] == gets
        kept = sums(sender[own], nbytes[own], self._world)
        wanted = sums(gets, nbytes, len(classes.size))[classes.of_rank]
        received, sent = wanted - kept, sums(sender, nbytes * classes.size[gets], self._world) - kept
        self._wanted += wanted
        self._received += received
        self._sent += sent
        self._mark(sender, gets, nbytes, kept)
        single = ~rows.gathered[row][owner]
        messages = self._blocks(sender[single], gets[single], nbytes[single]) + self._gathers(row, reader, times)
        self._messages += messages
        read = sums(self._table.chunks.reader[fresh], self._table.chunks.nbytes[fresh], self._world)
        return RoundTally(
            int(read.sum()), int(read.max()), int(received.sum()), int(received.max()), int(messages.sum())
        )

    def _mark(self, sender: Ints, gets: Ints, nbytes: Ints, kept: Ints) -> None:
        """Enter what travels into the matrix."""
        which, place = entries_of(self._places, gets.astype(np.int64))
        cell = sender[which] // self._group * self._groups + self._there[place]
        self._matrix += sums(cell, nbytes[which] * self._ranks_there[place], self._groups**2)
        home = np.arange(self._world) // self._group
        self._matrix -= sums(home * self._groups + home, kept, self._groups**2)

    def _blocks(self, sender: Ints, gets: Ints, nbytes: Ints) -> Ints:
        """Note the buffers of the all-to-all; messages that every rank sends."""
        classes, count = self._table.classes, len(self._table.classes.size)
        pairs, block = np.unique(sender * count + gets, return_inverse=True)
        sizes = sums(block, nbytes, len(pairs))
        sizes += -sizes % ALIGNMENT
        sender, gets = pairs // count, pairs % count
        own = classes.of_rank[sender] == gets
        copies = classes.size[gets] - own
        received = sums(gets, sizes, count)[classes.of_rank] - sums(sender[own], sizes[own], self._world)
        for name, now in (("send", sums(sender, sizes * copies, self._world)), ("receive", received)):
            np.maximum(self._buffers[name], now, out=self._buffers[name])
        return sums(sender, copies, self._world)

    def _gathers(self, row: Ints, reader: Ints, times: Ints) -> Ints:
        """Note the buffers of the all-gather; messages that every rank sends."""
        rows = self._table.chunks.parts.rows
        given = np.flatnonzero(rows.gathered[row])
        sizes = sums(reader[given], rows.nbytes[row[given]] * times[given], self._world)
        sizes += -sizes % ALIGNMENT
        np.maximum(self._buffers["give"], sizes, out=self._buffers["give"])
        self._gather = max(self._gather, int(sizes.sum()))
        return (sizes > 0) * (self._world - 1)


class _Held:
    """Chunks in memory: from `prefetch` rounds before the first that needs them to the last."""

    def __init__(self, table: ExchangeTable, prefetch: int) -> None:
        chunks, start = table.chunks, table.chunks.start[:-1]
        none = np.empty(0, np.int64)
        count = int(table.round_of.max(initial=-1)) + 1
        first = np.minimum.reduceat(table.round_of, start) if len(start) else none
        last = np.maximum.reduceat(table.round_of, start) if len(start) else none
        (self._by_first, self._first), (self._by_last, self._last) = _by_number(first, count), _by_number(last, count)
        self._reader, self._prefetch = chunks.reader, prefetch
        self._now = np.zeros(table.world, np.int64)
        self._begun = 0
        self.most = np.zeros(table.world, np.int64)

    def enter(self, number: int) -> Ints:
        """Go on to a round; returns the chunks that it needs first."""
        low, high = self._first[number : number + 2]
        ahead = self._first[min(number + self._prefetch + 1, len(self._first) - 1)]
        self._add(self._by_first[self._begun : ahead], 1)
        self._begun = ahead
        np.maximum(self.most, self._now, out=self.most)
        self._add(self._by_last[slice(*self._last[number : number + 2])], -1)
        return self._by_first[low:high]

    def _add(self, chunks: Ints, count: int) -> None:
        self._now += count * np.bincount(self._reader[chunks], minlength=len(self._now))


def _by_number(column: Ints, count: int) -> tuple[Ints, list[int]]:
    """Places of a column in the order of its numbers, all below `count`, and where each number begins among them."""
    order = np.argsort(column, kind="stable").astype(narrow(len(column)))
    return order, starts(sums(column, np.broadcast_to(1, len(column)), count)).tolist()

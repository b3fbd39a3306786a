"""Which parts travel together: rounds that fit every rank's staging memory.

Every reader has a queue of parts, in the order of the parameters. In a round the readers take turns, all at once: each
offers its next part; those that fit what is left of its own share (read, sent) and of the receivers' shares, counted in
the order of the ranks, are taken. Who cannot go on waits for the next round. A part that is too large for any round
travels alone.

Receivers are counted by *classes*: ranks that get the same parts throughout (replicas) fill up together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import Chunks
from ms_ckpt_ext.core.exchange.parts import Rows
from ms_ckpt_ext.core.exchange.ragged import Ints, blocks, entries_of, joined, mixed, narrow, starts, sums


class Classes(NamedTuple):
    """Ranks that get the same parts throughout, and what of every row each class gets.

    Attributes:
        of_rank: the class of every rank.
        size: ranks of every class.
        start: the entries of every row, as a ragged table.
        gets, nbytes: of every entry, the class and the bytes that each of its ranks gets.
    """

    of_rank: Ints
    size: Ints
    start: Ints
    gets: Ints
    nbytes: Ints


def rounds_of(chunks: Chunks, classes: Classes, quarter: int) -> Ints:
    """The round of every part. A rank reads and sends up to `quarter` bytes in one, and receives twice that."""
    return _Filler(chunks, classes, quarter).fill()


def classes_of(chunks: Chunks, world: int) -> Classes:
    """Find ranks that are alike."""
    rows = chunks.parts.rows
    set_start, members = chunks.parts.sets.flat()
    owner = np.repeat(np.arange(len(set_start) - 1), np.diff(set_start))
    signature = np.zeros(world, np.uint64)
    np.add.at(signature, members, mixed(owner))
    _, first, of_rank = np.unique(signature, return_index=True, return_inverse=True)
    # A set is a union of classes: keep one rank of each.
    kept = first[of_rank[members]] == members
    class_start = starts(sums(owner[kept], np.ones(int(kept.sum())), len(set_start) - 1))
    deliveries, entries = entries_of(class_start, rows.ranks.astype(np.int64))
    gets = of_rank[members[kept]][entries].astype(np.int32)
    per_delivery = np.diff(class_start)[rows.ranks]
    before = np.concatenate([[0], np.cumsum(per_delivery)])
    return Classes(of_rank.astype(np.int32), np.bincount(of_rank), before[rows.start], gets, rows.moved[deliveries])


def _copies(rows: Rows, set_sizes: Ints) -> Ints:
    """Bytes that a reader of every row would send, were it not among the receivers itself."""
    before = np.concatenate([[0], np.cumsum(rows.moved * set_sizes[rows.ranks])])
    return np.where(rows.gathered, rows.nbytes, np.diff(before[rows.start]))


def _queue(chunks: Chunks) -> Ints:
    """The parts of every reader, by number: whole chunks in the order of their first parameter, parts as they lie."""
    first = chunks.start[:-1]
    first_demand = np.minimum.reduceat(chunks.parts.demand, first) if len(first) else first
    order = np.lexsort((first_demand, chunks.reader))
    kind = narrow(len(chunks.parts.row))
    return joined([entries_of(chunks.start, order[block])[1].astype(kind) for block in blocks(len(order))], kind)


class _Filler:
    def __init__(self, chunks: Chunks, classes: Classes, quarter: int) -> None:
        parts, rows = chunks.parts, chunks.parts.rows
        self._row, self._gathered, self._quarter = parts.row, rows.gathered, quarter
        self._classes, world = classes, len(classes.of_rank)
        self._copies = _copies(rows, np.array([len(members) for members in parts.sets.members], np.int64))
        self._queue = _queue(chunks)
        offers = sums(chunks.reader, np.diff(chunks.start), world)
        self._stop = np.cumsum(offers)
        self._head = self._stop - offers
        self._reads = np.zeros(len(parts.row), chunks.nbytes.dtype)
        self._reads[chunks.start[:-1]] = chunks.nbytes
        self._round = np.full(len(parts.row), -1, np.int32)

    def fill(self) -> Ints:
        world, number = len(self._stop), 0
        while True:
            active = np.flatnonzero(self._head < self._stop)
            if not len(active):
                return self._round.astype(narrow(number))
            self._sent, self._read = np.full(world, self._quarter), np.full(world, self._quarter)
            self._room = np.full(len(self._classes.size), 2 * self._quarter)
            empty = True
            while len(active):
                active = self._turn(active, number, empty)
                empty = False
            number += 1

    def _turn(self, active: Ints, number: int, empty: bool) -> Ints:
        """Every active reader offers its next part; returns those that may offer another."""
        part = self._queue[self._head[active]]
        row = self._row[part]
        owner, gets, nbytes, own = self._loads(active, row)
        sent = self._copies[row] - own
        reads = self._reads[part]
        fits = (self._sent[active] >= sent) & (self._read[active] >= reads)
        fits[owner[self._room[gets] < nbytes]] = False
        taken = fits.copy()
        taken[owner[self._crowded(fits[owner], gets, nbytes)]] = False
        if empty and not taken.any():
            taken[0] = True
        readers, mine = active[taken], taken[owner]
        self._round[part[taken]] = number
        self._head[readers] += 1
        self._sent[readers] -= sent[taken]
        self._read[readers] -= reads[taken]
        self._room -= sums(gets[mine], nbytes[mine], len(self._room))
        again: Ints = active[fits & (self._head[active] < self._stop[active])]
        return again

    def _loads(self, active: Ints, row: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """(which reader, class, bytes) of everything offered, and what of it every reader sends to itself."""
        classes = self._classes
        owner, entry = entries_of(classes.start, row.astype(np.int64))
        gets, nbytes = classes.gets[entry], classes.nbytes[entry]
        stays = (classes.of_rank[active][owner] == gets) & ~self._gathered[row][owner]
        own = sums(owner[stays], nbytes[stays], len(active))
        travels = ~(stays & (classes.size[gets] == 1))
        return owner[travels], gets[travels], nbytes[travels], own

    def _crowded(self, offered: Ints, gets: Ints, nbytes: Ints) -> Ints:
        """Entries that no longer fit their class after those of all lower readers."""
        entries = np.flatnonzero(offered)
        entries = entries[np.argsort(gets[entries], kind="stable")]
        if not len(entries):
            return entries
        group, total = gets[entries], np.cumsum(nbytes[entries])
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        before = np.repeat(total[begins] - nbytes[entries][begins], np.diff(np.append(begins, len(entries))))
        over: Ints = entries[total - before > self._room[group]]
        return over

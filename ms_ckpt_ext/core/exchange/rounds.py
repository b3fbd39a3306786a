"""Which parts travel together: rounds that fit every rank's staging memory.

The bucket is shared out between reading, sending and receiving as the whole load needs them, so that none is full long
before the others; each has an eighth at least. In a tiered plan half of what is for receiving is for sending on.

Every reader has a queue of parts, in the order of the parameters, and so has every group that gathers. In a round they
take turns, all at once: each offers its next part; those that fit what is left of the readers' shares (read, sent) and
of the receivers', counted in the order of the queues, are taken. One share holds for what a rank reads and sends alone
and for all its groups. Who cannot go on waits for the next round. A part that is too large for any round travels alone.

Receivers are counted by *classes*: ranks that get the same parts throughout (replicas) fill up together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY, Chunks
from ms_ckpt_ext.core.exchange.demand import ExchangeLimits, Ways
from ms_ckpt_ext.core.exchange.parts import Rows
from ms_ckpt_ext.core.exchange.ragged import (
    Ints,
    Sets,
    blocks,
    classes_of_ranks,
    entries_of,
    joined,
    narrow,
    starts,
    sums,
)
from ms_ckpt_ext.core.exchange.tiers import teams_of

_AT_ONCE = 1 << 14
"""Parts that are tried together, where all of them may fit."""


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


class Shares(NamedTuple):
    """Bytes that a rank may read, send and receive in one round."""

    read: int
    sent: int
    received: int


def rounds_of(chunks: Chunks, classes: Classes, limits: ExchangeLimits, ways: Ways) -> Ints:
    """The round of every part."""
    return _Filler(chunks, classes, limits, ways).fill()


def shares_of(totals: Shares, limits: ExchangeLimits) -> Shares:
    """The bucket, shared out like `totals`, with an eighth for each at least."""
    rest = max(limits.bucket - 3 * limits.least, 0)
    return Shares(*(limits.least + rest * total // max(sum(totals), 1) for total in totals))


def classes_of(chunks: Chunks, world: int) -> Classes:
    """Find ranks that are alike."""
    rows = chunks.parts.rows
    set_start, members = chunks.parts.sets.flat()
    of_rank, first = classes_of_ranks(chunks.parts.sets, world)
    # A set is a union of classes: keep one rank of each.
    kept = first[of_rank[members]] == members
    class_start = np.append(0, np.cumsum(kept))[set_start]
    deliveries, entries = entries_of(class_start, rows.ranks.astype(np.int64))
    gets = of_rank[members[kept]][entries].astype(np.int32)
    per_delivery = np.diff(class_start)[rows.ranks]
    before = np.append(0, np.cumsum(per_delivery))
    return Classes(of_rank.astype(np.int32), np.bincount(of_rank), before[rows.start], gets, rows.moved[deliveries])


def _copies(rows: Rows, set_sizes: Ints) -> Ints:
    """Bytes that a reader of every row would send, were it not among the receivers itself."""
    copies: Ints = np.add.reduceat(rows.moved * set_sizes[rows.ranks], rows.start[:-1])
    return copies


def _receivers(sets: Sets, ways: Ways) -> Ints:
    """Ranks that a reader sends to, of every set, at most: all of its own server, and one of every other."""
    teams = (teams_of(members, ways.servers) for members in sets.members)
    return np.array([len(each) - 1 + max(map(len, each.values()), default=1) for each in teams], np.int64)


def _queue(chunks: Chunks) -> Ints:
    """The parts of every reader, by number: whole chunks in the order of their first parameter, parts as they lie.

    Of one parameter what is needed before the rest comes first.
    """
    first, cuts = chunks.start[:-1], chunks.parts.rows.cuts
    first_demand = np.minimum.reduceat(chunks.parts.demand, first) if len(first) else first
    early = np.fromiter((cut.early for cut in cuts), bool, len(cuts))
    order = np.lexsort((~early[chunks.parts.row[first]], first_demand, chunks.reader))
    kind = narrow(len(chunks.parts.row))
    return joined([entries_of(chunks.start, order[block])[1].astype(kind) for block in blocks(len(order))], kind)


class _Filler:
    """Readers are the ranks, then the groups, whose members read and give equal shares, unless one does it for all."""

    def __init__(self, chunks: Chunks, classes: Classes, limits: ExchangeLimits, ways: Ways) -> None:
        parts, rows = chunks.parts, chunks.parts.rows
        self._row, self._classes, self._world = parts.row, classes, len(classes.of_rank)
        sizes = np.array([len(members) for members in parts.sets.members], np.int64)
        self._carries = 2 if ways.tiered else 1
        self._copies, self._nbytes = _copies(rows, _receivers(parts.sets, ways) if ways.tiered else sizes), rows.nbytes
        feeding = [parts.sets.members[each.ranks] if each.root == EVERYBODY else (each.root,) for each in chunks.groups]
        self._sharing = np.append(np.ones(self._world, np.int64), np.fromiter(map(len, feeding), np.int64))
        self._work, self._workers = starts(self._sharing), joined([np.arange(self._world), *map(np.array, feeding)])
        self._class_of = np.concatenate([classes.of_rank, np.full(len(chunks.groups), len(classes.size))])
        self._queue = _queue(chunks)
        offers = sums(chunks.reader, np.diff(chunks.start), len(self._sharing))
        self._stop = np.cumsum(offers)
        self._head = self._stop - offers
        self._reads = np.zeros(len(parts.row), chunks.nbytes.dtype)
        self._reads[chunks.start[:-1]] = chunks.staged
        gathered = (chunks.reader >= self._world)[chunks.of_part]
        self._reads[gathered] = rows.nbytes[parts.row[gathered]]
        self._shares = shares_of(self._totals(chunks, gathered), limits)
        self._round = np.empty(len(parts.row), np.int32)

    def _totals(self, chunks: Chunks, gathered: Ints) -> Shares:
        """What the ranks with the most of it read, send and receive in all; what a reader keeps counts as sent, too."""
        readers = np.arange(len(self._sharing))
        reads = sums(chunks.reader, chunks.staged, len(readers))
        copies = np.where(gathered, self._nbytes[self._row], self._copies[self._row])
        sent = sums(chunks.reader[chunks.of_part], copies, len(readers))
        times = np.bincount(self._row, minlength=len(self._nbytes))
        owner, entry = entries_of(self._classes.start, np.arange(len(self._nbytes)))
        wanted = sums(self._classes.gets[entry], self._classes.nbytes[entry] * times[owner], len(self._classes.size))
        _, rank, *work = self._work_of(readers, reads, sent)
        each = (sums(rank, column, self._world) for column in work)
        return Shares(*(int(column.max()) for column in (*each, wanted * self._carries)))

    def fill(self) -> Ints:
        number, most = 0, 1 << 8
        while True:
            active = np.flatnonzero(self._head < self._stop)
            if not len(active):
                return self._round.astype(narrow(number))
            self._read, self._sent = (np.full(self._world, share) for share in self._shares[:2])
            self._room = np.full(len(self._classes.size), self._shares.received // self._carries)
            empty, several = True, most
            while len(active):
                several = min(several, max(_AT_ONCE // len(active), 1))
                if several == 1:
                    active = self._turn(active, number, empty)
                elif self._take(active, several, number):
                    active = active[self._head[active] < self._stop[active]]
                    most = several = 2 * several
                else:
                    several //= 2
                    most = several if empty else most
                    continue
                empty = False
            number += 1

    def _take(self, active: Ints, several: int, number: int) -> bool:
        """Take the next parts of every active reader, up to so many, if all fit: as many turns in which all do."""
        counts = np.minimum(self._stop[active] - self._head[active], several)
        which, entry = entries_of(starts(counts), np.arange(len(active)))
        readers = active[which]
        part = self._queue[self._head[readers] + entry - starts(counts)[which]]
        row = self._row[part]
        _, gets, nbytes, own = self._loads(readers, row)
        got = sums(gets, nbytes, len(self._room))
        sent = sums(which, np.where(readers < self._world, self._copies[row] - own, self._nbytes[row]), len(active))
        reads = sums(which, self._reads[part], len(active))
        _, rank, *work = self._work_of(active, reads, sent)
        reads, sent = (sums(rank, column, self._world) for column in work)
        if (sent > self._sent).any() or (reads > self._read).any() or (got > self._room).any():
            return False
        self._round[part] = number
        self._head[active] += counts
        self._sent -= sent
        self._read -= reads
        self._room -= got
        return True

    def _turn(self, active: Ints, number: int, empty: bool) -> Ints:
        """Every active reader offers its next part; returns those that may offer another."""
        part = self._queue[self._head[active]]
        row = self._row[part]
        owner, gets, nbytes, own = self._loads(active, row)
        sent = np.where(active < self._world, self._copies[row] - own, self._nbytes[row])
        which, rank, reads, sent = self._work_of(active, self._reads[part], sent)
        needs = [
            _Need(self._room, *_by_place(owner, gets, nbytes)),
            *(_Need(room, *_by_place(which, rank, work)) for room, work in ((self._read, reads), (self._sent, sent))),
        ]
        fits = np.ones(len(active), bool)
        for need in needs:
            fits[need.alone()] = False
        taken = fits.copy()
        for need in needs:
            taken[need.of(fits).together()] = False
        if empty and not taken.any():
            taken[0] = True
        self._round[part[taken]] = number
        self._head[active[taken]] += 1
        for need in needs:
            need.of(taken).take()
        again: Ints = active[fits & (self._head[active] < self._stop[active])]
        return again

    def _loads(self, active: Ints, row: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """(which reader, class, bytes) of everything offered, and what of it every reader sends to itself."""
        classes = self._classes
        owner, entry = entries_of(classes.start, row.astype(np.int64))
        gets, nbytes = classes.gets[entry], classes.nbytes[entry]
        stays = self._class_of[active][owner] == gets
        own = sums(owner[stays], nbytes[stays], len(active))
        travels = ~(stays & (classes.size[gets] == 1))
        return owner[travels], gets[travels], nbytes[travels], own

    def _work_of(self, active: Ints, reads: Ints, sent: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """(which reader, rank) of the ranks that do the work of readers, and what each reads and sends of it."""
        which, entry = entries_of(self._work, active)
        shared = self._sharing[active]
        reads, sent = ((-(-column // shared))[which] for column in (reads, sent))
        return which, self._workers[entry], reads, sent


class _Need(NamedTuple):
    """What offers need of the room that there is in places (ranks, or classes of them), in the order of the places."""

    room: Ints
    owner: Ints
    place: Ints
    nbytes: Ints

    def of(self, some: Ints) -> _Need:
        """What some of the owners need."""
        kept = some[self.owner]
        return _Need(self.room, *(column[kept] for column in self[1:]))

    def alone(self) -> Ints:
        """Owners that do not fit where there is no other; one may need several stretches of one place."""
        return self.owner[self._before(self.owner, self.place) + self.nbytes > self.room[self.place]]

    def together(self) -> Ints:
        """Owners that do not fit after those before them."""
        return self.owner[self._before(self.place) + self.nbytes > self.room[self.place]]

    def take(self) -> None:
        """Take the room."""
        np.subtract.at(self.room, self.place, self.nbytes)

    def _before(self, *columns: Ints) -> Ints:
        """What entries before this one need that are equal to it in these columns; equal ones lie together."""
        begins = np.any([np.diff(column, prepend=-1) != 0 for column in columns], axis=0)
        first, before = np.flatnonzero(begins), np.cumsum(self.nbytes) - self.nbytes
        found: Ints = before - np.repeat(before[first], np.diff(np.append(first, len(self.owner))))
        return found


def _by_place(owner: Ints, place: Ints, nbytes: Ints) -> Iterator[Ints]:
    order = np.argsort(place, kind="stable")
    return (column[order] for column in (owner, place, nbytes))

"""Which parts travel together: rounds that fit every rank's staging memory.

The bucket is shared out between reading, sending and receiving as the whole load needs them, so that none is full long
before the others; each has an eighth at least. In a tiered plan half of what is for receiving is for sending on.

Every reader has a queue of parts, in the order of the parameters, and so has every group that gathers. In a round they
take turns, all at once: each offers its next part; those that fit what is left of its own share (read, sent) and of the
receivers' shares, counted in the order of the ranks, are taken. Who cannot go on waits for the next round. A part that
is too large for any round travels alone.

Receivers are counted by *classes*: ranks that get the same parts throughout (replicas) fill up together.

The parts that a group wants whole are laid one after another, as they lie in their files: a *stream*. It is cut into as
many equal shares as there are ranks; each reads its share, whatever parts that touches, and an all-gather of equal
shares puts the stream together on all of them. So nobody contributes more than another, and nothing is padded but the
end of the stream, to a multiple of `ALIGNMENT` bytes a rank. Where one rank reads for the group, the stream is its
share, which it broadcasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY, Chunks, FedGroup
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, ExchangeLimits, Ways
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
        sharing = [int(sizes[each.ranks]) if each.root == EVERYBODY else 1 for each in chunks.groups]
        self._members = np.concatenate([np.ones(self._world, np.int64), np.array(sharing, np.int64)])
        self._class_of = np.concatenate([classes.of_rank, np.full(len(chunks.groups), len(classes.size))])
        self._queue = _queue(chunks)
        offers = sums(chunks.reader, np.diff(chunks.start), len(self._members))
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
        reads = sums(chunks.reader, chunks.staged, len(self._members))
        copies = np.where(gathered, self._nbytes[self._row], self._copies[self._row])
        sent = sums(chunks.reader[chunks.of_part], copies, len(self._members))
        times = np.bincount(self._row, minlength=len(self._nbytes))
        owner, entry = entries_of(self._classes.start, np.arange(len(self._nbytes)))
        wanted = sums(self._classes.gets[entry], self._classes.nbytes[entry] * times[owner], len(self._classes.size))
        each = (column // self._members for column in (reads, sent))
        return Shares(*(int(column.max()) for column in (*each, wanted * self._carries)))

    def fill(self) -> Ints:
        number, most = 0, 1 << 8
        while True:
            active = np.flatnonzero(self._head < self._stop)
            if not len(active):
                return self._round.astype(narrow(number))
            self._sent, self._read = self._shares.sent * self._members, self._shares.read * self._members
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
        if (sent > self._sent[active]).any() or (reads > self._read[active]).any() or (got > self._room).any():
            return False
        self._round[part] = number
        self._head[active] += counts
        self._sent[active] -= sent
        self._read[active] -= reads
        self._room -= got
        return True

    def _turn(self, active: Ints, number: int, empty: bool) -> Ints:
        """Every active reader offers its next part; returns those that may offer another."""
        part = self._queue[self._head[active]]
        row = self._row[part]
        *columns, own = self._loads(active, row)
        by_class = np.argsort(columns[1], kind="stable")
        owner, gets, nbytes = (column[by_class] for column in columns)
        sent = np.where(active < self._world, self._copies[row] - own, self._nbytes[row])
        reads = self._reads[part]
        fits = (self._sent[active] >= sent) & (self._read[active] >= reads)
        fits[owner[self._crowded(gets, nbytes, owner)]] = False
        taken, some = fits.copy(), fits[owner]
        taken[owner[some][self._crowded(gets[some], nbytes[some])]] = False
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
        stays = self._class_of[active][owner] == gets
        own = sums(owner[stays], nbytes[stays], len(active))
        travels = ~(stays & (classes.size[gets] == 1))
        return owner[travels], gets[travels], nbytes[travels], own

    def _crowded(self, gets: Ints, nbytes: Ints, *owner: Ints) -> Ints:
        """Of entries in the order of their class, which no longer fit it after those before them; or, where owners are
        given, after those of the same owner before them: a part may have several boxes for one class."""
        begins = np.any([np.diff(column, prepend=-1) != 0 for column in (gets, *owner)], axis=0)
        first, total = np.flatnonzero(begins), np.cumsum(nbytes)
        before = np.repeat((total - nbytes)[first], np.diff(np.append(first, len(gets))))
        crowded: Ints = total - before > self._room[gets]
        return crowded


class Pieces(NamedTuple):
    """Reads of a stream, as columns, in its order: which member reads how many bytes from where, and their place."""

    member: Ints
    file: Ints
    offset: Ints
    nbytes: Ints
    at: Ints


class Stream(NamedTuple):
    """A stream.

    Attributes:
        at: where every part begins in it.
        share: bytes of every member's share, of which the last may have less to read; of all, where one reads.
        pieces: the reads.
    """

    at: Ints
    share: int
    pieces: Pieces


class Gathering(NamedTuple):
    """What a group is fed in a round: the group, the parts by number, and their stream."""

    round: int
    group: FedGroup
    parts: Ints
    stream: Stream


def gatherings(chunks: Chunks, round_of: Ints, world: int, most: int) -> Iterator[Gathering]:
    """Everything that is gathered, by round, then by group; `most`: bytes of a read at most."""
    parts = chunks.parts
    group = chunks.reader[chunks.of_part].astype(np.int64) - world
    numbers = np.flatnonzero(group >= 0)
    order = numbers[np.lexsort((group[numbers], round_of[numbers]))]
    differ = (np.diff(round_of[order]) != 0) | (np.diff(group[order]) != 0)
    for same in np.split(order, np.flatnonzero(differ) + 1):
        if len(same):
            fed = chunks.groups[int(group[same[0]])]
            members = parts.sets.members[fed.ranks]
            sizes = parts.rows.nbytes[parts.row[same]].astype(np.int64)
            columns = (parts.file[same], parts.offset[same].astype(np.int64), sizes)
            stream = stream_of(*columns, len(members) if fed.root == EVERYBODY else 1, most)
            if fed.root != EVERYBODY:
                stream.pieces.member[:] = members.index(fed.root)
            yield Gathering(int(round_of[same[0]]), fed, same, stream)


def stream_of(file: Ints, offset: Ints, nbytes: Ints, members: int, most: int) -> Stream:
    """The stream of parts that lie at `offset` of `file`, `nbytes` long; parts that are neighbours stay so.

    >>> stream = stream_of(np.array([0, 0, 1]), np.array([0, 40, 8]), np.array([40, 24, 10]), 2, 1 << 20)
    >>> stream.at.tolist(), stream.share
    ([0, 40, 64], 48)
    >>> [list(map(int, piece)) for piece in zip(*stream.pieces)]
    [[0, 0, 0, 48, 0], [1, 0, 48, 16, 48], [1, 1, 8, 10, 64]]
    """
    begins = np.ones(len(file), bool)
    begins[1:] = (file[1:] != file[:-1]) | (offset[1:] != offset[:-1] + nbytes[:-1])
    first = np.flatnonzero(begins)
    length = np.add.reduceat(nbytes, first)
    padded = length + -length % ALIGNMENT
    start = np.cumsum(padded) - padded
    run = np.cumsum(begins) - 1
    at = start[run] + offset - offset[first][run]
    share = -(-int(start[-1] + length[-1]) // members)
    share += -share % ALIGNMENT
    low = np.unique(np.concatenate([start, (np.arange(members)[:, None] * share + np.arange(0, share, most)).ravel()]))
    within = np.searchsorted(start, low, side="right") - 1
    stop = np.minimum(np.append(low[1:], share * members), (start + length)[within])
    read = stop > low
    low, stop, within = low[read], stop[read], within[read]
    pieces = Pieces(low // share, file[first][within], offset[first][within] + low - start[within], stop - low, low)
    return Stream(at, share, pieces)

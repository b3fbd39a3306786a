"""What a plan costs every rank: bytes, messages, memory, counted round by round without running anything.

The numbers are those that a load with this plan counts itself: payload by the plan, staging by the byte layout of
`core.exchange.one_rank` (blocks padded, buffers as large as the largest round needs) and `core.exchange.staging`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT
from ms_ckpt_ext.core.exchange.plan import ExchangeTable
from ms_ckpt_ext.core.exchange.ragged import Ints, by_number, entries_of, starts, sums
from ms_ckpt_ext.core.exchange.staging import held_bytes, reads_of
from ms_ckpt_ext.core.exchange.streams import Gathering
from ms_ckpt_ext.core.exchange.tiers import all_teams, broadcast_crossing, gather_crossing, hops

MATRIX = 64
"""Rows and columns of the matrix of traffic at most; larger worlds are shown by groups of neighbouring ranks."""


class RoundTally(NamedTuple):
    """One round, in bytes: all ranks together, and the rank with the most. `between`: from server to server."""

    read: int
    most_read: int
    moved: int
    most_received: int
    messages: int
    between: int


@dataclass(frozen=True)
class RankTotals:
    """Per rank, as arrays.

    Attributes:
        wanted: bytes of its own slices.
        read, reads: bytes and calls of its reading.
        sent, received: payload bytes to and from other ranks.
        messages: blocks it sends to other ranks, over all rounds.
        inside, between: bytes that it hands to the collectives for other ranks of its server, and for other servers;
            padding and what it sends on for others included.
        crossing: bytes that arrive on every server from others.
        calls: collectives of the rank that makes the most.
        staging: bytes of its exchange buffers, and of the slabs that it reads into, at the peak; of the two rounds that
            are under way where the transport overlaps.
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
    inside: Ints
    between: Ints
    crossing: Ints
    calls: int
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
        self._servers = np.array(table.ways.servers or [0] * world, np.int64)
        self._inside, self._between, self._calls = (np.zeros(world, np.int64) for _ in range(3))
        self._crossing = np.zeros(int(self._servers.max()) + 1, np.int64)
        place = table.classes.of_rank.astype(np.int64) * len(self._crossing) + self._servers
        lying, self._class_there = np.unique(place, return_counts=True)
        self._class_server = lying % len(self._crossing)
        self._class_servers = starts(np.bincount(lying // len(self._crossing), minlength=len(table.classes.size)))
        if table.ways.tiered:
            self._teams, self._turn = all_teams(table.chunks.parts.sets, self._servers), table.turns()
        self._buffers: dict[str, Ints] = {}
        gathered = list(table.gatherings())
        self._reads = reads_of(table, gathered)
        self._of_round = {n: list(some) for n, some in groupby(gathered, key=lambda each: each.round)}
        self._rounds, self._prefetch = int(table.round_of.max(initial=-1)) + 1, prefetch

    def count(self) -> RankTotals:
        table, world = self._table, self._world
        order, start = by_number(table.round_of, self._rounds)
        fresh, begin = by_number(self._reads.first, self._rounds)
        counted = tuple(
            self._round(number, order[slice(*start[number : number + 2])], fresh[slice(*begin[number : number + 2])])
            for number in range(self._rounds)
        )
        made = self._reads
        buffers = min(2, len(counted)) * sum(self._buffers.values(), np.zeros(world, np.int64))
        staging = buffers + held_bytes(made, world, self._rounds, self._prefetch)
        read = sums(made.reader, made.nbytes, world)
        reads = np.bincount(made.reader, minlength=world)
        columns = (self._wanted, read, reads, self._sent, self._received, self._messages)
        tiers = (self._inside, self._between, self._crossing, int(self._calls.max()))
        return RankTotals(
            *columns,
            *tiers,
            staging,
            counted,
            self._matrix.reshape(self._groups, self._groups),
            self._group,
            *self._files(),
        )

    def _files(self) -> tuple[Ints, int]:
        chunks = self._reads
        count = int(chunks.file.max(initial=0)) + 1
        group = -(-count // MATRIX)
        columns = -(-count // group)
        cell = chunks.reader.astype(np.int64) // self._group * columns + chunks.file // group
        return sums(cell, chunks.nbytes, self._groups * columns).reshape(self._groups, columns), group

    def _round(self, number: int, parts: Ints, fresh: Ints) -> RoundTally:
        before = int(self._between.sum())
        parts = parts[self._reader[parts] < self._world]
        received, messages = self._tiered(parts) if self._table.ways.tiered else self._flat(parts)
        done = np.zeros(self._world, np.int64)  # gathers of every rank
        for each in self._of_round.get(number, ()):
            members = np.array(self._table.chunks.parts.sets.members[each.group.ranks])
            received += self._gather(each, members, messages)
            self._hold_gathered(each, members, done[members])
            done[members] += 1
        self._messages += messages
        read = sums(self._reads.reader[fresh], self._reads.nbytes[fresh], self._world)
        moved, between = int(received.sum()), int(self._between.sum()) - before
        return RoundTally(int(read.sum()), int(read.max()), moved, int(received.max()), int(messages.sum()), between)

    def _tiered(self, parts: Ints) -> tuple[Ints, Ints]:
        """Count the all-to-alls of a tiered round: bytes that every rank receives, and messages that it sends."""
        rows = self._table.chunks.parts.rows
        owner, entry = entries_of(rows.start, self._table.chunks.parts.row[parts].astype(np.int64))
        mine = parts[owner]
        columns = (self._reader[mine], self._turn[mine], rows.ranks[entry], rows.moved[entry])
        made = hops(self._teams, self._servers, *columns)
        self._wanted += sums(made.receiver, made.nbytes, self._world)
        travels = made.sender != made.receiver
        sender, receiver, nbytes, second = (column[travels] for column in made)
        sent, received = sums(sender, nbytes, self._world), sums(receiver, nbytes, self._world)
        self._sent += sent
        self._received += received
        home = sender // self._group * self._groups + receiver // self._group
        self._matrix += sums(home, nbytes, self._groups**2)
        messages = np.zeros(self._world, np.int64)
        for now, *names in ((~second, "send", "receive"), (second, "send on", "receive late")):
            self._calls += bool(now.any())
            messages += self._pairs(sender[now], receiver[now], nbytes[now], *names)
        return received, messages

    def _pairs(self, sender: Ints, receiver: Ints, nbytes: Ints, outgoing: str, incoming: str) -> Ints:
        """Note the buffers of an all-to-all, and what of it crosses; messages that every rank sends."""
        pairs, block = np.unique(sender * self._world + receiver, return_inverse=True)
        sizes = sums(block, nbytes, len(pairs))
        sizes += -sizes % ALIGNMENT
        sender, receiver = pairs // self._world, pairs % self._world
        for name, ranks in ((outgoing, sender), (incoming, receiver)):
            self._hold(name, sums(ranks, sizes, self._world))
        near = self._servers[sender] == self._servers[receiver]
        self._inside += sums(sender[near], sizes[near], self._world)
        self._between += sums(sender[~near], sizes[~near], self._world)
        self._crossing += sums(self._servers[receiver[~near]], sizes[~near], len(self._crossing))
        return sums(sender, np.ones(len(sender), np.int64), self._world)

    def _hold(self, name: str, now: Ints) -> None:
        held = self._buffers.setdefault(name, np.zeros(self._world, np.int64))
        np.maximum(held, now, out=held)

    def _flat(self, parts: Ints) -> tuple[Ints, Ints]:
        """Count the all-to-all of a flat round: bytes that every rank receives, and messages that it sends."""
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
        self._calls += bool(received.any())
        return received, self._blocks(sender, gets, nbytes)

    def _hold_gathered(self, each: Gathering, members: Ints, before: Ints) -> None:
        """Note the buffers of a gather or a broadcast; `before`: how many come before it on every member."""
        share, shared = each.stream.share, each.group.root == EVERYBODY
        for slot in np.unique(before).tolist():
            here = np.isin(np.arange(self._world), members[before == slot])
            self._hold(f"give {slot}", here * (share * shared))
            self._hold(f"gather {slot}", here * (share * len(members) if shared else share))

    def _gather(self, each: Gathering, members: Ints, messages: Ints) -> Ints:
        """Count a gather or a broadcast; bytes that every rank receives by it."""
        count, pieces, shared = len(members), each.stream.pieces, each.group.root == EVERYBODY
        own = sums(members[pieces.member], pieces.nbytes, self._world)
        total = int(own.sum())
        received = np.zeros(self._world, np.int64)
        received[members] = total - own[members]
        self._wanted[members] += total
        self._received += received
        self._sent += own * (count - 1)
        messages[members if shared else each.group.root] += count - 1
        share, here = each.stream.share, self._servers[members]
        if shared:
            moved = gather_crossing(share, here)
        else:
            moved = broadcast_crossing(share, here, int(np.searchsorted(members, each.group.root)))
        self._calls[members] += 1
        self._inside[members] += moved.inside
        self._between[members] += moved.between
        self._crossing += sums(here, moved.arriving, len(self._crossing))
        there = np.bincount(members // self._group, minlength=self._groups)
        given = sums(np.arange(self._world) // self._group, own, self._groups)
        self._matrix += (np.outer(given, there) - np.diag(given)).ravel()
        return received

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
        self._hold("send", sums(sender, sizes * copies, self._world))
        self._hold("receive", received)
        self._cross(sender, gets, sizes, copies)
        return sums(sender, copies, self._world)

    def _cross(self, sender: Ints, gets: Ints, sizes: Ints, copies: Ints) -> None:
        """Count what of an all-to-all stays inside its server, and what crosses."""
        which, place = entries_of(self._class_servers, gets)
        server, count = self._class_server[place], self._class_there[place]
        far = server != self._servers[sender[which]]
        away = sums(which[far], count[far], len(sender))
        self._between += sums(sender, sizes * away, self._world)
        self._inside += sums(sender, sizes * (copies - away), self._world)
        self._crossing += sums(server[far], sizes[which[far]] * count[far], len(self._crossing))

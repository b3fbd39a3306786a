"""Servers: what several ranks of one want crosses to it once.

In a *tiered* plan a reader sends a delivery to the ranks of its own server that want it, and to one rank of every other
server, its *carrier*; when that has arrived, the carrier sends it on to the others of its server. So a round has a
second all-to-all, inside the servers. The parts of a round that the same sets of ranks want are dealt to the carriers
of a server in runs of equal length, so all of them carry alike, and a reader has few of them to send to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.ragged import Ints, Sets, entries_of


@lru_cache(maxsize=1 << 16)
def teams_of(ranks: tuple[int, ...], servers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Server -> those of `ranks` that are on it, ascending."""
    found: dict[int, tuple[int, ...]] = {}
    for rank in sorted(ranks):
        found[servers[rank]] = found.get(servers[rank], ()) + (rank,)
    return found


def carrier(team: Sequence[int], turn: float) -> int:
    """The rank of a team that carries a part whose turn is `turn`, from 0 to below 1."""
    return team[int(turn * len(team))]


def shares_a_server(ranks: tuple[int, ...], servers: tuple[int, ...]) -> bool:
    """Whether two of the ranks are on one server."""
    return len({servers[rank] for rank in ranks}) < len(ranks)


class Crossing(NamedTuple):
    """What the calls of a group move, by member in their order: bytes to others of its server, and to other servers;
    `arriving`: on the server of every member from others, noted for one member of each server."""

    inside: Ints
    between: Ints
    arriving: Ints


def gather_crossing(share: int, servers: Ints) -> Crossing:
    """Of an all-gather of equal shares; `servers`: of the members.

    Where all servers have as many members it is hierarchical: every share crosses to a server once, to the member at
    the same place, and is spread there. Else it is a ring in the order of the ranks, each of which passes on all shares
    but one.
    """
    first, of_server, sizes = _by_server(servers)
    count = len(servers)
    if len(set(sizes.tolist())) == 1:
        size, others = int(sizes[0]), len(sizes) - 1
        arriving = np.zeros(count, np.int64)
        arriving[first] = share * (count - size)
        inside = np.full(count, share * (size - 1) * len(sizes), np.int64)
        return Crossing(inside, np.full(count, share * others, np.int64), arriving)
    passed = share * (count - 1)
    leaves = servers != np.roll(servers, -1)
    arriving = np.zeros(count, np.int64)
    arriving[first] = passed * np.bincount(of_server[leaves], minlength=len(first))  # it enters as often as it leaves
    return Crossing(np.where(leaves, 0, passed), np.where(leaves, passed, 0), arriving)


def broadcast_crossing(nbytes: int, servers: Ints, root: int) -> Crossing:
    """Of a broadcast by the member at place `root`: the stream crosses to every other server once, in pieces that the
    members of the root's server send; those of each server send each other theirs."""
    first, of_server, sizes = _by_server(servers)
    count, home = len(servers), int(of_server[root])
    arriving = np.zeros(count, np.int64)
    arriving[first] = np.where(np.arange(len(first)) == home, 0, nbytes)
    inside, between = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for server, size in enumerate(sizes.tolist()):
        inside[of_server == server] = _dealt(nbytes * (size - 1), size)
    between[of_server == home] = _dealt(nbytes * (len(sizes) - 1), int(sizes[home]))
    return Crossing(inside, between, arriving)


def _by_server(servers: Ints) -> tuple[Ints, Ints, Ints]:
    """The first member of every server, the place of every member's server among them, and members of every server."""
    _, first, of_server = np.unique(servers, return_index=True, return_inverse=True)
    return first, of_server, np.bincount(of_server)


def _dealt(total: int, count: int) -> Ints:
    """A total dealt out as equally as it can be."""
    return np.diff(np.arange(count + 1) * total // count)


def turns(round_of: Ints, interest: Ints, nbytes: Ints) -> Ints:
    """The turn of every part, among those of its round that the same ranks want: where its middle lies among them."""
    order = np.lexsort((np.arange(len(round_of)), interest, round_of))
    sizes = nbytes[order].astype(np.int64)
    stops = np.cumsum(sizes)
    same = (np.diff(round_of[order]) == 0) & (np.diff(interest[order]) == 0)
    first = np.flatnonzero(np.append(True, ~same)) if len(order) else np.empty(0, np.int64)
    group = np.cumsum(np.append(True, ~same)) - 1 if len(order) else first
    before = (stops - sizes)[first]
    total = np.append(before[1:], stops[-1:]) - before
    turn = np.empty(len(order))
    turn[order] = (stops - sizes / 2 - before[group]) / total[group]
    return turn


class Teams(NamedTuple):
    """The members of all sets, those of one server side by side.

    Attributes:
        start: the members of every set, as a ragged table.
        members, place: of every entry, the rank, and its place in its team.
        first, size: of every entry, where its team begins, and its ranks.
    """

    start: Ints
    members: Ints
    place: Ints
    first: Ints
    size: Ints


def all_teams(sets: Sets, servers: Ints) -> Teams:
    """The teams of all sets."""
    start, members = sets.flat()
    owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = np.lexsort((members, servers[members], owner))
    members = members[order]
    begins = np.ones(len(members), bool)
    begins[1:] = (np.diff(owner) != 0) | (np.diff(servers[members]) != 0)
    heads = np.flatnonzero(begins)
    team = np.cumsum(begins) - 1
    size = np.diff(np.append(heads, len(members)))
    return Teams(start, members, np.arange(len(members)) - heads[team], heads[team], size[team])


class Hops(NamedTuple):
    """What travels in a round, stretch by stretch: from whom, to whom, bytes; `second`: in its second all-to-all."""

    sender: Ints
    receiver: Ints
    nbytes: Ints
    second: Ints


def hops(teams: Teams, servers: Ints, reader: Ints, turn: Ints, ranks: Ints, moved: Ints) -> Hops:
    """The hops of deliveries, given as columns: the reader, the turn, the number of the set of ranks, the bytes."""
    owner, entry = entries_of(teams.start, ranks.astype(np.int64))
    receiver, sender = teams.members[entry], reader[owner].astype(np.int64)
    chosen = (turn[owner] * teams.size[entry]).astype(np.int64)
    second = (servers[receiver] != servers[sender]) & (teams.place[entry] != chosen)
    sender = np.where(second, teams.members[teams.first[entry] + chosen], sender)
    return Hops(sender, receiver, moved[owner], second)

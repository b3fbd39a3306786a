"""Long reads and who makes them.

1. Neighbouring parts of a file that the same ranks want, several MiB together, are one *chunk*: one read.
2. What a set of ranks wants whole, and may gather, they read in equal shares, cut when it is known what travels
   together (`core.exchange.rounds`). Where not all of them see its file, one that does reads it and broadcasts it.
3. Any other chunk is read by exactly one rank: of those that need (most of) it and see its file, the one with the least
   to read so far. The least flexible chunks choose first.

A rank makes objects only of the parts that it gives or takes (`concerning`). In which rounds anybody exchanges
anything, or sends it on, it must know of all parts (`moving`), for collectives are called by all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.demand import ExchangeLimits, Sees, Servers, Ways
from ms_ckpt_ext.core.exchange.parts import Parts
from ms_ckpt_ext.core.exchange.ragged import ROWS_AT_ONCE, Ints, Sets, joined, narrow, ranks_alike, sums
from ms_ckpt_ext.core.exchange.tiers import teams_of

_AT_ONCE = 1 << 16
"""Chunks of which numbers of Python's are made together."""
EVERYBODY = -1
"""Instead of a rank: all of a group, in equal shares."""


class FedGroup(NamedTuple):
    """Ranks that are fed together: the number of their set, and who reads: `EVERYBODY`, or one who broadcasts."""

    ranks: int
    root: int = EVERYBODY


@dataclass(frozen=True)
class Chunks:
    """Columns.

    Attributes:
        parts: all parts; a chunk is a run of them.
        start: first part of every chunk, and one more.
        nbytes, file: of every chunk.
        reader: its rank; or the number of ranks plus that of a group in `groups`.
        groups: groups that gather, or are sent a broadcast.
    """

    parts: Parts
    start: Ints
    nbytes: Ints
    file: Ints
    reader: Ints
    groups: tuple[FedGroup, ...]

    @property
    def staged(self) -> Ints:
        """Bytes of every chunk that are to be read, or brought to where they are cut: none of what is in memory."""
        return np.zeros_like(self.nbytes) if self.parts.in_memory else self.nbytes

    @property
    def of_part(self) -> Ints:
        """The chunk of every part."""
        return np.repeat(np.arange(len(self.nbytes), dtype=self.start.dtype), np.diff(self.start))


def chunks_of(parts: Parts, world: int, limits: ExchangeLimits, sees: Optional[Sees], ways: Ways) -> Chunks:
    """Join parts into chunks and choose their readers; `sees` is None when all ranks see all files."""
    found = [_cut(parts, low, high, limits.read) for low, high in _whole_files(parts.file)]
    start = joined([*(first for first, _ in found), np.array([len(parts.row)])], narrow(len(parts.row)))
    longest = max((int(nbytes.max()) for _, nbytes in found), default=0)
    nbytes = joined([nbytes for _, nbytes in found], narrow(longest))
    del found
    file = parts.file[start[:-1]]
    row = parts.row[start[:-1]]
    if parts.in_memory:
        sees = {number: frozenset(ranks) for number, ranks in enumerate(parts.holders)}
    whole = parts.rows.whole[row].astype(np.int64)
    whole[np.isin(start[:-1], list(parts.scattered))] = -1
    feeds = (whole >= 0) & _feeding(parts, whole, nbytes, world, limits, ways)[whole]
    fed = np.zeros(len(row), bool)
    fed[feeds] = _all_see(parts, whole[feeds], file[feeds], sees)
    root = np.full(len(row), EVERYBODY, np.int64)
    root[~fed] = _readers(parts, row[~fed], nbytes[~fed], file[~fed], world, sees)
    feeds &= ~fed
    fed[feeds] = _broadcast(parts, whole[feeds], root[feeds], ways)
    groups, reader = _numbered(parts, whole, root, fed, world)
    return Chunks(parts, start, nbytes, file, reader, groups)


def _numbered(parts: Parts, whole: Ints, root: Ints, fed: Ints, world: int) -> tuple[tuple[FedGroup, ...], Ints]:
    """The groups that are fed, and of every chunk the reader: a rank, or a group's number behind the ranks."""
    keys, place = np.unique(whole[fed] * (world + 1) + root[fed] + 1, return_inverse=True)
    found = [FedGroup(key // (world + 1), key % (world + 1) - 1) for key in keys.tolist()]
    order = sorted(range(len(found)), key=lambda n: (parts.sets.members[found[n].ranks], found[n].root))
    reader = root.astype(narrow(world + len(found)))
    reader[fed] = world + np.argsort(order)[place]
    return tuple(found[n] for n in order), reader


def _feeding(parts: Parts, whole: Ints, nbytes: Ints, world: int, limits: ExchangeLimits, ways: Ways) -> Ints:
    """By number of a set whether it may be fed as a group: all ranks; ranks that are alike in all they want, and want
    more than a round of it."""
    some, sets = whole >= 0, parts.sets
    carried = sums(whole[some], nbytes[some], len(sets.members)).tolist()
    alike = {tuple(group) for group in ranks_alike(sets, world)} if ways.groups or ways.known else set()
    feeds = [
        (len(members) == world or (total > limits.bucket and members in alike)) and ways.may_gather(members, world)
        for members, total in zip(sets.members, carried)
    ]
    return np.array(feeds, bool)


def _all_see(parts: Parts, whole: Ints, file: Ints, sees: Optional[Sees]) -> Ints:
    """Of every chunk that a set of ranks is fed, whether all of them see its file."""
    if sees is None:
        return np.ones(len(whole), bool)
    members = {n: frozenset(parts.sets.members[n]) for n in np.unique(whole).tolist()}
    return np.array([members[n] <= sees[f] for n, f in zip(whole.tolist(), file.tolist())], bool)


def _broadcast(parts: Parts, whole: Ints, root: Ints, ways: Ways) -> Ints:
    """Of every chunk that one rank reads for a set, whether it is one of them and broadcasts it."""
    pairs = zip(whole.tolist(), root.tolist())
    return np.array([ways.broadcast and r in parts.sets.members[n] for n, r in pairs], bool)


def _whole_files(file: Ints) -> Iterator[tuple[int, int]]:
    """The parts of some files at a time, about `ROWS_AT_ONCE` of them."""
    low = 0
    while low < len(file):
        high = int(np.searchsorted(file, file[min(low + ROWS_AT_ONCE, len(file)) - 1], side="right"))
        yield low, high
        low = high


def _cut(parts: Parts, low: int, high: int, most: int) -> tuple[Ints, Ints]:
    """Of the parts `low` .. `high` those that begin a chunk, by number, and the bytes of every chunk."""
    row, file, offset = parts.row[low:high], parts.file[low:high], parts.offset[low:high].astype(np.int64)
    stops = np.cumsum(parts.rows.nbytes[row], dtype=np.int64)
    before = np.append(0, stops)
    interest = parts.rows.interest[row]
    begins = np.ones(high - low, bool)
    whole = parts.rows.whole[row]
    begins[1:] = (file[1:] != file[:-1]) | (interest[1:] != interest[:-1]) | (whole[1:] != whole[:-1])
    begins[1:] |= np.diff(offset) != np.diff(before)[:-1]
    alone = np.isin(np.arange(low, high), list(parts.scattered))
    begins |= alone
    begins[1:] |= alone[:-1]
    runs = np.append(np.flatnonzero(begins), len(begins))
    at, stop = runs[:-1], runs[1:]
    while len(at):  # every run at once: fill a chunk, go on with what is left
        at = np.maximum(np.searchsorted(before, before[at] + most, side="right") - 1, at + 1)
        at, stop = at[at < stop], stop[at < stop]
        begins[at] = True
    first = np.flatnonzero(begins)
    nbytes = np.diff(before[np.append(first, len(begins))])
    kind = narrow(len(parts.row))
    return (first + low).astype(kind), nbytes.astype(narrow(int(nbytes.max())))


def _readers(parts: Parts, row: Ints, nbytes: Ints, file: Ints, world: int, sees: Optional[Sees]) -> Ints:
    combination = parts.rows.interest[row]
    if sees is not None:
        combination = combination.astype(np.int64) * len(sees) + _views(file, sees)
    _, example, combination = np.unique(combination, return_index=True, return_inverse=True)  # any of them will do
    everyone = range(world)
    candidates = [
        _candidates(parts, int(row[n]), everyone if sees is None else sorted(sees[int(file[n])])) for n in example
    ]
    flexible = np.array([len(c) for c in candidates], narrow(world))[combination]
    reader: Ints = np.array([c[0] for c in candidates], narrow(world))[combination]
    settled = flexible == 1
    load = sums(reader[settled], nbytes[settled], world).tolist()
    rest = np.flatnonzero(~settled)
    rest = rest[np.lexsort((-nbytes[rest], flexible[rest]))]
    least = _LeastLoaded(candidates, load)
    for numbers in np.split(rest, range(_AT_ONCE, len(rest), _AT_ONCE)):
        chosen = map(least.take, combination[numbers].tolist(), nbytes[numbers].tolist())
        reader[numbers] = np.fromiter(chosen, reader.dtype, len(numbers))
    return reader


def _views(file: Ints, sees: Sees) -> Ints:
    """A number for the set of ranks that see each file."""
    numbers: dict[frozenset[int], int] = {}
    by_file = {number: numbers.setdefault(ranks, len(numbers)) for number, ranks in sees.items()}
    return np.array([by_file[int(number)] for number in file], np.int64)


def _candidates(parts: Parts, row: int, able: range | list[int]) -> tuple[int, ...]:
    """The ranks that want most of a row and see its file; if none does, all that see it."""
    rows = parts.rows
    seen = None if isinstance(able, range) else frozenset(able)
    wanting = []
    for entry in range(rows.start[row], rows.start[row + 1]):
        members = parts.sets.members[rows.ranks[entry]]
        if ranks := members if seen is None else tuple(filter(seen.__contains__, members)):
            wanting.append((rows.moved[entry], ranks))
    if not wanting:
        return tuple(able)
    most = max(moved for moved, _ in wanting)
    return tuple(sorted({rank for moved, ranks in wanting if 2 * moved >= most for rank in ranks}))


class _LeastLoaded:
    """Chooses the candidate with the least to read; of equals the lowest."""

    def __init__(self, candidates: list[tuple[int, ...]], load: list[int]) -> None:
        self._candidates, self._load = candidates, load
        self._heaps: dict[int, list[tuple[int, int]]] = {}

    def take(self, which: int, nbytes: int) -> int:
        """The reader of a chunk of `nbytes` with candidates number `which`."""
        load, heap = self._load, self._heaps.get(which)
        if heap is None:
            heap = self._heaps[which] = sorted((load[rank], rank) for rank in self._candidates[which])
        while heap[0][0] != load[heap[0][1]]:  # read something meanwhile
            heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        load[rank] += nbytes
        return rank


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
    none, least, most = values == _NONE, np.iinfo(np.int64).min, np.iinfo(np.int64).max
    high = np.maximum.reduceat(np.where(none, least, values), start[:-1])
    low = np.minimum.reduceat(np.where(none, most, values), start[:-1])
    found: Ints = np.where(high == least, _NONE, np.where(low == high, high, _SEVERAL))
    return found

"""Long reads and who makes them.

1. Neighbouring parts of a file that the same ranks want, several MiB together, are one *chunk*: one read.
2. A chunk is read by exactly one rank: of those that need (most of) it and see its file, the one with the least to
   read so far. The least flexible chunks choose first.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np

from ms_ckpt_ext.core.columns import Ints, sums
from ms_ckpt_ext.core.demand import ExchangeLimits
from ms_ckpt_ext.core.parts import Parts

Sees = Mapping[int, frozenset[int]]
"""File -> ranks that can open it."""


@dataclass(frozen=True)
class Chunks:
    """Columns.

    Attributes:
        parts: all parts, chunk after chunk, in the order of their bytes.
        start: first part of every chunk, and one more.
        nbytes, file, reader: of every chunk.
    """

    parts: Parts
    start: Ints
    nbytes: Ints
    file: Ints
    reader: Ints

    @property
    def of_part(self) -> Ints:
        """The chunk of every part."""
        return np.repeat(np.arange(len(self.nbytes), dtype=np.int32), np.diff(self.start))


def chunks_of(parts: Parts, world: int, limits: ExchangeLimits, sees: Optional[Sees]) -> Chunks:
    """Join parts into chunks and choose their readers; `sees` is None when all ranks see all files."""
    parts = _sorted(parts)
    first = _first_parts(parts, limits.read)
    start = np.append(first, len(parts.row))
    stops = np.cumsum(parts.rows.nbytes[parts.row])
    nbytes = np.diff(stops[start[1:] - 1], prepend=0)
    file = parts.file[first]
    return Chunks(parts, start, nbytes, file, _readers(parts, parts.row[first], nbytes, file, world, sees))


def _sorted(parts: Parts) -> Parts:
    """The same parts in the order of file and offset."""
    order = np.lexsort((parts.offset, parts.file)).astype(np.int32)
    back = {int(number): at for at, number in enumerate(order)} if parts.scattered else {}
    scattered = {back[number]: extents for number, extents in parts.scattered.items()}
    demand, row, file, offset = (column[order] for column in (parts.demand, parts.row, parts.file, parts.offset))
    return Parts(demand, row, file, offset, scattered, parts.rows, parts.sets)


def _first_parts(parts: Parts, most: int) -> Ints:
    """Numbers of the parts that begin a chunk."""
    if not len(parts.row):
        return np.empty(0, np.int64)
    nbytes = parts.rows.nbytes[parts.row]
    interest = parts.rows.interest[parts.row]
    begins = np.ones(len(parts.row), bool)
    begins[1:] = (parts.file[1:] != parts.file[:-1]) | (interest[1:] != interest[:-1])
    begins[1:] |= parts.offset[1:] != parts.offset[:-1] + nbytes[:-1]
    for number in parts.scattered:
        begins[number : number + 2] = True
    runs = np.append(np.flatnonzero(begins), len(begins))
    before = np.concatenate([[0], np.cumsum(nbytes)])
    at, stop = runs[:-1], runs[1:]
    while len(at):  # every run at once: fill a chunk, go on with what is left
        full = np.searchsorted(before, before[at] + most, side="right") - 1
        at = np.maximum(full, at + 1)
        at, stop = at[at < stop], stop[at < stop]
        begins[at] = True
    return np.flatnonzero(begins)


def _readers(parts: Parts, row: Ints, nbytes: Ints, file: Ints, world: int, sees: Optional[Sees]) -> Ints:
    interest = parts.rows.interest[row]
    views = _views(file, sees)
    combined = interest * (int(views.max(initial=0)) + 1) + views
    _, example, combination = np.unique(combined, return_index=True, return_inverse=True)
    everyone = range(world)
    candidates = [
        _candidates(parts, int(row[n]), everyone if sees is None else sorted(sees[int(file[n])])) for n in example
    ]
    flexible = np.array([len(c) for c in candidates], np.int64)[combination]
    reader = np.array([c[0] for c in candidates], np.int32)[combination]
    settled = flexible == 1
    load = sums(reader[settled], nbytes[settled], world).tolist()
    rest = np.flatnonzero(~settled)
    rest = rest[np.lexsort((-nbytes[rest], flexible[rest]))]
    least = _LeastLoaded(candidates, load)
    for low in range(0, len(rest), 1 << 16):
        numbers = rest[low : low + (1 << 16)]
        chosen = map(least.take, combination[numbers].tolist(), nbytes[numbers].tolist())
        reader[numbers] = np.fromiter(chosen, np.int32, len(numbers))
    return reader


def _views(file: Ints, sees: Optional[Sees]) -> Ints:
    """A number for the set of ranks that see each file."""
    if sees is None:
        return np.zeros(len(file), np.int64)
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
        wanting.append((rows.moved[entry], members if seen is None else tuple(filter(seen.__contains__, members))))
    most = max((moved for moved, ranks in wanting if ranks), default=0)
    keen = {rank for moved, ranks in wanting if 2 * moved >= most for rank in ranks}
    return tuple(sorted(keen)) or tuple(able)


class _LeastLoaded:
    """Chooses the candidate with the least to read; of equals the lowest."""

    def __init__(self, candidates: list[tuple[int, ...]], load: list[int]) -> None:
        self._candidates, self._load = candidates, load
        self._heaps: dict[int, list[tuple[int, int]]] = {}

    def take(self, which: int, nbytes: int) -> int:
        """The reader of a chunk of `nbytes` with candidates number `which`."""
        load, ranks = self._load, self._candidates[which]
        if len(ranks) <= 4:
            rank = min(ranks, key=load.__getitem__)
            load[rank] += nbytes
            return rank
        heap = self._heaps.get(which)
        if heap is None:
            heap = self._heaps[which] = [(load[rank], rank) for rank in ranks]
            heapq.heapify(heap)
        while heap[0][0] != load[heap[0][1]]:  # read for others meanwhile
            heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        load[rank] += nbytes
        heapq.heapreplace(heap, (load[rank], rank))
        return rank

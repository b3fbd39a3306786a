"""Work on files, dealt out to the ranks of a job: each file's to ranks that see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.exchange.demand import Sees

_TOGETHER = 1 << 20
"""Bytes up to which work on one file goes to one rank, which opens it once."""


class Work(NamedTuple):
    """Something that is done with `nbytes` of a file, of a number."""

    file: int
    nbytes: int


class _Bundle(NamedTuple):
    file: int
    nbytes: int
    numbers: list[int]


def deal(work: Sequence[Work], load: list[int], sees: Optional[Sees]) -> list[int]:
    """The rank that does each piece of work: the largest first, each by whoever has the least so far.

    Args:
        load: what every rank has so far; grows by what it is given.
        sees: file number -> ranks that can open it; None when all see all.
    """
    ranks = [0] * len(work)
    turns = _Turns(load)
    for bundle in sorted(_bundles(work), key=_nbytes, reverse=True):
        rank = turns.take(None if sees is None else frozenset(sees[bundle.file]), bundle.nbytes)
        for number in bundle.numbers:
            ranks[number] = rank
    return ranks


class _Turns:
    """Who has the least, of some ranks, without looking at all of them each time: a heap for every set of ranks.

    A load that grew by another set's turn is put right when its rank comes to the top.
    """

    def __init__(self, load: list[int]) -> None:
        self._load = load
        self._heaps: dict[Optional[frozenset[int]], list[tuple[int, int]]] = {}

    def take(self, able: Optional[frozenset[int]], nbytes: int) -> int:
        """Give so much more to one of those who are able, None being all; the lowest of those who have the least."""
        load = self._load
        if able not in self._heaps:
            self._heaps[able] = [(load[rank], rank) for rank in (range(len(load)) if able is None else able)]
            heapify(self._heaps[able])
        heap = self._heaps[able]
        while heap[0][0] != load[heap[0][1]]:
            heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        load[rank] += nbytes
        heapreplace(heap, (load[rank], rank))
        return rank


def _nbytes(bundle: _Bundle) -> int:
    return bundle.nbytes


def _bundles(work: Sequence[Work]) -> Iterator[_Bundle]:
    under_way: dict[int, _Bundle] = {}
    for number, (file, nbytes) in enumerate(work):
        before = under_way.pop(file, _Bundle(file, 0, []))
        before.numbers.append(number)
        bundle = before._replace(nbytes=before.nbytes + nbytes)
        if bundle.nbytes < _TOGETHER:
            under_way[file] = bundle
        else:
            yield bundle
    yield from under_way.values()

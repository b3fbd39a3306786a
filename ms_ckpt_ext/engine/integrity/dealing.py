"""Work on files, dealt out to the ranks of a job: each file's to ranks that see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    for bundle in sorted(_bundles(work), key=_nbytes, reverse=True):
        able = range(len(load)) if sees is None else sorted(sees[bundle.file])
        rank = min(able, key=load.__getitem__)
        load[rank] += bundle.nbytes
        for number in bundle.numbers:
            ranks[number] = rank
    return ranks


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

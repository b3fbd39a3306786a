"""Which ranks see the same files, and which of them does what with each: work on files is dealt out.

Ranks of one host see the same, but its name alone does not tell which is which.

Containers on one machine may have one name and one network, and disks of their own; machines made from one image may
have one name. So the key of a host is its name and a digest of what the kernel says: the boot, the namespaces of mounts
and network, the root directory, the addresses. Ranks with equal keys see the same files, and one of them looks for
all. Ranks with different keys may as well: that a file is the same is then seen by its size, times and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.transport.rendezvous.interfaces import network_identity

_SEPARATOR = "\0"
_TOGETHER = 1 << 20
"""Bytes up to which work on one file goes to one rank, which opens it once."""


def host_key(named: str = "") -> str:
    """What this process's host is called among those of the job.

    Args:
        named: what the user calls it: ranks that give the same name see the same files.
    """
    return named or f"{socket.gethostname()}{_SEPARATOR}{_view()}"


def _view() -> str:
    told = [network_identity()]
    for path in ("/proc/self/ns/mnt", "/"):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            told += [str(status.st_dev), str(status.st_ino)]
    return hashlib.blake2b(" ".join(told).encode(), digest_size=8).hexdigest()


def told_apart(keys: Sequence[str]) -> list[str]:
    """Keys as names for messages, as different as the keys are: the second host of a name has its number with it.

    >>> told_apart(["a", "node\\0e1", "node\\0e2", "node\\0e1"])
    ['a', 'node', 'node (2)', 'node']
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    for key in dict.fromkeys(keys):
        name = shown = key.split(_SEPARATOR)[0]
        while shown in taken:
            numbers[name] = numbers.get(name, 1) + 1
            shown = f"{name} ({numbers[name]})"
        taken.add(shown)
        names[key] = shown
    return [names[key] for key in keys]


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
    """Finds the rank with the least without looking at all of them each time: a heap for every set of ranks.

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

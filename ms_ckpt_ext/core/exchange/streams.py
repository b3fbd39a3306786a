"""What groups gather, or what is broadcast to them, in a round.

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
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT
from ms_ckpt_ext.core.exchange.ragged import Ints


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

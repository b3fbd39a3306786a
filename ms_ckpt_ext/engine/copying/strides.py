"""Strided copies between flat arrays of bytes, and from a read right into such an array."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Optional

from ms_ckpt_ext.core.geometry.strided import StridedCopy, offsets_of
from ms_ckpt_ext.core.planning.io_units import ReadCopy
from ms_ckpt_ext.storage.linux import address_of

_FEW = 64
"""Runs that are copied one by one sooner than numpy is imported, or its arrays made."""

_STRIP = 32
"""Elements of a transposed matrix that are copied side by side: two to three times as fast as all at once."""


def copy_strided(copy: StridedCopy, source: Any, target: Any) -> None:
    """Make one strided copy. `source` and `target` are flat bytes: uint8 arrays, or anything that is a buffer."""
    if not copy.counts:
        target[copy.target : copy.target + copy.run] = source[copy.source : copy.source + copy.run]
    elif copy.nbytes <= _FEW * copy.run:
        for lying, landing in copy.runs():
            target[landing : landing + copy.run] = source[lying : lying + copy.run]
    else:
        _copy_many(copy, source, target)


def _copy_many(copy: StridedCopy, source: Any, target: Any) -> None:
    import numpy as np  # takes longer than all else that a file job imports, and many jobs never come here

    grain = copy.run if copy.run in (2, 4, 8) else 1  # a transposed matrix: runs of one element
    shape, dtype = (*copy.counts, copy.run // grain), np.dtype(f"u{grain}")
    lying: Any = np.ndarray(shape, dtype, source, copy.source, (*copy.source_strides, grain))
    landing: Any = np.ndarray(shape, dtype, target, copy.target, (*copy.target_strides, grain))
    if copy.run not in copy.target_strides:
        landing[...] = lying
        return
    # Transposed: by strips, so that a cache line of the target is written while its neighbours are at hand.
    axis = copy.target_strides.index(copy.run)
    lying, landing = np.moveaxis(lying, axis, 0), np.moveaxis(landing, axis, 0)
    for start in range(0, copy.counts[axis], _STRIP):
        landing[start : start + _STRIP] = lying[start : start + _STRIP]


def scattered(
    copies: Sequence[ReadCopy], nbytes: int, buffers: Sequence[memoryview], shortest: int
) -> Optional[array[int]]:
    """Where in memory the bytes of a read go, in their order: address and length of every run, in turn.

    Copies that take turns (each run of one is followed by a run of the next) are made out, others are not.

    Args:
        copies: of the read, which has `nbytes`.
        buffers: of every stretch that the copies name; they must live as long as the addresses are used.
        shortest: bytes that runs must have on average.

    Returns:
        None where that is no way to read: short runs, bytes that go nowhere or to several places, an odd order.
    """
    wanted = sum(copy.nbytes for _, copy in copies)
    if wanted != nbytes or sum(copy.nbytes // copy.run for _, copy in copies) * shortest > nbytes:
        return None
    if not all(_fits(copy, len(buffers[stretch])) for stretch, copy in copies):
        return None  # nothing would stop the kernel
    vector: array[int] = array("Q")
    turns: list[ReadCopy] = []
    begin = end = 0  # where the first of the turns begins in the read, and where the bytes made out so far end
    for each in sorted(copies, key=_source):
        copy = each.copy
        period = copy.source_strides[-1] if copy.counts else copy.run
        if copy.source != end or (turns and not _alike(copy, turns[0].copy)):
            return None
        turns.append(each)
        end += copy.run
        if end - begin == period and _solid_outside(copy):
            vector.extend(_in_turn(turns, buffers))
            begin = end = begin + sum(turn.copy.nbytes for turn in turns)
            turns = []
    return None if turns else vector


def _fits(copy: StridedCopy, size: int) -> bool:
    return min(copy.target_strides, default=1) > 0 and copy.target + copy.target_span <= size


def _source(each: ReadCopy) -> int:
    return each.copy.source


def _alike(copy: StridedCopy, other: StridedCopy) -> bool:
    return (copy.counts, copy.source_strides) == (other.counts, other.source_strides)


def _solid_outside(copy: StridedCopy) -> bool:
    """Whether every outer axis goes on in the source where the one inside it ends."""
    counts, strides = copy.counts, copy.source_strides
    return all(strides[axis] == counts[axis + 1] * strides[axis + 1] for axis in range(len(counts) - 1))


def _in_turn(turns: Sequence[ReadCopy], buffers: Sequence[memoryview]) -> array[int]:
    """Address and length of every run: the first of each copy, the second of each copy, …"""
    count = turns[0].copy.nbytes // turns[0].copy.run
    vector = array("Q", bytes(16 * len(turns) * count))
    step = 2 * len(turns)
    for turn, (stretch, copy) in enumerate(turns):
        landing: array[int] = array("Q")
        first = address_of(buffers[stretch]) + copy.target
        if copy.counts:
            length, stride = copy.counts[-1], copy.target_strides[-1]
            starts = offsets_of(first, copy.counts[:-1], copy.target_strides[:-1])
            for start in starts:
                landing.extend(range(start, start + length * stride, stride))
        else:
            landing.append(first)
        vector[2 * turn :: step] = landing
        vector[2 * turn + 1 :: step] = array("Q", [copy.run]) * count
    return vector

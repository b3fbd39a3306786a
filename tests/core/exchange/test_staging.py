"""How much of what is read is held at once, in tables."""

from __future__ import annotations

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange.demand import SLAB
from ms_ckpt_ext.core.exchange.staging import Reads, held_bytes

MIB = 1 << 20


def reads(*chunks: tuple[int, int, int, int]) -> Reads:
    """Of every chunk the rank, bytes, first and last round."""
    columns = np.array(chunks, np.int64).reshape(-1, 4).T
    reader, nbytes, first, last = columns
    return Reads(reader, np.zeros(len(reader), np.int64), nbytes, first, last)


@pytest.mark.parametrize(
    ("chunks", "held"),
    [
        ([], 0),
        ([(0, 100, 0, 0)], 112),  # as a block of 16 bytes ends
        ([(0, 100, 0, 0), (0, 60, 0, 0)], 176),  # in one slab
        ([(0, MIB, 0, 0)] * 4, SLAB),
        ([(0, MIB, 0, 0)] * 5, 2 * SLAB),
        ([(0, 3 * MIB, 0, 0)] * 3, 3 * SLAB),
        ([(0, 3 * MIB, 0, 0), (0, 2 * MIB, 0, 0), (0, MIB, 0, 0)], 2 * SLAB),
        ([(0, MIB, 0, 0), (0, 9 * MIB, 0, 0), (0, MIB, 0, 0)], 3 * 9 * MIB),  # all slabs are as the largest
        ([(0, SLAB - 15, 0, 0), (0, 16, 0, 0)], 2 * SLAB),
        ([(0, SLAB - 32, 0, 0), (0, 17, 0, 0)], SLAB),  # what would lie behind the last chunk needs no room
    ],
)
def test_chunks_of_a_round_share_slabs(chunks: list[tuple[int, int, int, int]], held: int) -> None:
    assert held_bytes(reads(*chunks), 2, 1, 0).tolist() == [held, 0]


def test_every_rank_fills_slabs_of_its_own_for_every_round() -> None:
    """As many chunks of a MiB as make two slabs, one and three; in the next round one, none and two."""
    counts = {(0, 0): 5, (1, 0): 1, (2, 0): 9, (0, 1): 2, (2, 1): 8}
    some = [(rank, MIB, number, number) for (rank, number), count in counts.items() for _ in range(count)]
    assert held_bytes(reads(*some), 4, 2, 0).tolist() == [3 * SLAB, MIB, 5 * SLAB, 0]
    assert held_bytes(reads(*some[::-1]), 4, 2, 0).tolist() == [3 * SLAB, MIB, 5 * SLAB, 0]


@pytest.mark.parametrize(("prefetch", "slabs"), [(0, 2), (1, 3), (2, 4), (4, 6), (9, 6)])
def test_rounds_are_read_ahead_while_one_is_under_way(prefetch: int, slabs: int) -> None:
    """A chunk for each of six rounds; another rank has one for the third."""
    some = [(0, 1600, number, number) for number in range(6)]
    assert held_bytes(reads(*some, (1, 32, 2, 2)), 2, 6, prefetch).tolist() == [1600 * slabs, 32]


def test_a_slab_is_held_until_the_last_of_it_was_used() -> None:
    """The small chunk keeps that of the first round until the fourth is over."""
    some = reads((0, 160, 0, 0), (0, 16, 0, 3), (0, 176, 1, 1), (0, 176, 2, 2), (0, 176, 3, 3), (0, 176, 4, 4))
    assert held_bytes(some, 1, 5, 0).tolist() == [3 * 176]
    assert held_bytes(some._replace(last=some.first), 1, 5, 0).tolist() == [2 * 176]

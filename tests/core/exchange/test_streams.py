"""Streams of groups: equal shares, every byte read once and put where its part lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.chunks import FedGroup, chunks_of
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, ExchangeLimits, Ways
from ms_ckpt_ext.core.exchange.streams import gatherings, stream_of
from tests.core.exchange.test_chunks import Part, apart, parts_of

# Parts of a file: gaps before them (0: a neighbour of the one before) and lengths.
FILES = st.lists(st.lists(st.tuples(st.sampled_from([0, 0, 3, 64]), st.integers(1, 200)), max_size=6), max_size=4)


@settings(max_examples=200, deadline=None)
@given(FILES, st.integers(1, 9), st.sampled_from([16, 64, 1 << 20]))
def test_a_stream_is_read_once_in_equal_shares(files: list[list[tuple[int, int]]], members: int, most: int) -> None:
    rng = np.random.default_rng(0)
    contents = [rng.integers(1, 256, 2000, np.uint8) for _ in files]
    columns: list[tuple[int, int, int]] = []
    for number, parts in enumerate(files):
        at = 0
        for gap, nbytes in parts:
            columns.append((number, at + gap, nbytes))
            at += gap + nbytes
    if not columns:
        return
    file, offset, nbytes = (np.array(column) for column in zip(*columns))
    stream = stream_of(file, offset, nbytes, members, most)
    memory = np.zeros(stream.share * members, np.uint8)
    for member, where, start, length, place in zip(*stream.pieces):
        assert place // stream.share == (place + length - 1) // stream.share == member
        assert 0 < length <= most
        assert not memory[place : place + length].any(), "read twice"
        memory[place : place + length] = contents[where][start : start + length]
    for (where, start, length), place in zip(columns, stream.at.tolist()):
        assert memory[place : place + length].tobytes() == contents[where][start : start + length].tobytes()
    assert stream.pieces.nbytes.sum() == nbytes.sum()
    assert stream.share % ALIGNMENT == 0
    follows = [False, *((a, b + n) == (c, d) for (a, b, n), (c, d, _) in zip(columns, columns[1:]))]
    assert all(place % ALIGNMENT == 0 for place, neighbour in zip(stream.at.tolist(), follows) if not neighbour)
    assert memory.size <= nbytes.sum() + ALIGNMENT * (len(columns) + members)


@pytest.mark.parametrize("file", [0, 1])
def test_parts_that_are_neighbours_are_one_read(file: int) -> None:
    """Behind a part of the first file."""
    files, offset, nbytes = np.array([0, *[file] * 3]), np.array([0, 8, 20, 60]), np.array([1, 12, 30, 4])
    stream = stream_of(files, offset, nbytes, 1, 1 << 20)
    assert [column.tolist() for column in stream.pieces[1:]] == [[0, file, file], [0, 8, 60], [1, 42, 4], [0, 16, 64]]
    assert stream.at.tolist() == [0, 16, 28, 64]


def test_a_group_is_fed_in_every_round_what_travels_in_it() -> None:
    """Two groups, one of which is sent a broadcast as well, and a part that one rank reads."""
    parts = parts_of([*apart(*[(500, (2, 3)), (500, (0, 1))] * 3), Part(1, 0, 500, (0, 1)), Part(2, 0, 10, (4,))])
    sees = {0: frozenset(range(5)), 1: frozenset({1}), 2: frozenset({4})}
    chunks = chunks_of(parts, 5, ExchangeLimits(128, 100), sees, Ways(groups=True, broadcast=True))
    left, right = (parts.sets.number(ranks) for ranks in ((0, 1), (2, 3)))
    found = [*gatherings(chunks, np.array([0, 0, 1, 1, 2, 1, 2, 1]), 5, 300)]
    assert [(each.round, each.group, each.parts.tolist()) for each in found] == [
        (0, FedGroup(left), [1]),
        (0, FedGroup(right), [0]),
        (1, FedGroup(left), [3, 5]),
        (1, FedGroup(right), [2]),
        (2, FedGroup(left, 1), [6]),
        (2, FedGroup(right), [4]),
    ]
    reads = [[column.tolist() for column in found[number].stream.pieces] for number in (2, 4)]
    assert reads[0] == [[0, 0, 1, 1], [0] * 4, [3000, 3300, 5000, 5300], [300, 200, 300, 200], [0, 300, 512, 812]]
    assert reads[1] == [[1, 1], [1, 1], [0, 300], [300, 200], [0, 300]]
    assert [found[number].stream.share for number in (2, 4)] == [512, 512]

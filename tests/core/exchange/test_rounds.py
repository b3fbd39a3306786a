"""Streams of groups: equal shares, every byte read once and put where its part lies."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT
from ms_ckpt_ext.core.exchange.rounds import stream_of

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
    assert memory.size <= nbytes.sum() + ALIGNMENT * (len(columns) + members)


def test_parts_that_are_neighbours_are_one_read() -> None:
    stream = stream_of(np.zeros(3, int), np.array([8, 20, 60]), np.array([12, 30, 4]), 1, 1 << 20)
    assert [column.tolist() for column in stream.pieces] == [[0, 0], [0, 0], [8, 60], [42, 4], [0, 48]]
    assert stream.at.tolist() == [0, 12, 48]

"""Messages that no rank of a job sends: refused by name, whatever they claim to be, in bounded memory."""

from __future__ import annotations

import json
import socket
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.agree import pack, unpack_all
from ms_ckpt_ext.transport.base import inflated
from ms_ckpt_ext.transport.hub.frames import ALL, FRAME, Malformed, decode_answer, encode_answer, frame, take_frames
from ms_ckpt_ext.transport.hub.limits import DEFAULT
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.rendezvous.search import Arrival
from tests.support.damage import edits, memory_limit, mutate, time_limit

BOMB = zlib.compress(bytes(64 << 20), 9)
ANSWER = encode_answer([b"a" * 40, b"b" * 9], [0, 1, 0, 0])


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_what_was_compressed_comes_back(size: int) -> None:
    assert inflated(zlib.compress(b"x" * size), 100) == b"x" * size


@pytest.mark.parametrize("data", [b"", b"x", BOMB, zlib.compress(bytes(101)), zlib.compress(b"x" * 50)[:-1]])
def test_what_is_too_long_or_not_compressed(data: bytes) -> None:
    with memory_limit(1 << 20), pytest.raises(ValueError, match=r"."):
        inflated(data, 100)


@pytest.mark.parametrize(
    "data", [b"", b"{}", zlib.compress(b"{"), zlib.compress(b"[" * 100_000), zlib.compress(b"\xff"), pack([1])[:-2]]
)
def test_what_no_rank_packs(data: bytes) -> None:
    with time_limit(), pytest.raises(TransportError, match="the same version of this package"):
        unpack_all([data], object)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_what_a_rank_packs(value: Any) -> None:
    assert unpack_all([pack(value)], object) == [json.loads(json.dumps(value))]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01",
        struct.pack("<I", 2**32 - 1),
        struct.pack("<IQ", 1, 2**63) + zlib.compress(bytes(4)),
        struct.pack("<IQ", 1, 0) + BOMB,
        struct.pack("<I", 0) + zlib.compress(bytes(4)),
        struct.pack("<IQ", 1, 0) + zlib.compress(b"\x07"),
        struct.pack("<I", 300) + bytes(2400) + zlib.compress(b"odd"),
    ],
)
def test_answers_that_are_none(body: bytes) -> None:
    with time_limit(), memory_limit(64 << 20):
        try:
            assert sum(map(len, decode_answer(body))) <= len(body)
        except Malformed as error:
            assert len(str(error)) > 10


@settings(max_examples=150)
@given(edits)
def test_mutated_answers(changes: list[Any]) -> None:
    with time_limit(), memory_limit(64 << 20):
        try:
            assert all(isinstance(payload, bytes) for payload in decode_answer(mutate(ANSWER, changes)))
        except Malformed as error:
            assert len(str(error)) > 10


@pytest.mark.parametrize("message", [frame(ALL, 0, b"\x01"), FRAME.pack(ALL, 0, 1 << 60)], ids=["no answer", "endless"])
def test_a_hub_that_talks_nonsense(message: bytes) -> None:
    """The rank raises, and says who it was; it does not wait for a message of an exabyte."""
    hub, mine = socket.socketpair()
    line = Line(1, 2, timeout=20)
    with hub, time_limit():
        line.attach(Arrival(mine, 0, message))
        with pytest.raises((TransportError, PeerError), match="rank 0.*the same version"):
            line.share(b"x")
        line.close()


def test_the_longest_answer_is_let_in() -> None:
    """Distinct payloads of all ranks that together are as long as a hub sends."""
    size = 600
    contents = [struct.pack("<I", rank) * (DEFAULT.answer_bytes(size) // size // 4 - 2) for rank in range(size)]
    message = frame(ALL, 0, encode_answer(contents, range(size)))
    (said,) = take_frames(bytearray(message), DEFAULT.longest_answer(size))
    assert decode_answer(said.body) == contents

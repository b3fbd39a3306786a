"""How a hub reduces what ranks tell: pure functions, so literal values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import pytest

from ms_ckpt_ext.transport.hub import frames
from ms_ckpt_ext.transport.hub.frames import (
    ALIKE,
    ALL,
    ASK,
    GATHER,
    GIVE,
    NOTED,
    TELL,
    Malformed,
    Message,
    decode_answer,
    encode_answer,
    frame,
    note_of,
    take_frames,
)
from ms_ckpt_ext.transport.hub.reduction import Reduction, Reply

LONG = b"a long one" * 20


def reduced(*payloads: bytes, answer_bytes: int = 4096) -> Optional[Reply]:
    """What follows when each rank has told its payload, in an order that is not theirs."""
    share, reply = Reduction(len(payloads), answer_bytes), None
    for rank, payload in sorted(enumerate(payloads), reverse=True):
        assert reply is None, "answered before everybody told"
        reply = share.take(rank, told(payload))
    return reply


def told(payload: bytes) -> Message:
    return Message(TELL, 0, payload) if len(payload) < 100 else Message(NOTED, 0, note_of(payload))


def answered(reply: Optional[Reply]) -> list[bytes]:
    assert reply is not None
    (said,) = take_frames(bytearray(reply.message))
    assert said.kind == ALL and reply.ranks is None
    return decode_answer(said.body)


@pytest.mark.parametrize("payload", [b"", b"digest", LONG])
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_what_is_equal_everywhere_goes_back_as_one_word(payload: bytes, size: int) -> None:
    assert reduced(*[payload] * size) == (frame(ALIKE), None)
    assert len(frame(ALIKE)) == 16


@pytest.mark.parametrize("payloads", [(b"a", b""), (b"", b"x", b"", b"y", b"x"), tuple(bytes([n]) for n in range(256))])
def test_what_differs_goes_to_everybody_once(payloads: tuple[bytes, ...]) -> None:
    assert answered(reduced(*payloads)) == list(payloads)


def test_the_message_of_one_among_thousands_is_short() -> None:
    reply = reduced(*[b""] * 5000, b"!", *[b""] * 3191, answer_bytes=8192)
    assert reply is not None and len(reply.message) < 150
    assert answered(reply).index(b"!") == 5000


def test_a_long_payload_is_asked_of_the_lowest_rank_that_has_it() -> None:
    share = Reduction(4, 4096)
    assert [share.take(rank, told(payload)) for rank, payload in ((3, LONG), (0, b""), (1, LONG))] == [None] * 3
    assert share.awaited() == [2]
    assert share.take(2, told(LONG + b"!")) == (frame(ASK), [1, 2])
    assert share.awaited() == [1, 2]
    assert share.take(2, Message(GIVE, 2, LONG + b"!")) is None
    assert share.awaited() == [1]
    assert answered(share.take(1, Message(GIVE, 1, LONG))) == [b"", LONG, LONG + b"!", LONG]


@pytest.mark.parametrize("payloads", [[b"%d" % n for n in range(100)], [LONG * 3, LONG * 2], [b"x" * 99, b"y"]])
def test_what_is_too_much_is_gathered_elsewhere(payloads: list[bytes]) -> None:
    assert reduced(*payloads, answer_bytes=100) == (frame(GATHER), None)


@pytest.mark.parametrize(
    "said",
    [
        {0: Message(TELL, 0, b""), 1: Message(b"what", 1, b"")},
        {0: Message(GIVE, 0, LONG)},
        {0: Message(NOTED, 0, b"too short")},
    ],
)
def test_what_no_rank_says_is_refused(said: Mapping[int, Message]) -> None:
    share = Reduction(3, 4096)
    with pytest.raises(Malformed):
        for rank, word in said.items():
            share.take(rank, word)


def test_nobody_tells_twice_and_nobody_gives_another_thing() -> None:
    share = Reduction(2, 4096)
    share.take(0, told(LONG))
    with pytest.raises(Malformed, match="out of turn"):
        share.take(0, told(LONG))
    share.take(1, told(b""))
    with pytest.raises(Malformed, match="not asked for"):
        share.take(0, Message(GIVE, 0, LONG + b"!"))


@pytest.mark.parametrize("count", [1, 2, 256, 257, 1000])
def test_an_answer_of_many_payloads(count: int) -> None:
    contents = [b"%d" % (n * n) for n in range(count)]
    which = [*range(count), *reversed(range(count))]
    assert decode_answer(encode_answer(contents, which)) == [contents[number] for number in which]


def test_frames_come_in_pieces() -> None:
    sent = frame(TELL, 3, b"abc") + frame(GIVE, 4, b"") + frame(NOTED, 5, b"\0" * 24)
    received, found = bytearray(), []
    for byte in sent:
        received.append(byte)
        found += take_frames(received)
    assert found == [(TELL, 3, b"abc"), (GIVE, 4, b""), (NOTED, 5, b"\0" * 24)] and not received


def test_a_frame_that_claims_to_be_huge_is_refused_before_it_has_come() -> None:
    with pytest.raises(Malformed, match="a message of 4294967296 bytes, where 100 is the most"):
        take_frames(bytearray(frames.FRAME.pack(TELL, 0, 1 << 32)), 100)

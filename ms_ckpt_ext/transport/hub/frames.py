"""Messages between a hub and the lines to it. Equal payloads travel once.

A frame is a kind, a number (of a rank, where it is about one) and a body. In one share

    a rank sends   TELL its payload, or NOTED its digest and length where it is long;  GIVE the payload when asked
    the hub sends  ALIKE all payloads are equal: each rank has it already;  ALL the distinct ones, and which rank has
                   which;  ASK send yours;  GATHER they are too large for a hub: all-gather them over the backend

and at any time BYE a rank leaves; PING the hub asks a quiet rank whether it is alive, HERE it is; GONE, LATE the
job is broken, with the rank that is the cause and the message to raise.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.transport.base import inflated

FRAME = struct.Struct("<4sIQ")  # kind, number, length of the body
LENGTH = struct.Struct("<Q")
TELL, NOTED, GIVE, HERE, BYE = b"tell", b"note", b"give", b"here", b"bye."
ALIKE, ALL, ASK, GATHER, PING, GONE, LATE = b"same", b"all.", b"ask.", b"gath", b"ping", b"gone", b"late"
NOTE_BYTES = 24
"""A digest of 16 bytes and a length of 8."""
_NOTE = struct.Struct("<16sQ")
_COUNT = struct.Struct("<I")
_MOST_NUMBERS = 4 << 20
"""Bytes of the numbers of a million ranks."""


class Message(NamedTuple):
    """One message."""

    kind: bytes
    number: int
    body: bytes


class Malformed(Exception):
    """Bytes that no rank of this job sends."""


def frame(kind: bytes, number: int = 0, body: bytes = b"") -> bytes:
    """A frame as bytes."""
    return FRAME.pack(kind, number, len(body)) + body


def take_frames(received: bytearray, longest: Optional[int] = None) -> list[Message]:
    """Remove and return the complete frames at the front. Raises Malformed when one claims to be over `longest`."""
    found = []
    while len(received) >= FRAME.size:
        kind, number, length = FRAME.unpack_from(received)
        if longest is not None and length > longest:
            raise Malformed(f"a message of {length} bytes, where {longest} is the most")
        end = FRAME.size + length
        if len(received) < end:
            break
        found.append(Message(kind, number, bytes(received[FRAME.size : end])))
        del received[:end]
    return found


def note_of(payload: bytes) -> bytes:
    """The note of a payload: `NOTE_BYTES` bytes that are equal for equal payloads only."""
    return _NOTE.pack(hashlib.blake2b(payload, digest_size=16).digest(), len(payload))


def length_noted(note: bytes) -> int:
    """The length of the payload that a note stands for."""
    return int(_NOTE.unpack(note)[1])


def encode_answer(contents: Sequence[bytes], which: Sequence[int]) -> bytes:
    """The body of an ALL: distinct payloads, and which of them each rank has."""
    lengths = b"".join(LENGTH.pack(len(content)) for content in contents)
    numbers = np.asarray(which, np.uint8 if len(contents) <= 256 else np.uint32)
    return b"".join([_COUNT.pack(len(contents)), lengths, *contents, zlib.compress(numbers.tobytes(), 1)])


def decode_answer(body: bytes) -> list[bytes]:
    """Every rank's payload, in rank order. Raises Malformed.

    >>> decode_answer(encode_answer([b"", b"no"], [0, 1, 0]))
    [b'', b'no', b'']
    """
    try:
        (count,) = _COUNT.unpack_from(body)
        at = _COUNT.size + count * LENGTH.size
        contents = []
        for number in range(count):
            (length,) = LENGTH.unpack_from(body, _COUNT.size + number * LENGTH.size)
            contents.append(body[at : at + length])
            at += length
        numbers = np.frombuffer(inflated(body[at:], _MOST_NUMBERS), np.uint8 if count <= 256 else np.uint32)
        return [contents[number] for number in numbers.tolist()]
    except (struct.error, ValueError, IndexError) as error:
        raise Malformed(f"an answer that is none ({error})") from None

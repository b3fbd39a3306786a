"""One share as the hub sees it: payloads of all ranks are put together, and only what differs is sent on. No I/O.

1. Ranks send a payload, or the note of a long one; equal ones are counted together as they come.
2. When all have sent theirs: if all are equal, the hub says so in a few bytes.
3. Else the distinct payloads go to all ranks; the hub asks for those that it has only notes of, each from the lowest
   rank that has it. If that would be too much for one process to send, all ranks gather them over the backend.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from ms_ckpt_ext.transport.hub.frames import (
    ALIKE,
    ALL,
    ASK,
    GATHER,
    GIVE,
    LENGTH,
    NOTE_BYTES,
    NOTED,
    TELL,
    Malformed,
    Message,
    encode_answer,
    frame,
    length_noted,
    note_of,
)


class Reply(NamedTuple):
    """What the hub sends, and to which ranks; None is all, which ends the share."""

    message: bytes
    ranks: Optional[list[int]]


_EVERYBODY_SAME = Reply(frame(ALIKE), None)


class Reduction:
    """What ranks have sent in one share.

    Args:
        size: ranks that take part.
        answer_bytes: length of the longest answer.
    """

    def __init__(self, size: int, answer_bytes: int) -> None:
        self._size = size
        self._answer_bytes = answer_bytes
        self._groups: dict[tuple[bytes, bytes], list[int]] = {}
        self._told = bytearray(size)
        self._count = 0
        self._asked: dict[int, tuple[bytes, bytes]] = {}
        self._given: dict[tuple[bytes, bytes], bytes] = {}

    def take(self, rank: int, said: Message) -> Optional[Reply]:
        """The reply to a rank's message, if there is one now. Raises Malformed when the message is out of turn."""
        if said.kind == GIVE:
            return self._give(rank, said.body)
        if said.kind not in (TELL, NOTED) or self._told[rank] or (said.kind == NOTED and len(said.body) != NOTE_BYTES):
            raise Malformed(f"{said.kind!r} out of turn")
        self._told[rank] = 1
        self._count += 1
        self._groups.setdefault((said.kind, said.body), []).append(rank)
        return self._complete() if self._count == self._size else None

    def awaited(self) -> list[int]:
        """Ranks that the others wait for."""
        return sorted(self._asked) or [rank for rank, told in enumerate(self._told) if not told]

    def _complete(self) -> Reply:
        if len(self._groups) == 1:
            return _EVERYBODY_SAME
        if self._cost() > self._answer_bytes:
            return Reply(frame(GATHER), None)
        self._asked = {min(ranks): key for key, ranks in self._groups.items() if key[0] == NOTED}
        return Reply(frame(ASK), sorted(self._asked)) if self._asked else self._answer()

    def _cost(self) -> int:
        """Bytes of the answer, at most."""
        contents = sum(len(body) if kind == TELL else length_noted(body) for kind, body in self._groups)
        numbers = self._size * (len(self._groups) - 1).bit_length() // 8
        return contents + LENGTH.size * len(self._groups) + numbers

    def _give(self, rank: int, payload: bytes) -> Optional[Reply]:
        key = self._asked.pop(rank, None)
        if key is None or note_of(payload) != key[1]:
            raise Malformed("a payload that was not asked for")
        self._given[key] = payload
        return None if self._asked else self._answer()

    def _answer(self) -> Reply:
        which = [0] * self._size
        for number, ranks in enumerate(self._groups.values()):
            for rank in ranks:
                which[rank] = number
        contents = [self._given.get(key, key[1]) for key in self._groups]
        return Reply(frame(ALL, 0, encode_answer(contents, which)), None)

"""Rank and hub prove to each other that they belong to the job; the job's token itself never travels.

    1. hub to rank   HAIL, a nonce of the hub's
    2. rank to hub   its number, the size of its job, a nonce of its own, and a proof: a digest of all of these and both
                     nonces, keyed with the token
    3. hub to rank   which rank runs the hub, and a proof with the nonces in reverse order; or why it may not come in

A rank tries addresses at which strangers may listen: they learn nothing that lets them in elsewhere. A nonce is new for
each connection, so that a recorded greeting is useless. What follows a greeting is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Optional

_HAIL = struct.Struct("<4s16s")  # magic, nonce
_ASK = struct.Struct("<4sII16s32s")  # magic, rank, size, nonce, proof
_ANSWER = struct.Struct("<4sI32s")  # magic, keeper or refusal, proof
_GREETS, _ASKS, _WELCOMES, _REFUSES = b"mch1", b"mcr1", b"mcw1", b"mcn1"
_REFUSALS = (
    "it is of a job of another size",
    "its number is none of the job's",
    "another process with its number is there already",
)
_OTHER_SIZE, _NO_SUCH_RANK, _THERE_ALREADY = range(len(_REFUSALS))


class Unwelcome(ConnectionError):
    """The other end does not belong to this job, or does not let this rank in."""


def new_token() -> str:
    """128 bits from the operating system, as 32 hexadecimal digits."""
    return secrets.token_hex(16)


def _proof(token: str, magic: bytes, *told: object) -> bytes:
    """A digest of `told`, which only those who have the token can make."""
    return hmac.new(token.encode(), repr((magic, told)).encode(), hashlib.sha256).digest()


class Door:
    """The hub's side of one connection.

    Args:
        token: of the job.
        keeper: the rank whose process runs the hub.
        size: ranks of the job.

    Attributes:
        hail: to be sent as soon as the connection stands.
    """

    def __init__(self, token: str, keeper: int, size: int) -> None:
        self._token = token
        self._keeper = keeper
        self._size = size
        self._nonce = secrets.token_bytes(16)
        self._asked = b""
        self.hail = _HAIL.pack(_GREETS, self._nonce)

    def ask(self, received: bytearray) -> Optional[int]:
        """The rank that asks to come in; None while more must be read. Parsed bytes are removed from `received`.

        Raises:
            Unwelcome: a stranger, to whom nothing is sent.
        """
        if received[:4] != _ASKS[: len(received)]:
            raise Unwelcome("it does not speak as a rank does")
        if len(received) < _ASK.size:
            return None
        _, rank, size, nonce, proof = _ASK.unpack_from(received)
        if not hmac.compare_digest(proof, _proof(self._token, _ASKS, rank, size, self._nonce, nonce)):
            raise Unwelcome("it does not have the job's token")
        del received[: _ASK.size]
        self._asked = nonce
        self._claimed = (int(rank), int(size))
        return int(rank)

    def answer(self, present: bool) -> tuple[bytes, bool]:
        """The reply to the rank that asked, and whether it may come in.

        Args:
            present: whether a rank of this number is there already.
        """
        rank, size = self._claimed
        refusal = (
            _OTHER_SIZE
            if size != self._size
            else _NO_SUCH_RANK
            if rank >= self._size
            else _THERE_ALREADY
            if present
            else None
        )
        magic, value = (_WELCOMES, self._keeper) if refusal is None else (_REFUSES, refusal)
        proof = _proof(self._token, magic, value, rank, size, self._asked, self._nonce)
        return _ANSWER.pack(magic, value, proof), refusal is None


class Guest:
    """A rank's side of one connection.

    Attributes:
        keeper: the rank whose process runs the hub, once this one is let in.
    """

    def __init__(self, token: str, rank: int, size: int) -> None:
        self._token = token
        self._rank = rank
        self._size = size
        self._nonce = secrets.token_bytes(16)
        self._theirs: Optional[bytes] = None
        self.keeper: Optional[int] = None

    def hear(self, received: bytearray) -> bytes:
        """The answer to send, which may be empty; parsed bytes are removed from `received`.

        Raises:
            Unwelcome: the other end is not the job's hub, or does not let this rank in.
        """
        if self._theirs is None:
            return self._hailed(received)
        if self.keeper is None and len(received) >= _ANSWER.size:
            self._answered(received)
        return b""

    def _hailed(self, received: bytearray) -> bytes:
        if received[:4] != _GREETS[: len(received)]:
            raise Unwelcome("another program listens there, or another version of this one")
        if len(received) < _HAIL.size:
            return b""
        _, theirs = _HAIL.unpack_from(received)
        del received[: _HAIL.size]
        self._theirs = theirs
        proof = _proof(self._token, _ASKS, self._rank, self._size, theirs, self._nonce)
        return _ASK.pack(_ASKS, self._rank, self._size, self._nonce, proof)

    def _answered(self, received: bytearray) -> None:
        magic, value, proof = _ANSWER.unpack_from(received)
        expected = _proof(self._token, magic, value, self._rank, self._size, self._nonce, self._theirs)
        if not hmac.compare_digest(proof, expected):
            raise Unwelcome("who listens there does not have the job's token")
        del received[: _ANSWER.size]
        if magic != _WELCOMES:
            why = _REFUSALS[value] if value < len(_REFUSALS) else f"reason {value}"
            raise Unwelcome(f"rank {self._rank} is not let in: {why}")
        self.keeper = int(value)

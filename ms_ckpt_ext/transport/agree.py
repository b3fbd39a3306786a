"""One answer on all ranks, built on `share` alone, so it is the same over every transport.

Functions that take a transport are collective: all ranks call them at the same point, and return or raise alike.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, Callable, Optional, TypeVar, Union

from ms_ckpt_ext.errors import DisagreementError, PeerError, TransportError, name_ranks, named
from ms_ckpt_ext.transport.base import SAME_VERSION, Ranks, Transport, inflated

_T = TypeVar("_T")
_MAX_MESSAGE = 4000
"""Bytes of an error that travel to the other ranks: enough for the cause, little enough for thousands of ranks."""
_FAILED = b"!"
_MOST_BYTES = 1 << 31
"""Limit of what a rank sends, before compression: tables of a million files are smaller."""


def agree(transport: Transport[Any], facts: Mapping[str, Union[bytes, str]]) -> None:
    """Make sure that all ranks were started with the same `facts` (name -> value).

    One digest of all facts is sent; digests of each fact only where it differs, once for all ranks with the same ones.

    Raises:
        DisagreementError: on every rank, when any fact differs anywhere; names the facts, and the ranks that differ
            from the majority (from the lowest ranks where there is none).
    """
    mine = json.dumps({name: _digest(value) for name, value in facts.items()}, sort_keys=True).encode()
    digests = transport.share(_digest(mine).encode())
    if len(set(digests)) == 1:
        return
    answers = [json.loads(answer) for answer in transport.share(mine)]
    names = sorted(set().union(*answers))
    complaints = [text for text in (_odd_ones(name, [a.get(name) for a in answers]) for name in names) if text]
    if complaints:
        raise DisagreementError(
            f"the ranks were started with different inputs: {'; '.join(complaints)}. "
            "Give every rank the same arguments, files and versions"
        )


def _digest(value: Union[bytes, str]) -> str:
    return hashlib.blake2b(value.encode() if isinstance(value, str) else value, digest_size=16).hexdigest()


def _odd_ones(name: str, digests: list[Optional[str]]) -> str:
    """Which ranks differ in one fact, as text; empty when none does."""
    common = Counter(digests).most_common(1)[0][0]  # the first seen wins a tie: that of the lowest rank
    odd = [rank for rank, digest in enumerate(digests) if digest != common]
    if not odd:
        return ""
    rest = [rank for rank, digest in enumerate(digests) if digest == common]
    return f"{name!r} on {name_ranks(odd)} is not what it is on {name_ranks(rest)}"


def share_status(transport: Transport[Any], error: Optional[BaseException] = None) -> None:
    """Exchange statuses with all ranks: the end of every step that may fail on one rank.

    Raises:
        the rank's own `error`, when it has one;
        PeerError: when another rank has; its `rank` is the lowest that failed, its message carries that rank's.
    """
    start_status(transport, error)()


def start_status(transport: Transport[Any], error: Optional[BaseException] = None) -> Callable[[], None]:
    """`share_status` in two steps: this rank sends its status and may go on; the function returned waits, and raises.

    Nothing else may be shared in between. An error of the operating system is sent and raised as one of the package's.
    """
    error = error and named(error, f"do the part of rank {transport.rank}")
    return partial(_settle, transport, error, transport.start_share(b"" if error is None else _FAILED))


def _settle(transport: Transport[Any], error: Optional[BaseException], answers: Callable[[], list[bytes]]) -> None:
    failed = [rank for rank, answer in enumerate(answers()) if answer]
    if not failed:
        return
    mine = _message(error) if error is not None and transport.rank == failed[0] else b""
    told = transport.share(mine)[failed[0]]  # of all messages one is enough
    if error is not None:
        raise error
    others = f" ({name_ranks(failed[1:])} failed too)" if failed[1:] else ""
    raise PeerError(f"rank {failed[0]} failed with {told.decode()}{others}", failed[0])


def _message(error: BaseException) -> bytes:
    """An error as UTF-8 of at most `_MAX_MESSAGE` bytes."""
    cut = f"{type(error).__name__}: {error}".encode(errors="replace")[:_MAX_MESSAGE]
    return cut.decode(errors="ignore").encode()


def on_all(transport: Transport[Any], step: Callable[[], _T]) -> _T:
    """Run a step on this rank; if it fails on any rank, with whatever error, all raise: see `share_status`."""
    result: list[_T] = []
    error: Optional[BaseException] = None
    try:
        result.append(step())
    except Exception as problem:  # noqa: BLE001 - shared with all ranks before it is raised
        error = problem
    share_status(transport, error)
    return result[0]


def common_groups(transport: Transport[Any]) -> frozenset[Ranks]:
    """The groups of some ranks that exist already in the transports of all of their members. Collective.

    A group's members are sent once, by the lowest of them; the others send a digest.
    """
    mine = {_digest(repr(group)): group for group in transport.traits.known_groups}
    told = transport.share(pack([sorted(mine), sorted(group for group in mine.values() if group[0] == transport.rank)]))
    answers = [unpack(answer) for answer in told]
    has = [frozenset(digests) for digests, _ in answers]
    listed = (tuple(group) for _, groups in answers for group in groups)
    return frozenset(group for group in listed if all(_digest(repr(group)) in has[rank] for rank in group))


def told_by_all(transport: Transport[Any], step: Callable[[], Any]) -> list[Any]:
    """`on_all`, and what every rank's step returned, in rank order, after a trip through JSON."""
    return [unpack(answer) for answer in transport.share(pack(on_all(transport, step)))]


def share_alike(transport: Transport[Any], content: bytes, decode: Callable[[bytes], _T]) -> list[_T]:
    """Every rank's content, decoded, in rank order. Equal contents are sent once, by the lowest rank that has them,
    decoded once, and are one value. Collective."""
    digests = transport.share(hashlib.blake2b(content, digest_size=16).digest())
    first = digests.index(digests[transport.rank]) == transport.rank
    answers = transport.share(zlib.compress(content, 1) if first else b"")
    decoded = {digest: decode(_inflated(answer)) for digest, answer in zip(digests, answers) if answer}
    return [decoded[digest] for digest in digests]


def pack(value: Any) -> bytes:
    """JSON, small enough to share."""
    return zlib.compress(json.dumps(value).encode(), 1)


def unpack(data: bytes) -> Any:
    """What `pack` was given, with lists for tuples. Raises TransportError for bytes that no rank packs."""
    try:
        return json.loads(_inflated(data))
    except (ValueError, RecursionError) as error:
        raise TransportError(f"a rank told what is not understood ({error}); {SAME_VERSION}") from error


def _inflated(data: bytes) -> bytes:
    try:
        return inflated(data, _MOST_BYTES)
    except ValueError as error:
        raise TransportError(f"a rank told what is not understood ({error}); {SAME_VERSION}") from error

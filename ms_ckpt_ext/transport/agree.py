"""One answer on all ranks, built on `share` alone, so it is the same over every transport.

Functions that take a transport are collective: all ranks call them at the same point, and return or raise alike.
Values that are shared have a form (`JsonForm`); what has another, or is longer than any rank tells, is an error that
names the rank.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

from ms_ckpt_ext.errors import DisagreementError, PeerError, TransportError, name_ranks, named
from ms_ckpt_ext.transport.base import SAME_VERSION, Ranks, Transport, inflated

_T = TypeVar("_T")
_MAX_MESSAGE = 4000
"""Bytes of an error that travel to the other ranks: enough for the cause, little enough for thousands of ranks."""
_FAILED = b"!"
_MOST_BYTES = 1 << 31
"""Limit of what a rank sends, before compression: tables of a million files are smaller."""
MOST_SHARED = _MOST_BYTES + (1 << 20)
"""And after it, as what does not compress grows a little."""
_MOST_DIGITS = 20

NATURAL = range(1 << 64)
"""The form of a count, a size or a number; some file systems number their files up to here."""
WHOLE = range(-(1 << 63), 1 << 63)
"""The form of any whole number of 64 bits."""
LAYOUT = ([NATURAL], [[NATURAL]], WHOLE, WHOLE)
"""The form of a layout: see `core.geometry.layout.layout_from_json`."""


class Maybe(NamedTuple):
    """The form of what may be absent: None, or a value of another form."""

    form: Any


JsonForm = Any
"""What a JSON value must be: a type, `object` for any; a set of types; a range, for a whole number in it; `[form]`, for
a list of any length; a tuple of forms, for a list with these entries; `{str: form}`, for an object with any keys; an
object of forms, for one with these keys; or `Maybe(form)`."""


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
    answers: list[dict[str, str]] = decode_all(transport.share(mine), partial(parsed, form={str: str}))
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
    raise PeerError(f"rank {failed[0]} failed with {told[:_MAX_MESSAGE].decode(errors='replace')}{others}", failed[0])


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
    mine_first = sorted(group for group in mine.values() if group[0] == transport.rank)
    answers: list[Any] = share_values(transport, [sorted(mine), mine_first], ([str], [[range(transport.size)]]))
    has = [frozenset(digests) for digests, _ in answers]
    listed = (tuple(group) for _, groups in answers for group in groups)
    return frozenset(group for group in listed if group and all(_digest(repr(group)) in has[rank] for rank in group))


def told_by_all(
    transport: Transport[Any], step: Callable[[], Any], form: JsonForm, make: Optional[Callable[[Any], _T]] = None
) -> list[_T]:
    """`on_all`, and what every rank's step returned, in rank order, as `share_values` gives it."""
    return share_values(transport, on_all(transport, step), form, make)


def share_values(
    transport: Transport[Any], value: Any, form: JsonForm, make: Optional[Callable[[Any], _T]] = None
) -> list[_T]:
    """Every rank's value, in rank order, after a trip through JSON, which gives lists for tuples. Collective.

    Args:
        make: makes of it what is returned.

    Raises TransportError: a rank told what does not have the form, or what `make` refuses; names the rank.
    """
    return unpack_all(transport.share(pack(value)), form, make)


def numbered(answers: Iterable[Iterable[tuple[int, _T]]], count: int) -> list[_T]:
    """What ranks told of `count` things, by number. Raises TransportError where one of them is missing."""
    found = dict(chain.from_iterable(answers))
    if found.keys() != set(range(count)):
        raise TransportError(f"ranks told of {len(found)} things where {count} were asked for; {SAME_VERSION}")
    return [found[number] for number in range(count)]


def share_texts(transport: Transport[Any], text: str) -> list[str]:
    """Every rank's text, in rank order. Collective. Raises TransportError: a rank told what is no text."""
    return decode_all(transport.share(text.encode(errors="replace")), bytes.decode)


def share_numbers(transport: Transport[Any], number: int) -> list[int]:
    """Every rank's number, 0 or more, in rank order. Collective. Raises TransportError: a rank told what is none."""
    return decode_all(transport.share(str(number).encode()), number_told)


def number_told(text: bytes) -> int:
    """A number of at most 20 digits. Raises ValueError for anything else."""
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:_MOST_DIGITS]!r} is no number")
    return int(text)


def share_alike(transport: Transport[Any], content: bytes, decode: Callable[[bytes], _T]) -> list[_T]:
    """Every rank's content, decoded, in rank order. Equal contents are sent once, by the lowest rank that has them,
    decoded once, and are one value. Collective. Raises TransportError: a rank told what `decode` refuses; names it."""
    digests = transport.share(hashlib.blake2b(content, digest_size=16).digest())
    first = digests.index(digests[transport.rank]) == transport.rank
    answers = transport.share(zlib.compress(content, 1) if first else b"")
    decoded: dict[bytes, _T] = {}
    for rank, (digest, answer) in enumerate(zip(digests, answers)):
        with understanding(rank):
            if bool(answer) is (digest in decoded):
                raise ValueError("something, or nothing, where the lowest rank of those that have the same tells it")
            if answer:
                decoded[digest] = decode(inflated(answer, _MOST_BYTES))
    return [decoded[digest] for digest in digests]


def pack(value: Any) -> bytes:
    """JSON, small enough to share."""
    return zlib.compress(json.dumps(value).encode(), 1)


def unpack_all(answers: Iterable[bytes], form: JsonForm, make: Optional[Callable[[Any], _T]] = None) -> list[_T]:
    """What ranks gave to `pack`, in rank order. Raises as `share_values`."""

    def decode(answer: bytes) -> Any:
        told = parsed(inflated(answer, _MOST_BYTES), form)
        return told if make is None else make(told)

    return decode_all(answers, decode)


def decode_all(answers: Iterable[bytes], decode: Callable[[bytes], _T]) -> list[_T]:
    """What ranks told, in rank order. Raises TransportError, which names the rank, for what `decode` refuses."""
    found = []
    for rank, answer in enumerate(answers):
        with understanding(rank):
            found.append(decode(answer))
    return found


def told_of(answer: Mapping[int, _T], number: int, rank: int) -> _T:
    """What `rank` told of thing `number`. Raises TransportError where it told nothing of it."""
    if number not in answer:
        raise TransportError(f"rank {rank} told nothing of number {number}, which it was asked for; {SAME_VERSION}")
    return answer[number]


@contextmanager
def understanding(rank: Optional[int] = None) -> Iterator[None]:
    """Inside, values are made of what a rank told. Raises TransportError, which names it, where it does not fit."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
        raise TransportError(
            f"{'a rank' if rank is None else f'rank {rank}'} told what is not understood ({type(error).__name__}: "
            f"{error!s:.200}); {SAME_VERSION}"
        ) from error


def parsed(content: bytes, form: JsonForm) -> Any:
    """JSON of a form. Raises ValueError, or RecursionError, for anything else."""
    found = json.loads(content)
    _require([found], form)
    return found


def _require(values: Sequence[Any], form: JsonForm) -> None:
    """Raise ValueError unless all values have a form. All are looked at together, as there may be millions."""
    if isinstance(form, Maybe):
        _require([value for value in values if value is not None], form.form)
    elif isinstance(form, range):
        _of_type(values, int)
        if values and not (min(values) in form and max(values) in form):
            raise ValueError(f"a number that is not from {form.start} to {form.stop - 1}")
    elif isinstance(form, list):
        _of_type(values, list)
        _require(list(chain.from_iterable(values)), form[0])
    elif isinstance(form, tuple):
        _of_type(values, list)
        if set(map(len, values)) - {len(form)}:
            raise ValueError(f"a list that has not {len(form)} entries")
        for column, each in enumerate(form):
            _require([value[column] for value in values], each)
    elif isinstance(form, dict):
        _require_objects(values, form)
    elif form is not object:
        _of_type(values, *(form if isinstance(form, (set, frozenset)) else (form,)))


def _require_objects(values: Sequence[Any], form: Mapping[Any, JsonForm]) -> None:
    _of_type(values, dict)
    if str in form:
        _require(list(chain.from_iterable(value.values() for value in values)), form[str])
        return
    if any(value.keys() != form.keys() for value in values):
        raise ValueError(f"an object whose keys are not {', '.join(form)}")
    for key, each in form.items():
        _require([value[key] for value in values], each)


def _of_type(values: Sequence[Any], *kinds: type) -> None:
    odd = set(map(type, values)).difference(kinds, (int,) if float in kinds else ())
    if odd:
        raise ValueError(f"{min(each.__name__ for each in odd)} in place of {' or '.join(k.__name__ for k in kinds)}")

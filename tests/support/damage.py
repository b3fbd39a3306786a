"""Damaging files, and the guard for readers of them: no hang, no allocation that the file does not justify."""

from __future__ import annotations

import copy
import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

BUDGET = 6 << 20
"""Bytes that reading a small damaged file may take: a thread's decryption buffer is 4 MiB, the rest is objects."""
SECONDS = 20.0
"""Of the processor. Nothing here takes a tenth of one; a reader that has not come back after this is hanging."""

edit = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 5000), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("cut"), st.integers(0, 5000), st.integers(1, 80)),
    st.tuples(st.just("add"), st.integers(0, 5000), st.binary(min_size=1, max_size=24)),
    st.tuples(st.just("end"), st.integers(0, 5000), st.just(0)),
    st.tuples(st.just("dup"), st.integers(0, 5000), st.integers(1, 120)),
)
edits = st.lists(edit, min_size=1, max_size=3)


def mutate(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """`data` with stretches overwritten, cut out, inserted, doubled, or the end missing."""
    for kind, at, what in changes:
        at %= len(data) + 1
        if kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "cut":
            data = data[:at] + data[at + what :]
        elif kind == "add":
            data = data[:at] + what + data[at:]
        elif kind == "end":
            data = data[:at]
        else:
            data = data[:at] + data[at : at + what] + data[at:]
    return data


def random_edits(data: bytes, chance: random.Random) -> bytes:
    """`data` with one such change, by `chance`."""
    kind = chance.choice(["set", "cut", "add", "end", "dup"])
    what = chance.randint(1, 120) if kind in ("cut", "dup") else chance.randbytes(chance.randint(1, 8))
    return mutate(data, [(kind, chance.randrange(len(data) + 1), what)])


_NUMBERS = st.sampled_from([0, -1, 1, 2, 7, 1 << 31, 1 << 63, 10**30, 1.5, -0.0, 1e308, float("inf"), float("nan")])
_LEAVES = st.none() | st.booleans() | _NUMBERS | st.sampled_from(["", "..", "/", "a/b", "\ud800", "\0", "7", "x" * 300])
_JUNK = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document in which values, one to three, anywhere, are replaced, taken away, doubled or moved."""
    told = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        place: Any = told
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or not draw(st.integers(0, 4)):
                break
            place = inner
        kind = draw(st.sampled_from(["junk", "junk", "gone", "twice", "else"]))
        if kind == "junk" or place is told:
            place[key] = draw(_JUNK)
        elif kind == "gone":
            del place[key]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=3)) if kind == "twice" else key] = copy.deepcopy(
                draw(st.sampled_from([*place.values()]))
            )
        else:
            place.insert(key, copy.deepcopy(draw(st.sampled_from(place))))
        if not isinstance(told[""], (dict, list)) or not told[""]:
            break
    return told[""]


HOPELESS = (b"", b"null", b"[]", b"{}", b"7", b'"x"', b"\xff\xfe{}", b"\x00", b"[" * 200_000, b'{"":' * 100_000, b"NaN")
"""Documents that hold nothing of use, texts that are none, and nesting that exhausts a parser."""

LIES = tuple(bytes.fromhex(text) for text in ("ffffffffffffffff7f", "ffffff7f", "ffffffff0f", "0000008000000000"))
"""Huge numbers as varints and as little-endian words."""


def lies(data: bytes) -> Iterator[bytes]:
    """`data` with a huge number written over, and put before, every byte."""
    for at in range(len(data)):
        for lie in LIES:
            yield data[:at] + lie + data[at + len(lie) :]
            yield data[:at] + lie + data[at + 1 :]


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Turn a hang into a failure.

    What computes has `seconds` of the processor, however busy the machine is; what waits has fifteen times as long. A
    processor that is emulated (scripts/aarch64.sh) takes that much longer, too.
    """
    if os.environ.get("MS_CKPT_EXT_EMULATED"):
        seconds *= 15

    def stop(*_: object) -> None:
        raise TimeoutError(f"nothing after {seconds:g} s of the processor, or {15 * seconds:g} s in all: it hangs")

    with _timer(signal.SIGPROF, signal.ITIMER_PROF, seconds, stop):
        with _timer(signal.SIGALRM, signal.ITIMER_REAL, 15 * seconds, stop):
            yield


@contextmanager
def _timer(number: int, timer: int, seconds: float, stop: Callable[..., None]) -> Iterator[None]:
    """Call `stop` after a time. A timer that ran before goes on afterwards."""
    handler = signal.signal(number, stop)
    left, interval = signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, left, interval)
        signal.signal(number, handler)


@contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Fail when Python and numpy hold more than `nbytes` beyond what they held before."""
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        if started:
            tracemalloc.stop()
    assert grown <= nbytes, f"{grown} bytes were allocated where {nbytes} are allowed"


def survives(read: Callable[[bytes], Any], data: bytes, errors: type[Exception]) -> Any:
    """What `read` makes of `data`, or None where it refuses with one of our errors; anything else fails the test."""
    with time_limit(), memory_limit(4 * len(data) + BUDGET):
        try:
            return read(data)
        except errors as error:
            assert len(str(error)) > 20, "an error that says nothing"
            assert len(str(error)) < 4096 + 2 * len(data), "an error that goes on and on"
            return None

"""A sink that digests every tensor while its bytes pass through.

A digest takes a tensor's bytes in order; workers bring them in any order. A piece whose turn it is goes into the digest
from the worker's buffer; one that comes too early is noted, and read back (from the page cache, decrypted where the
file is encrypted) when its turn has come, by the worker that closed the gap. So every byte is digested when the last
write returns, and no worker waits for another. The framing, all bytes that belong to no tensor, is one more stream: of
many short pieces, which are kept when they come too early. The memory that a file needs for all this is taken with its
first byte and released with its digests: a job may have thousands of files open.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Callable, NamedTuple, Optional, Protocol

import xxhash

from ms_ckpt_ext.core.planning.io_units import Extent, ranges
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.sink import FileLike

_BUFFER = 1 << 20  # stays in a core's cache between read and digest
KEPT = 4 << 10
"""Longest piece of framing, in bytes, that is kept rather than read back."""

Streams = Mapping[Optional[str], Iterable[Extent]]
"""What is digested: a tensor's name, or None for the framing -> where its bytes lie, one extent after another."""


def streams_of(tensors: Mapping[str, Sequence[Extent]], size: int) -> Streams:
    """The streams of a file of `size` bytes with these tensors: each of them, and all that lies between them."""
    between, at = [], 0
    for offset, length in (*sorted(extent for extents in tensors.values() for extent in extents), (size, 0)):
        if offset > at:
            between.append(Extent(at, offset - at))
        at = max(at, offset + length)
    streams: dict[Optional[str], Iterable[Extent]] = {None: between}
    streams.update(tensors)
    return streams


class DigestingSink:
    """Another sink's file, with a digest of each tensor in it.

    Args:
        sink: takes the bytes.
        streams: called when the first bytes come; returns what is digested.
        literals: framing that the sink has by itself.
    """

    def __init__(
        self, sink: FileLike, streams: Callable[[], Streams], literals: Sequence[tuple[int, bytes]] = ()
    ) -> None:
        self._sink, self.path, self.fd, self.unit = sink, sink.path, sink.fd, sink.unit
        self._told, self._literals, self._lock = streams, literals, threading.Lock()
        self._streams: Optional[dict[Optional[str], DigestStream]] = None
        self._parts: list[_Part] = []
        self._starts: list[int] = []

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write and digest."""
        self._sink.write(offset, buffer)
        self.landed(offset, buffer)

    def landed(self, offset: int, buffer: memoryview) -> None:
        """Digest bytes that reached `offset` other than by `write`."""
        self._begin()
        at, stop = max(0, bisect_right(self._starts, offset) - 1), offset + len(buffer)
        while at < len(self._parts) and self._parts[at].start < stop:
            part = self._parts[at]
            low, high = max(part.start, offset), min(part.stop, stop)
            if low < high:
                part.stream.take(part.position + low - part.start, buffer[low - offset : high - offset])
            at += 1

    def digests(self) -> dict[Optional[str], str]:
        """Name (None: framing) -> 32 hexadecimal digits of the xxh3-128 of its bytes.

        To be called once, after the last write has returned.
        """
        self._begin()
        streams, self._streams, self._parts, self._starts = self._streams, {}, [], []
        return {name: stream.digest() for name, stream in (streams or {}).items()}

    def _begin(self) -> None:
        if self._streams is not None:
            return
        with self._lock:
            if self._streams is not None:
                return
            streams = {
                name: DigestStream(tuple(extents), self._sink, self._lock, KEPT if name is None else 0)
                for name, extents in self._told().items()
            }
            self._parts = sorted([part for stream in streams.values() for part in stream.parts()], key=_start)
            self._starts = [*map(_start, self._parts)]
            self._streams = streams
        for offset, literal in self._literals:
            self.landed(offset, memoryview(literal))

    def finish(self) -> None:
        """Make the bytes durable, and close."""
        self._sink.finish()

    def close(self) -> None:
        """Close without making anything durable."""
        self._sink.close()


class _Part(NamedTuple):
    """A stretch of the file that belongs to one tensor; `position` counts within the tensor."""

    start: int
    stop: int
    position: int
    stream: DigestStream


_start = attrgetter("start")


class Readable(Protocol):
    """Where bytes that came too early are read again; `unit` as in `storage.sink.Sink`."""

    @property
    def unit(self) -> int: ...

    def read_back(self, offset: int, buffer: memoryview) -> None: ...


class DigestStream:
    """A digest in progress of the bytes in `extents`; early pieces of at most `kept` bytes are kept, not read back."""

    __slots__ = ("_busy", "_early", "_extents", "_found", "_kept", "_lock", "_next", "_sink", "_state", "_total")

    def __init__(self, extents: tuple[Extent, ...], sink: Readable, lock: threading.Lock, kept: int) -> None:
        self._extents, self._sink, self._lock, self._kept = extents, sink, lock, kept
        self._total, self._next = sum([extent.length for extent in extents]), 0
        self._state: Any = None  # only while bytes are still to come
        # Pieces whose turn has not come: position -> length and, of one that is kept, the bytes.
        self._early: Optional[dict[int, tuple[int, Optional[bytes]]]] = None
        self._busy = False
        self._found: Optional[str] = None

    def parts(self) -> Iterator[_Part]:
        """Where its bytes lie."""
        position = 0
        for offset, length in self._extents:
            if length:
                yield _Part(offset, offset + length, position, self)
            position += length

    def take(self, position: int, buffer: memoryview) -> None:
        """Digest a piece, and those that waited for it; or note it for whoever fills the gap before it."""
        if len(buffer) == self._total:  # it is the only piece
            self._next, self._found = self._total, xxhash.xxh3_128_hexdigest(buffer)
            return
        with self._lock:
            if self._busy or position != self._next:
                self._early = self._early or {}
                self._early[position] = (len(buffer), bytes(buffer) if len(buffer) <= self._kept else None)
                return
            self._busy = True
        self._state = self._state or xxhash.xxh3_128()
        self._state.update(buffer)
        length = len(buffer)
        while length:
            with self._lock:
                self._next += length
                length, kept = self._early.pop(self._next, (0, None)) if self._early else (0, None)
                self._busy = length > 0
                if self._next == self._total:
                    self._found, self._state = self._state.hexdigest(), None
            if kept is not None:
                self._state.update(kept)
            elif length:
                self._catch_up(length)

    def _catch_up(self, length: int) -> None:
        """Digest bytes that were written before; of an encrypted file, in whole units."""
        step = max(_BUFFER, self._sink.unit)
        scratch = linux.scratch(min(step, length))
        for offset, count in ranges(self._extents, self._next, length):
            stop = offset + count
            while offset < stop:
                part = scratch[: min(step - offset % step, stop - offset)]
                self._sink.read_back(offset, part)
                self._state.update(part)
                offset += len(part)

    @property
    def complete(self) -> bool:
        """Whether all bytes were digested."""
        return self._next == self._total

    def digest(self) -> str:
        """32 hexadecimal digits; only when it is complete."""
        assert self.complete
        return self._found or xxhash.xxh3_128_hexdigest(b"")

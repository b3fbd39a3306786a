"""A sink that digests every tensor while its bytes pass through.

A digest takes a tensor's bytes in order, workers bring them in any. A piece whose turn it is goes into the digest from
the worker's buffer; one that comes too early is noted, and read back (from the page cache) when its turn has come, by
whoever closed the gap. So every byte is digested when the last write returns, and no worker waits for another.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.reads import Extent, ranges
from ms_ckpt_ext.storage import memory
from ms_ckpt_ext.storage.sink import FileSink

_BUFFER = 1 << 20  # stays in a core's cache between read and digest


class DigestingSink:
    """Another sink's file, with a digest of each tensor in it.

    Args:
        sink: takes the bytes.
        tensors: name -> where the tensor's bytes lie in the file, one extent after another.
    """

    def __init__(self, sink: FileSink, tensors: Mapping[str, Sequence[Extent]]) -> None:
        self._sink, self.path, self.fd = sink, sink.path, sink.fd
        self._streams = {name: _Stream(tuple(extents), sink.read_back) for name, extents in tensors.items()}
        self._parts = sorted((part for stream in self._streams.values() for part in stream.parts()), key=_start)
        self._starts = [part.start for part in self._parts]

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write and digest."""
        self._sink.write(offset, buffer)
        self.landed(offset, buffer)

    def landed(self, offset: int, buffer: memoryview) -> None:
        """Digest bytes that reached `offset` in another way."""
        at, stop = max(0, bisect_right(self._starts, offset) - 1), offset + len(buffer)
        while at < len(self._parts) and self._parts[at].start < stop:
            part = self._parts[at]
            low, high = max(part.start, offset), min(part.stop, stop)
            if low < high:
                part.stream.take(part.position + low - part.start, buffer[low - offset : high - offset])
            at += 1

    def digests(self) -> dict[str, str]:
        """Name -> 32 hexadecimal digits of the xxh3-128 of its bytes; after the last write returned."""
        return {name: stream.digest() for name, stream in self._streams.items()}

    def finish(self) -> None:
        """Make the bytes durable, and close."""
        self._sink.finish()

    def close(self) -> None:
        """Close without a promise."""
        self._sink.close()


class _Part(NamedTuple):
    """A stretch of the file that belongs to one tensor; `position` counts within the tensor."""

    start: int
    stop: int
    position: int
    stream: _Stream


def _start(part: _Part) -> int:
    return part.start


class _Stream:
    """The digest of one tensor under way."""

    def __init__(self, extents: tuple[Extent, ...], read_back: Callable[[int, memoryview], None]) -> None:
        self._extents, self._read_back = extents, read_back
        self._state = xxhash.xxh3_128()
        self._next = 0
        self._early: dict[int, int] = {}  # position -> length of pieces whose turn has not come
        self._busy = False
        self._lock = threading.Lock()

    def parts(self) -> Iterator[_Part]:
        position = 0
        for offset, length in self._extents:
            yield _Part(offset, offset + length, position, self)
            position += length

    def take(self, position: int, buffer: memoryview) -> None:
        """Digest a piece, and those that waited for it; or note it for whoever fills the gap before it."""
        with self._lock:
            if self._busy or position != self._next:
                self._early[position] = len(buffer)
                return
            self._busy = True
        self._state.update(buffer)
        length: Optional[int] = len(buffer)
        while length is not None:
            with self._lock:
                self._next += length
                length = self._early.pop(self._next, None)
                self._busy = length is not None
            if length is not None:
                self._catch_up(length)

    def _catch_up(self, length: int) -> None:
        scratch = memory.scratch(min(_BUFFER, length))
        for offset, count in ranges(self._extents, self._next, length):
            for at in range(0, count, _BUFFER):
                part = scratch[: min(_BUFFER, count - at)]
                self._read_back(offset + at, part)
                self._state.update(part)

    def digest(self) -> str:
        return self._state.hexdigest()

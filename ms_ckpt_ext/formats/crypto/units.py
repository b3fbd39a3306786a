"""A reader over units that can only be decrypted whole.

Authenticated encryption gives nothing until a whole unit (a MindSpore block of 64 MiB, or a chunk of 1 MiB) has been
read and its tag checked. `UnitReader` serves any range of plaintext from such units:

1. Units that a read covers fully are decrypted straight into the caller's buffer, many in one read, and not kept.
2. A unit that a read covers partly is decrypted into a slot, which serves later neighbours: reading a table of
   contents touches the same unit hundreds of times.
3. `stream` is for callers that can undo what they did: it hands a large unit over while that is decrypted, needs no
   room for it, and checks the tag at the unit's end.

Slots are few and reused, the least recently used first, so memory is bounded and rarely allocated. A slot has a lock:
two threads that want the same unit decrypt it once; different units go in parallel. `read_into` does not
return before the units' tags were checked, and a failed unit is never kept; after an error the contents of the buffer
are undefined.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Callable, NamedTuple, Optional, Protocol

from ms_ckpt_ext.errors import DecryptionError, StorageError, TruncatedFileError
from ms_ckpt_ext.formats.crypto import backend
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.reader import ByteReader, Take, Traits

PIECE = 4 << 20
"""Bytes of one read of ciphertext: long enough for network file systems, short enough for a processor's cache."""
STREAMED = 1 << 20
"""Most bytes that `stream` hands over at once: they are still in a core's cache when they are written."""

_local = threading.local()


def thread_scratch(length: int) -> memoryview:
    """`length` bytes of this thread's own reused buffer, which is at least a `PIECE`.

    Valid until the next call, which any decrypting reader may make: results must not be kept in it.
    """
    buffer: Optional[memoryview] = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = _local.buffer = linux.scratch(max(length, PIECE))
    return buffer[:length]


class Sealed(NamedTuple):
    """The ciphertext of a unit, as long as its plaintext: where it lies in the file, and what decrypts it."""

    offset: int
    length: int
    context: backend.Context
    unfit: Callable[[], DecryptionError]
    """Makes the error for a tag that does not fit."""


def unseal(base: ByteReader, sealed: Sealed, places: Iterable[memoryview]) -> Iterator[memoryview]:
    """Decrypt a unit into places, one after another; yields each when it is full.

    Raises:
        DecryptionError: the tag does not fit, after the last place; nothing in any of them may be trusted.
    """
    at = sealed.offset
    for place in places:
        source = thread_scratch(len(place))
        base.read_into(at, source)
        backend.pour(sealed.context, source, place)
        at += len(place)
        yield place
    if not backend.key_fits(sealed.context):
        raise sealed.unfit()


class Units(Protocol):
    """Plaintext cut into units, in order and without gaps."""

    size: int
    """Bytes of plaintext."""
    largest: int
    """Bytes of the largest unit."""

    def find(self, offset: int) -> int:
        """Number of the unit that holds plaintext byte `offset`, which exists."""

    def span(self, unit: int) -> tuple[int, int]:
        """Plaintext offsets of a unit, half-open."""

    def decrypt(self, first: int, stop: int, out: memoryview) -> None:
        """Decrypt and check units `first` to `stop` (exclusive) into `out`, which they fill exactly."""

    def sealed(self, unit: int) -> Sealed:
        """A unit that is to be decrypted by `unseal`."""


class _Slot:
    """Room for one decrypted unit."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.unit: Optional[int] = None
        self.data = memoryview(b"")


class _Turn:
    """A lock that goes to whoever has waited longest, so that work done in order stays in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets = self._served = 0
        self._gone: set[int] = set()

    def __enter__(self) -> None:
        with self._changed:
            ticket = self._tickets
            self._tickets += 1
            try:
                self._changed.wait_for(lambda: self._served == ticket)
            except BaseException:  # Ctrl-C: those behind must not wait for this one
                self._gone.add(ticket)
                self._next()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._served += 1
            self._next()

    def _next(self) -> None:
        while self._served in self._gone:
            self._gone.remove(self._served)
            self._served += 1
        self._changed.notify_all()


class UnitReader:
    """A ByteReader of the plaintext of `units`, which are cut from `base`.

    Args:
        base: the reader of the ciphertext; closed with this one.
        units: how the ciphertext is cut and decrypted.
        cache_bytes: most memory for units that were read in part; always at least one unit's. Where one is larger,
            long ranges are better streamed than read piece by piece.
        container: the container's name.
        piece_bytes: most bytes that `stream` hands over at once.
    """

    fd: Optional[int] = None

    def __init__(
        self, base: ByteReader, units: Units, cache_bytes: int, container: str, piece_bytes: int = STREAMED
    ) -> None:
        self.path = base.path
        self.size = units.size
        self.disk_size = base.disk_size
        self.mtime_ns = base.mtime_ns
        self._base = base
        self._units, self._piece_bytes = units, piece_bytes
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._most = max(1, cache_bytes // max(1, units.largest))
        self._large = units.largest > cache_bytes
        stream = self.stream if self._large else None
        self.traits = Traits(container, units.largest, self._most * units.largest, stream)
        self._turn = _Turn()
        self._lock = threading.Lock()
        self._closed = False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with plaintext from `offset`.

        Raises:
            DecryptionError: a unit's tag does not fit.
            TruncatedFileError: the range goes beyond the plaintext.
            StorageError: the operating system refused.
        """
        require_range(self.path, self.size, offset, len(buffer), self._closed)
        done, stop = offset, offset + len(buffer)
        while done < stop:
            unit = self._units.find(done)
            low, high = self._units.span(unit)
            if done == low and high <= stop:
                last = self._units.find(stop) if stop < self.size else self._units.find(stop - 1) + 1
                high = self._units.span(last - 1)[1]
                self._units.decrypt(unit, last, buffer[done - offset : high - offset])
            else:
                high = min(high, stop)
                self._copy(unit, done - low, buffer[done - offset : high - offset])
            done = high

    def stream(self, offset: int, length: int, take: Take) -> None:
        """Hand a range over in pieces of at most `piece_bytes`, in order.

        Pieces of a unit that the range covers fully come *before the unit's tag was checked*: this is for callers
        that can undo what they did with them, as a job can whose files appear at the end. Raises as `read_into` does.
        """
        require_range(self.path, self.size, offset, length, self._closed)
        parts = list(self._parts(offset, offset + length))
        torn = any(not whole for *_, whole in parts)
        # Threads that want parts of units go one after another, so that they do not evict each other's unit.
        with self._turn if self._large and torn else nullcontext():
            buffer = linux.scratch(min(self._piece_bytes, length))
            for unit, low, high, whole in parts:
                most = self._piece_bytes
                places = (buffer[: min(most, high - at)] for at in range(low, high, most))
                if whole:
                    pieces = unseal(self._base, self._units.sealed(unit), places)
                else:
                    pieces = self._copies(unit, low, places)
                for piece in pieces:
                    take(low, piece)
                    low += len(piece)

    def _parts(self, offset: int, stop: int) -> Iterator[tuple[int, int, int, bool]]:
        """(unit, first byte, last byte + 1, whether that is all of the unit), for each unit that a range touches."""
        while offset < stop:
            unit = self._units.find(offset)
            low, high = self._units.span(unit)
            yield unit, offset, min(stop, high), offset == low and high <= stop
            offset = high

    def _copies(self, unit: int, offset: int, places: Iterable[memoryview]) -> Iterator[memoryview]:
        """Copy a part of a unit, from plaintext byte `offset` on, into one place after another."""
        offset -= self._units.span(unit)[0]
        for place in places:
            self._copy(unit, offset, place)
            offset += len(place)
            yield place

    def _copy(self, unit: int, skip: int, out: memoryview) -> None:
        """Copy a part of one unit, decrypting it if no slot has it."""
        slot = self._slot(unit)
        with slot.lock:
            low, high = self._units.span(unit)
            if slot.unit != unit:
                slot.unit = None
                if len(slot.data) < high - low:
                    slot.data = linux.scratch(high - low)
                self._units.decrypt(unit, unit + 1, slot.data[: high - low])
                slot.unit = unit
            out[:] = slot.data[skip : skip + len(out)]

    def _slot(self, unit: int) -> _Slot:
        """The slot for a unit: its own, a new one, or the least recently used.

        Another thread may take the slot before its lock is held; then `slot.unit` shows that, and it is filled again.
        """
        with self._lock:
            slot = self._slots.pop(unit, None)
            if slot is None:
                slot = _Slot() if len(self._slots) < self._most else self._slots.popitem(last=False)[1]
            self._slots[unit] = slot
            return slot

    def close(self) -> None:
        """Release the file and forget the plaintext."""
        self._closed = True
        with self._lock:
            self._slots.clear()
        self._base.close()

    def __enter__(self) -> UnitReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_range(path: str, size: int, offset: int, length: int, closed: bool) -> None:
    """Raise unless the reader is open and has these bytes."""
    if closed:
        raise StorageError(0, f"cannot read {path!r}: the reader is closed")
    if offset < 0 or offset + length > size:
        raise TruncatedFileError(
            f"{path!r} has {size} bytes of plaintext, but {length} bytes were expected at byte {offset}; "
            "the file was truncated or replaced: restore it or choose another checkpoint"
        )

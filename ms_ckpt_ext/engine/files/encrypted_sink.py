"""Encrypted output: a sink that takes plaintext at any offset and writes ciphertext only.

1. A file is cut into units that are encrypted on their own: the chunks of this package's container, or MindSpore's
   blocks, which are made short here. Where each goes is known before any is written.
2. A unit waits in memory until it is complete, framing included, and is then encrypted and written: nothing is written
   twice, and no plaintext reaches the disk. A write that covers a unit by itself does not wait.
3. Memory is bounded by order. `rounds` hands out the work in the order of the files' bytes, few files and some MiB at a
   time, so few units are incomplete at any moment.
4. A checksum goes inside the encryption, put together as in `crc_sink`; digests are of the plaintext, as in every file.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Optional, Protocol

from ms_ckpt_ext.core.planning.io_units import Task
from ms_ckpt_ext.errors import UsageError, storage_error
from ms_ckpt_ext.formats import crypto
from ms_ckpt_ext.formats.crypto.keys import SM4_LENGTHS
from ms_ckpt_ext.formats.crypto.units import thread_scratch
from ms_ckpt_ext.formats.index import FileLayout
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.formats.table import format_of
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.sink import FileSink

_CHUNK, _BLOCK = 1 << 20, 4 << 20
"""Plaintext bytes of a unit: a chunk of the container, a block of MindSpore's format."""
_KEY_LABEL = b"ms_ckpt_ext: which key a job writes with"


class HeldBytes:
    """Bytes of incomplete units in memory, of all files together: now, and at most until now.

    Attributes:
        budget: how many there may be.
        at_once: what is written before the next round begins, unless a single parameter is larger.
    """

    def __init__(self, budget: int = 256 << 20, at_once: int = 32 << 20) -> None:
        self.budget, self.at_once = budget, at_once
        self.held = self.peak = 0
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count memory taken, or with a negative number given back."""
        with self.lock:
            self.held += nbytes
            self.peak = max(self.peak, self.held)


class Seal:
    """How a job's files are encrypted.

    Attributes:
        key: the key; it shows in no repr.
        mode: "AES-GCM", "AES-CBC", "SM4-CBC": MindSpore's blocks for `.ckpt`. "chunked": this package's container; a
            safetensors file takes it for "AES-GCM" as well, since MindSpore has no other for it.
        chunk, block: plaintext bytes of a unit of either.
        tally: the memory that waits.

    Raises:
        UsageError: no such mode, or a key that is too long for it.
    """

    def __init__(
        self,
        key: crypto.Key,
        mode: str = crypto.GCM,
        chunk: int = _CHUNK,
        block: int = _BLOCK,
        tally: Optional[HeldBytes] = None,
    ) -> None:
        modes = (crypto.GCM, crypto.CBC, crypto.SM4, crypto.CHUNKED)
        if mode not in modes:
            raise UsageError(f"no such enc_mode; choose one of {', '.join(modes)}")  # unquoted: it may be a key
        if mode == crypto.SM4 and len(key) not in SM4_LENGTHS:
            raise UsageError(f"a key of {len(key)} bytes; {crypto.SM4} takes {SM4_LENGTHS[0]}")
        self.key, self.mode, self.chunk, self.block = key, mode, chunk, block
        self.tally = tally or HeldBytes()

    def container(self, name: str) -> str:
        """The container of a file of this name. Raises UsageError when it cannot be in this mode."""
        form = format_of(name)
        if (form is not None and form.blocks) or self.mode == crypto.CHUNKED:
            return self.mode
        if self.mode == crypto.GCM:
            return crypto.CHUNKED
        raise UsageError(
            f"{name!r} cannot be encrypted with {self.mode}: safetensors files take AES-GCM; use it, or write .ckpt"
        )

    def needs_crc(self, name: str) -> bool:
        """Whether only a checksum inside a file of this name would show that its units were put into another order."""
        return self.container(name) != crypto.CHUNKED

    def units(self, name: str, size: int) -> _UnitSealer:
        """What cuts and encrypts a new file of `size` bytes of plaintext."""
        container = self.container(name)
        if container == crypto.CHUNKED:
            return crypto.Sealer(self.key, size, chunk=self.chunk)
        return crypto.BlockSealer(self.key, container, size, block=self.block)

    def unit_bytes(self, name: str) -> int:
        """Plaintext bytes of a unit of a file of this name."""
        return self.chunk if self.container(name) == crypto.CHUNKED else self.block

    def access(self, name: str) -> Access:
        """How a file of this name is opened again."""
        return Access(self.key, self.container(name))

    def identity(self) -> str:
        """Tells apart keys and modes, and tells nothing about the key: an HKDF of it."""
        return f"{self.mode}|{self.chunk}|{self.block}|{crypto.key_fingerprint(self.key, _KEY_LABEL)}"


class _UnitSealer(Protocol):
    """A file cut into parts that are encrypted on their own. See `crypto.Sealer` and `crypto.BlockSealer`."""

    header: bytes
    count: int
    stored_size: int

    def span(self, index: int) -> tuple[int, int]:
        """Plaintext offsets of a unit."""

    def stored(self, index: int) -> int:
        """Bytes of a unit as it lies in the file."""

    def offset(self, index: int) -> int:
        """Where a unit begins in the file."""

    def seal(self, index: int, plain: memoryview, out: memoryview) -> int:
        """Encrypt a unit into the front of `out`; returns its length in bytes."""

    def unseal(self, index: int, stored: memoryview, out: memoryview) -> bool:
        """Decrypt what `seal` gave; False when its tag does not fit any more."""


class _Unit:
    """A unit that is not complete yet."""

    def __init__(self, size: int) -> None:
        self.data = memoryview(bytearray(size))
        self.missing = size


class SealedSink:
    """A file that is encrypted as it is written. See `storage.sink.Sink`.

    Args:
        path: where the ciphertext goes.
        name: the file's own name, which decides on the container.
        layout: the plaintext; its literals are written by the sink itself, all but the checksum.
        seal: how.
        sync: as of `FileSink`.

    Attributes:
        unit: plaintext bytes of what is encrypted at once; writes that begin and end at its multiples do not wait.
    """

    fd: Optional[int] = None

    def __init__(self, path: str, name: str, layout: FileLayout, seal: Seal, sync: bool = True) -> None:
        self.path, self._tally = path, seal.tally
        self._units = seal.units(name, layout.size)
        self.unit = seal.unit_bytes(name)
        self._literals = sorted(layout.fixed)
        self._starts = [offset for offset, _ in self._literals]
        self._waiting: dict[int, _Unit] = {}
        self._sealed = bytearray(self._units.count)
        self._lock = threading.Lock()
        self._file = FileSink(path, self._units.stored_size, sync)
        self._file.write(0, memoryview(self._units.header))

    def write(self, offset: int, buffer: memoryview) -> None:
        """Take plaintext; every byte once. Raises StorageError."""
        while len(buffer):
            index = offset // self.unit
            low, high = self._units.span(index)
            part = buffer[: high - offset]
            if len(part) == high - low:
                self._emit(index, part)
            else:
                self._collect(index, offset - low, part)
            offset, buffer = offset + len(part), buffer[len(part) :]

    def _collect(self, index: int, at: int, part: memoryview) -> None:
        with self._lock:
            unit = self._waiting.get(index) or self._begin(index)
        unit.data[at : at + len(part)] = part
        with self._lock:
            unit.missing -= len(part)
            complete = unit.missing == 0
        if complete:
            self._emit(index, unit.data)
            with self._lock:
                del self._waiting[index]
            self._tally.add(-len(unit.data))

    def _begin(self, index: int) -> _Unit:
        """Room for a unit, with the framing that lies in it."""
        low, high = self._units.span(index)
        unit = self._waiting[index] = _Unit(high - low)
        self._tally.add(high - low)
        first = max(0, bisect_right(self._starts, low) - 1)
        for offset, literal in self._literals[first : bisect_left(self._starts, high)]:
            start, stop = max(low, offset), min(high, offset + len(literal))
            if start < stop:
                unit.data[start - low : stop - low] = literal[start - offset : stop - offset]
                unit.missing -= stop - start
        return unit

    def _emit(self, index: int, plain: memoryview) -> None:
        out = thread_scratch(self._units.stored(index))
        length = self._units.seal(index, plain, out)
        self._file.write(self._units.offset(index), out[:length])
        self._sealed[index] = 1

    def read_back(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with plaintext that was written at `offset`, or that the sink has by itself."""
        while len(buffer):
            index = offset // self.unit
            low, high = self._units.span(index)
            part = buffer[: high - offset]
            with self._lock:
                unit = None if self._sealed[index] else self._waiting.get(index) or self._begin(index)
            if unit is not None:
                part[:] = unit.data[offset - low : offset - low + len(part)]
            elif len(part) == high - low:
                self._unseal(index, part)
            else:
                whole = linux.scratch(high - low)
                self._unseal(index, whole)
                part[:] = whole[offset - low : offset - low + len(part)]
            offset, buffer = offset + len(part), buffer[len(part) :]

    def _unseal(self, index: int, out: memoryview) -> None:
        stored = thread_scratch(self._units.stored(index))
        self._file.read_back(self._units.offset(index), stored)
        if not self._units.unseal(index, stored, out):
            raise storage_error("read back", self.path, OSError(errno.EIO, "it is not what was written"))

    def finish(self) -> None:
        """Write what holds only framing, and finish the file."""
        for index in range(self._units.count):
            if not self._sealed[index]:
                unit = self._waiting.get(index) or self._begin(index)
                if unit.missing:
                    raise AssertionError(f"{self.path!r}: unit {index} lacks {unit.missing} bytes")
                self._emit(index, unit.data)
                self._forget(index)
        self._file.finish()

    def _forget(self, index: int) -> None:
        self._tally.add(-len(self._waiting.pop(index).data))

    def close(self) -> None:
        """Let go of the file and of the plaintext."""
        for index in list(self._waiting):
            self._forget(index)
        self._file.close()


def rounds(tasks: Sequence[Task], names: Sequence[str], seal: Seal, workers: int) -> Iterator[list[Task]]:
    """Cut the work into rounds that each leave few units incomplete: few files, and of them consecutive bytes.

    Args:
        tasks: what is to be done; a landing's sink is a place in `names`.
        names: the files.
        seal: how they are encrypted.
        workers: how many threads run a round.

    A round leaves at most the unit at its end in every file of its group. While it runs, each worker adds the two
    edges of what it is writing, and small parameters wait for neighbours of the same round.
    """
    unit = max(map(seal.unit_bytes, names), default=_CHUNK)
    tally = seal.tally
    files = max(1, (tally.budget - tally.at_once) // (unit * (2 * workers + 2)))
    for first in range(0, len(names), files):
        group = [part for task in tasks if (part := _within(task, range(first, first + files))) is not None]
        yield from _consecutive(sorted(group, key=_position), tally.at_once)


def _within(task: Task, sinks: range) -> Optional[Task]:
    """What a task wants to land in some of the sinks."""
    targets = tuple(
        target._replace(landings=kept)
        for target in task.targets
        if (kept := tuple(landing for landing in target.landings if landing.sink in sinks))
    )
    return Task(task.tensor, targets) if targets else None


def _position(task: Task) -> tuple[int, int]:
    """The first sink that a task writes to, and where."""
    return min((x.sink, x.extents[0].offset) for target in task.targets for x in target.landings)


def _consecutive(tasks: Sequence[Task], most: int) -> Iterator[list[Task]]:
    held, nbytes = [], 0
    for task in tasks:
        held.append(task)
        nbytes += sum(e.length for target in task.targets for x in target.landings for e in x.extents)
        if nbytes >= most:
            yield held
            held, nbytes = [], 0
    if held:
        yield held

"""Open readers, shared by threads, bounded in number and memory: 1,024 source files do not need 1,024 descriptors."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Callable, Protocol

from ms_ckpt_ext.errors import StorageError, storage_error
from ms_ckpt_ext.storage.reader import ByteReader


class SourceFile(Protocol):
    """What the pool must know of a file: where it is, and what it was like when its header was read."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


class _Open:
    def __init__(self, reader: ByteReader) -> None:
        self.reader = reader
        self.users = 0
        self.admitted = False

    @property
    def keeps(self) -> int:
        """Most bytes of plaintext in memory; a plain reader has none."""
        return self.reader.traits.keeps


class ReadCount:
    """What was asked of the storage, for tests, benchmarks and reports."""

    def __init__(self) -> None:
        self.reads = self.nbytes = 0
        self.files: set[str] = set()

    def add(self, other: ReadCount) -> None:
        """Count what another pool was asked for as well."""
        self.reads += other.reads
        self.nbytes += other.nbytes
        self.files |= other.files


class ReaderPool:
    """Readers by file number, opened on first use, the least recently used closed beyond what may stay open.

    Args:
        files: what is read.
        opener: path -> reader.
        most: files that stay open though nobody uses them.
        most_bytes: what readers keep in memory together, or the one in use where it alone keeps more. A thread that
            wants one more reader waits until the others have let go of theirs, so it must not hold one itself.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        opener: Callable[[str], ByteReader],
        most: int = 256,
        most_bytes: int = 1 << 30,
    ) -> None:
        self._files = files
        self._opener = opener
        self._most, self._most_bytes = most, most_bytes
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Condition()
        self.count = ReadCount()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of a file."""
        with self.use(file) as reader:
            reader.read_into(offset, buffer)
        self.tally(file, len(buffer))

    def tally(self, file: int, nbytes: int) -> None:
        """Count a read that was made through `use`."""
        with self._lock:
            self.count.reads += 1
            self.count.nbytes += nbytes
            self.count.files.add(self._files[file].path)

    @contextmanager
    def use(self, file: int) -> Iterator[ByteReader]:
        """The reader of a file, kept open while in use. Raises StorageError when the file changed since its index."""
        with self._lock:
            held = self._open.get(file)
            if held is None:
                held = self._open[file] = _Open(self._checked(file))
            held.users += 1
            self._open.move_to_end(file)
            self._evict()
        try:
            with self._lock:
                self._lock.wait_for(lambda: held.admitted or self._admit(held))
            yield held.reader
        finally:
            with self._lock:
                held.users -= 1
                self._evict()
                self._lock.notify_all()

    def _checked(self, file: int) -> ByteReader:
        known = self._files[file]
        reader = self._opener(known.path)
        try:
            refuse_changed(known, reader.disk_size, reader.mtime_ns)
        except StorageError:
            reader.close()
            raise
        return reader

    def verify(self) -> None:
        """Look at every file that was read once more. Raises StorageError when one changed meanwhile."""
        for known in self._files:
            if known.path in self.count.files:
                try:
                    status = os.stat(known.path)
                except OSError as error:
                    raise storage_error("look again at", known.path, error) from error
                refuse_changed(known, status.st_size, status.st_mtime_ns)

    def _evict(self) -> None:
        if len(self._open) > self._most:
            self._drop(len(self._open) - self._most)

    def _drop(self, number: int) -> None:
        """Close so many readers that nobody uses, or all of these."""
        for file in [f for f, held in self._open.items() if held.users == 0][:number]:
            self._open.pop(file).reader.close()

    def _admit(self, wanted: _Open) -> bool:
        """Let a reader take memory if there is room, which readers that nobody uses make."""
        while wanted.keeps and (others := sum(held.keeps for held in self._open.values() if held.admitted)):
            if others + wanted.keeps <= self._most_bytes:
                break
            before = len(self._open)
            self._drop(1)
            if len(self._open) == before:
                return False
        wanted.admitted = True
        return True

    def close(self) -> None:
        """Close every reader."""
        with self._lock:
            for held in self._open.values():
                held.reader.close()
            self._open.clear()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_changed(known: SourceFile, size: int, mtime_ns: int) -> None:
    """Raise StorageError when a file is not the one whose table of contents was read."""
    if (size, mtime_ns) != (known.size, known.mtime_ns):
        raise StorageError(
            0,
            f"{known.path!r} changed since its header was read ({known.size} bytes then, {size} now): "
            "something is writing to the checkpoint; run again when it is at rest",
        )

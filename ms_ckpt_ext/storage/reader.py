"""Ranged reads. A reader shows a file as a flat array of bytes; ciphers and other layers are readers over readers.

A pool holds open readers, shared by threads, bounded in number and memory: 1,024 source files do not need 1,024
descriptors.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple, Optional, Protocol, Union

from ms_ckpt_ext.errors import FormatError, ReadError, StorageError, TruncatedFileError, UsageError, storage_error

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for its writer
_MOST_PLACES = 1024
"""Most places that one system call fills (Linux: UIO_MAXIOV)."""

MOST_LEVELS = 64
"""How deep lists and objects in a JSON text may be nested; none that is read here needs ten levels."""
_DEEP = f"nested deeper than {MOST_LEVELS} levels"

Take = Callable[[int, memoryview], None]
"""Given an offset and the bytes there, which may be overwritten afterwards."""


class Traits(NamedTuple):
    """How a reader is best used, beyond reading any range.

    Attributes:
        container: what its bytes come through: "plain", or the container that the file is encrypted in.
        unit: bytes that it produces at once: reads that begin and end at its multiples rarely produce any twice; 0
            where any range is as good as another.
        keeps: most bytes of plaintext that it keeps in memory.
        stream: hands a range (offset, length) over in pieces, in order, where that is better than reading it. Pieces
            may come before they are known to be authentic, which they are once the call has returned.
        crc32: CRC-32 of the bytes up to an offset, where the reader has a shorter way than reading them.
    """

    container: str = "plain"
    unit: int = 0
    keeps: int = 0
    stream: Optional[Callable[[int, int, Take], None]] = None
    crc32: Optional[Callable[[int], int]] = None


class ByteReader(Protocol):
    """The bytes of one file, at any offset, from any thread."""

    path: str
    size: int
    """Bytes that can be read; `disk_size` is what the file takes on disk, which differs where it is encrypted."""
    disk_size: int
    mtime_ns: int
    fd: Optional[int]
    """Descriptor whose offsets are this reader's, for copies inside the kernel; None where bytes are transformed."""
    traits: Traits

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (flat bytes) from `offset`. Raises TruncatedFileError or StorageError."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> ByteReader: ...

    def __exit__(self, *_: object) -> None: ...


class PlainReader:
    """A file as it lies on disk. No mmap: a file on a network file system may change or vanish under a map."""

    traits = Traits()

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd: Optional[int] = os.open(path, _FLAGS)
        except OSError as error:
            raise storage_error("open", path, error, ReadError) from error
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ReadError(
                errno.EINVAL,
                f"cannot read {path!r}: it is no regular file, but a folder, a pipe or a device; check the path",
            )
        self.size = self.disk_size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        done, total = 0, len(buffer)
        while done < total:
            done += self._read(lambda fd, at: os.preadv(fd, [buffer[at - offset :]], at), offset + done, total - done)

    def scatter(self, offset: int, vector: array[int]) -> None:
        """Fill the places in `vector` (see `linux.scatter`) with the bytes from `offset` on; raises as `read_into`."""
        from ms_ckpt_ext.storage import linux  # and ctypes with it

        done = 0
        while done < len(vector):
            some = vector[done : done + 2 * _MOST_PLACES]
            wanted = sum(some[1::2])
            got = self._read(lambda fd, at: linux.scatter(fd, some, at), offset, wanted)  # noqa: B023 - called at once
            offset += got
            if got == wanted:
                done += len(some)
                continue
            while got >= vector[done + 1]:  # the kernel stopped early
                got -= vector[done + 1]
                done += 2
            vector[done] += got
            vector[done + 1] -= got

    def _read(self, call: Callable[[int, int], int], offset: int, wanted: int) -> int:
        """Make one system call, which may read fewer than `wanted` bytes, but at least one."""
        if self.fd is None:
            raise StorageError(0, f"cannot read {self.path!r}: the reader is closed")
        try:
            got = call(self.fd, offset)
        except OSError as error:
            raise storage_error(f"read {wanted} bytes at offset {offset} of", self.path, error, ReadError) from error
        if got == 0 and wanted:
            raise TruncatedFileError(
                f"{self.path!r} ended at byte {offset} while {wanted} more bytes were expected there; "
                "the file was truncated after its header was read: restore it or choose another checkpoint"
            )
        return got

    def close(self) -> None:
        """Release the file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def from_json(text: Union[bytes, str]) -> Any:
    """The value of a JSON text. Raises ValueError when it is not JSON, nests too deep, or gives a name two values.

    >>> from_json(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(_DEEP) from None
    inside = [found]
    for _ in range(MOST_LEVELS):
        lists = (each.values() if isinstance(each, dict) else each for each in inside if isinstance(each, (dict, list)))
        inside = [each for held in lists for each in held if isinstance(each, (dict, list))]
    if inside:
        raise ValueError(_DEEP)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Of a name's several values, Python's own reader takes the last; other programs may take the first."""
    found = dict(pairs)
    for name, value in pairs if len(found) < len(pairs) else ():
        if isinstance(value, (dict, list)) or repr(found[name]) != repr(value):
            raise ValueError(f"the name {name[:99]!r} occurs twice, with different values")
    return found


def read_json(path: str, what: str, kind: Union[type[UsageError], type[FormatError]] = FormatError) -> Any:
    """The value of a small JSON file, or pipe, that a user gave; messages call it `what`.

    Raises:
        StorageError: it cannot be read.
        FormatError, or another `kind`: it is not JSON.
    """
    from ms_ckpt_ext.storage.linux import read_small

    try:
        return from_json(read_small(path, pipe=True))
    except OSError as error:
        raise storage_error(f"read {what}", path, error) from error
    except ValueError as error:
        raise kind(f"{what} {path!r} is not JSON: {error}") from error


class SourceFile(Protocol):
    """What the pool must know of a file: where it is, and what it was like when its header was read."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


class _Open:
    users, admitted = 0, False

    def __init__(self, reader: ByteReader) -> None:
        self.reader = reader

    @property
    def keeps(self) -> int:
        """Most bytes of plaintext in memory; a plain reader has none."""
        return self.reader.traits.keeps


class ReadCount:
    """Reads that were asked of the storage, for tests, benchmarks and reports."""

    def __init__(self) -> None:
        self.reads = self.nbytes = 0
        self.files: set[str] = set()

    def add(self, other: ReadCount) -> None:
        """Add what another pool counted."""
        self.reads += other.reads
        self.nbytes += other.nbytes
        self.files |= other.files


class ReaderPool:
    """Readers by file number, opened on first use, the least recently used closed beyond what may stay open.

    Args:
        files: what is read.
        opener: path -> reader.
        most: files that stay open though nobody uses them.
        most_bytes: most that readers keep in memory together; one that keeps more is used alone. A thread that
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
            self._drop(len(self._open) - self._most)
        try:
            with self._lock:
                self._lock.wait_for(lambda: held.admitted or self._admit(held))
            yield held.reader
        finally:
            with self._lock:
                held.users -= 1
                self._drop(len(self._open) - self._most)
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
        """Look once more at every file that was read. Raises StorageError when one changed meanwhile."""
        for known in self._files:
            if known.path in self.count.files:
                try:
                    status = os.stat(known.path)
                except OSError as error:
                    raise storage_error("look again at", known.path, error) from error
                refuse_changed(known, status.st_size, status.st_mtime_ns)

    def _drop(self, number: int) -> None:
        """Close this number of the readers that nobody uses, or all of them."""
        for file in [f for f, held in self._open.items() if held.users == 0][: max(0, number)]:
            self._open.pop(file).reader.close()

    def _admit(self, wanted: _Open) -> bool:
        """Let a reader take memory if there is room; readers that nobody uses are closed to make some."""
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

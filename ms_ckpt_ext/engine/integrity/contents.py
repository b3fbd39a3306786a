"""What files hold, found in one pass over their bytes: digests, checksums, values that are all equal or no numbers.

1. The caller names portions: a tensor, a stretch of one, or a file's framing, which is all bytes outside tensors.
2. The bytes that portions of a file need are read in file order, in runs of up to 1 MiB: many small tensors by one
   read, and each byte once, however many portions and checksums need it.
3. Runs are dealt to threads in bundles; all of a tensor lies in one bundle, so it is digested from front to back.

Every comparison of stored bytes by digests goes through here: with a manifest, with what was noted when a file was
written, with the same slice in other files. Digests of a file that is being written are made on the way
(`storage.digest_sink`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Protocol

import xxhash

from ms_ckpt_ext.core.geometry.array import DType
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.digest_sink import KEPT, DigestStream
from ms_ckpt_ext.storage.threads import spread

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.checksum import Sums

RUN = 1 << 20
"""Most bytes of one read: they stay in a core's cache until they are digested or copied."""
_GAP = 64  # gaps up to this are read over
BUNDLE = 64 << 20


class Portion(NamedTuple):
    """Bytes that are looked at as one.

    Attributes:
        file: its number.
        extents: where they lie, one after another.
        dtype: of the elements in them, to find out whether these are all equal; None where only the digest is wanted.
        numbers: count NaN and infinities among them.
        framing: they lie between tensors, all over the file.
    """

    file: int
    extents: tuple[Extent, ...]
    dtype: Optional[DType] = None
    numbers: bool = False
    framing: bool = False


class Seen(NamedTuple):
    """What a portion holds.

    Attributes:
        digest: xxh3-128 of its bytes, as hex.
        constant: all of its elements have the same bits.
        nans, infinities: how many elements are NaN, and infinite.
    """

    digest: str
    constant: bool = False
    nans: int = 0
    infinities: int = 0


_EMPTY = Seen(xxhash.xxh3_128_hexdigest(b""), True)


class NumberedFiles(Protocol):
    """Files by number, such as a `storage.reader.ReaderPool`."""

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of a file."""


class Pass:
    """One pass over files.

    Args:
        files: what is read.
        portions: what is looked at.
        sums: file number -> its checksum, which is given all that is read of the file.
        more: file number -> what else is read of it: what its checksum covers, or all that is to be authenticated.
        read_bytes: most bytes of one read, of which every thread has a buffer.
        bundle_bytes: how much of a file one thread reads before it takes something else.
    """

    def __init__(
        self,
        files: NumberedFiles,
        portions: Sequence[Portion],
        sums: Mapping[int, Sums] = MappingProxyType({}),
        more: Mapping[int, Iterable[Extent]] = MappingProxyType({}),
        read_bytes: int = RUN,
        bundle_bytes: int = BUNDLE,
    ) -> None:
        self._files, self._portions, self._sums, self._more = files, portions, sums, more
        self._read_bytes, self._bundle_bytes = read_bytes, bundle_bytes
        self._lock = threading.Lock()
        self._watches: dict[int, _Watch] = {}
        self._seen: dict[int, Seen] = {}

    def run(
        self,
        workers: int,
        progress: Callable[[int], None] = lambda _: None,
        failed: Optional[dict[int, CheckpointError]] = None,
    ) -> list[Seen]:
        """What every portion holds, in order.

        Args:
            workers: threads, each with a buffer of `read_bytes`.
            progress: is told the bytes read since its last call, from any thread.
            failed: takes the first error of each file, of whose portions nothing is known then; None to raise it.

        Raises:
            FormatError, DecryptionError, StorageError: a file cannot be read.
        """
        sections = self._sections()
        bundles = (bundle for file in sorted(sections) for bundle in self._bundles(file, sorted(sections[file])))

        def worker(_stopped: Callable[[], bool]) -> Callable[[_Bundle], None]:
            buffer = linux.scratch(self._read_bytes)
            return lambda bundle: self._try(bundle, buffer, progress, failed)

        spread(bundles, max(1, min(workers, self._most(sections))), worker)
        return [self._found(number) for number in range(len(self._portions))]

    def _try(
        self,
        bundle: _Bundle,
        buffer: memoryview,
        progress: Callable[[int], None],
        failed: Optional[dict[int, CheckpointError]],
    ) -> None:
        try:
            if failed is None or bundle.file not in failed:
                self._read(bundle, buffer, progress)
        except CheckpointError as error:
            if failed is None:
                raise
            failed.setdefault(bundle.file, error)

    def _sections(self) -> dict[int, list[Section]]:
        """By file, what is wanted of it."""
        sections: dict[int, list[Section]] = {}
        for number, portion in enumerate(self._portions):
            position = 0
            for offset, length in portion.extents:
                if length:
                    sections.setdefault(portion.file, []).append(Section(offset, offset + length, number, position))
                    position += length
        for file, extents in self._more.items():
            sections.setdefault(file, []).extend(Section(o, o + length, _NOBODY, 0) for o, length in extents if length)
        return sections

    def _most(self, sections: Mapping[int, Sequence[Section]]) -> int:
        """About how many bundles there are at most."""
        wanted = (sum(section.stop - section.start for section in held) for held in sections.values())
        return sum(1 + nbytes // self._bundle_bytes for nbytes in wanted)

    def _bundles(self, file: int, sections: Sequence[Section]) -> Iterator[_Bundle]:
        held: list[Run] = []
        nbytes = until = 0
        for run in runs(sections, self._read_bytes):
            held.append(run)
            nbytes += run.stop - run.start
            until = max(until, *(self._end(section) for section in run.sections))
            if nbytes >= self._bundle_bytes and until <= run.stop:
                yield _Bundle(file, held)
                held, nbytes = [], 0
        if held:
            yield _Bundle(file, held)

    def _end(self, section: Section) -> int:
        """Where what must be read from front to back ends."""
        if section.number == _NOBODY or self._portions[section.number].framing:
            return 0
        return max(offset + length for offset, length in self._portions[section.number].extents)

    def _read(self, bundle: _Bundle, buffer: memoryview, progress: Callable[[int], None]) -> None:
        sums = self._sums.get(bundle.file)
        for start, stop, sections in bundle.runs:
            read = buffer[: stop - start]
            self._files.read_into(bundle.file, start, read)
            for section in sections:
                if section.number != _NOBODY:
                    low = max(start, section.start)
                    part = read[low - start : min(stop, section.stop) - start]
                    self._show(section.number, section.position + low - section.start, part)
            if sums is not None:
                sums.add(start, read)
            progress(len(read))

    def _show(self, number: int, position: int, part: memoryview) -> None:
        portion = self._portions[number]
        if len(portion.extents) == 1 and len(part) == portion.extents[0].length:
            self._seen[number] = _at_once(portion, part)
            return
        with self._lock:
            watch = self._watches.get(number)
            if watch is None:
                watch = self._watches[number] = _Watch(portion, self._files)
        watch.take(position, part)
        if watch.complete and self._watches.pop(number, None) is not None:
            self._seen[number] = watch.seen()

    def _found(self, number: int) -> Seen:
        seen = self._seen.get(number)
        if seen is not None:
            return seen
        return Seen("") if any(length for _, length in self._portions[number].extents) else _EMPTY


class Section(NamedTuple):
    """A stretch of a file that belongs to a portion; `position` counts within that."""

    start: int
    stop: int
    number: int
    position: int


_NOBODY = -1
"""The number of what no portion wants."""


class Run(NamedTuple):
    """A stretch of a file that is read at once, and the sections that have a part in it."""

    start: int
    stop: int
    sections: list[Section]


class _Bundle(NamedTuple):
    """What one thread reads of a file before it takes something else."""

    file: int
    runs: list[Run]


def runs(sections: Sequence[Section], read_bytes: int = RUN) -> Iterator[Run]:
    """Reads that cover sorted sections, each byte once. A long one begins a read, so that its elements are aligned."""
    under_way: list[Section] = []
    following = at = 0
    while under_way or following < len(sections):
        at = at if under_way else sections[following].start
        covered, most = max((section.stop for section in under_way), default=at), at + read_bytes
        first = following
        while following < len(sections) and sections[following].start < min(most, covered + _GAP + 1):
            start, stop, *_ = sections[following]
            if stop - start >= read_bytes and start > at:
                most = start
                break
            covered, following = max(covered, stop), following + 1
        stop = min(most, covered)
        while following > first and sections[following - 1].start >= stop:
            following -= 1  # it begins where a long one does
        here = [*under_way, *sections[first:following]]
        yield Run(at, stop, here)
        under_way, at = [section for section in here if section.stop > stop], stop


def _at_once(portion: Portion, part: memoryview) -> Seen:
    digest = xxhash.xxh3_128_hexdigest(part)
    if portion.dtype is None:
        return Seen(digest)
    elements = _Elements(portion.dtype, portion.numbers)
    elements.add(part)
    return Seen(digest, elements.constant, elements.nans, elements.infinities)


class _Watch:
    """A portion whose bytes come in parts: in order, except those of a framing."""

    def __init__(self, portion: Portion, files: NumberedFiles) -> None:
        again = _Again(files, portion.file)
        self._stream = DigestStream(portion.extents, again, threading.Lock(), KEPT if portion.framing else 0)
        self._elements = None if portion.dtype is None else _Elements(portion.dtype, portion.numbers)

    @property
    def complete(self) -> bool:
        """Whether all of it was taken."""
        return self._stream.complete

    def take(self, position: int, part: memoryview) -> None:
        """Look at a part; `part` may be overwritten afterwards."""
        self._stream.take(position, part)
        if self._elements is not None:
            self._elements.add(part)

    def seen(self) -> Seen:
        """What it holds."""
        each = self._elements
        digest = self._stream.digest()
        return Seen(digest) if each is None else Seen(digest, each.constant, each.nans, each.infinities)


class _Again:
    """A file from which a digest reads again what came too early."""

    unit = 0

    def __init__(self, files: NumberedFiles, number: int) -> None:
        self._files, self._number = files, number

    def read_back(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._files.read_into(self._number, offset, buffer)


class _Elements:
    """Whether elements are all the same, and how many are no finite numbers, found part by part, in order."""

    __slots__ = ("_dtype", "_first", "_left", "_numbers", "_width", "constant", "infinities", "nans")

    def __init__(self, dtype: DType, numbers: bool) -> None:
        self._dtype, self._numbers, self._width = dtype, numbers, max(1, dtype.bits // 8)
        self._first = self._left = b""
        self.constant, self.nans, self.infinities = True, 0, 0

    def add(self, part: memoryview) -> None:
        """Look at the next bytes, of which the last element may not be complete."""
        if self._left:
            part = memoryview(self._left + bytes(part))
        whole = len(part) - len(part) % self._width
        self._left = bytes(part[whole:])
        part = part[:whole]
        self._first = self._first or bytes(part[: self._width])
        self.constant = self.constant and self._repeats(part[: 64 * self._width]) and self._repeats(part)
        if self._numbers:
            self._count(part)

    def _repeats(self, part: memoryview) -> bool:
        return bytes(part) == self._first * (len(part) // self._width)

    def _count(self, part: memoryview) -> None:
        import numpy as np

        from ms_ckpt_ext.engine.integrity.numerics import odd_numbers

        odd = odd_numbers(np.frombuffer(part, np.uint8), self._dtype)
        self.nans, self.infinities = self.nans + odd.nans, self.infinities + odd.infinities

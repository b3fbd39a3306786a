"""Reads what a load is going to read, and keeps nothing: altered encrypted files are found before a Parameter changes.

Authenticated encryption proves a chunk when it is decrypted, and a load goes straight into the Parameters, where half
of a checkpoint is worse than none. So what this rank wants of encrypted files is decrypted twice, the first time for
its tags only. Plain files have no tags: their checksums are verified with their headers, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Callable, Optional

from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.planning.io_units import Limits, Task
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.formats import crypto, registry
from ms_ckpt_ext.formats.registry import AUTHENTICATED, Access
from ms_ckpt_ext.storage import buffers
from ms_ckpt_ext.storage.reader import PlainReader

_PIECE = 4 << 20
"""Bytes of one read."""


class _Nowhere:
    """A sink that forgets."""

    path = "nowhere"
    fd: Optional[int] = None
    unit = 0

    def write(self, offset: int, buffer: memoryview) -> None:
        """Take nothing."""

    def finish(self) -> None:
        """Nothing to finish."""

    def close(self) -> None:
        """Nothing to close."""


def prove_tasks(tasks: Iterable[Task], count: int, catalog: Catalog, workers: int, limits: Limits) -> None:
    """Make the reads of a direct load, whose landings name `count` sinks.

    Raises:
        DecryptionError: what is wanted was altered; names file and offset.
        FormatError, StorageError: it cannot be read.
    """
    if catalog.authenticated:
        with catalog.readers() as readers:
            units = schedule(tasks, catalog.stored, limits)
            worker.run(units, readers, [_Nowhere()] * count, workers, lambda *_: None)


def prove_chunks(plan: ExchangePlan, rank: int, catalog: Catalog, threads: int) -> None:
    """Make this rank's reads of a cooperative load. Raises as `prove_tasks`."""
    if not catalog.authenticated:
        return
    mine = [chunk for chunk in plan.chunks if chunk.reader == rank]
    with catalog.readers() as readers, ThreadPoolExecutor(max_workers=threads) as pool:

        def read(file: int, offset: int, length: int) -> None:
            for _ in _through(partial(readers.read_into, file), offset, length):
                pass

        extents = [(chunk.file, extent.offset, extent.length) for chunk in mine for extent in chunk.extents]
        for finished in [pool.submit(read, *extent) for extent in extents]:
            finished.result()


def prove_file(path: str, access: Access, progress: Callable[[int], None] = lambda _nbytes: None) -> Optional[str]:
    """Read a whole file that has no digests on record: its tags, where its encryption has them, and its checksum.

    Args:
        path: an encrypted file, or a plain one that holds no tensor.
        access: how it is opened.
        progress: is told of bytes read.

    Returns:
        None when that proves the contents; else why it does not.

    Raises:
        DecryptionError, ChecksumError, FormatError: the key is wrong, or the file is not what was written.
        StorageError: it cannot be read.
    """
    container = container_of(path)
    if container is not None and access.key is None:
        return f"encrypted ({container}), and no key is given"
    index = registry.read_index(path, access)
    if container is None and index.tensors:
        return "not encrypted, and the manifest has no digests of its tensors"
    with registry.reopen(index, access) as reader:
        if index.reader in AUTHENTICATED:
            for nbytes in _through(reader.read_into, 0, reader.size):
                progress(nbytes)
        checked = registry.verify_crc(reader, index)
    if checked or container is None or index.reader in AUTHENTICATED:
        return None
    return f"{container} is not authenticated, and the file holds no checksum"


def _through(read_into: Callable[[int, memoryview], None], offset: int, length: int) -> Iterator[int]:
    """Read a stretch, piece by piece, and keep nothing of it; yields the bytes of every piece."""
    buffer = buffers.scratch(min(_PIECE, length))
    for done in range(0, length, _PIECE):
        piece = buffer[: min(_PIECE, length - done)]
        read_into(offset + done, piece)
        yield len(piece)


def container_of(path: str) -> Optional[str]:
    """The container that a file is encrypted in, by its first bytes; None when it is plain. Raises StorageError."""
    with PlainReader(path) as reader:
        head = bytearray(min(crypto.SNIFF_BYTES, reader.size))
        reader.read_into(0, memoryview(head))
    return crypto.sniff(bytes(head))

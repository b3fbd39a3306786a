"""Digests of what is stored: of each tensor of a file, and of its framing.

For files that exist. A file that is being written is digested as its bytes are written, see `storage.digest_sink`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable, Optional

from ms_ckpt_ext.engine.integrity.contents import Pass, Portion
from ms_ckpt_ext.engine.integrity.manifest import FileDigests
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import open_reader
from ms_ckpt_ext.storage.digest_sink import streams_of
from ms_ckpt_ext.storage.reader import ByteReader

Opener = Callable[[str], ByteReader]


def digest_tensors(
    index: FileIndex, names: Optional[Iterable[str]] = None, workers: int = 1, opener: Opener = open_reader
) -> dict[str, str]:
    """Digest tensors of one file: name -> 32 hexadecimal digits, in the order of `names`.

    Args:
        index: the file, as its reader describes it.
        names: which tensors; None for all, in file order.
        workers: threads, each with a buffer of 1 MiB.
        opener: path -> reader of the bytes the index's offsets count in (decrypted ones for an encrypted file).

    Raises:
        KeyError: a name the file does not hold.
        TruncatedFileError, StorageError: the file cannot be read.
    """
    wanted = {name: Portion(0, index.tensors[name].extents) for name in (index.tensors if names is None else names)}
    with opener(index.path) as reader:
        seen = Pass(_OneFile(reader), [*wanted.values()]).run(workers)
    return dict(zip(wanted, (each.digest for each in seen)))


def digest_file(index: FileIndex, workers: int = 1, opener: Opener = open_reader) -> FileDigests:
    """What a manifest should say about one file, from one pass over it. Raises as `digest_tensors`."""
    if index.reader != "plain":
        return FileDigests(index.size, {})
    with opener(index.path) as reader:
        wanted = portions(0, index, (*index.tensors, None), reader.size)
        seen = Pass(_OneFile(reader), [*wanted.values()]).run(workers)
    found = dict(zip(wanted, (each.digest for each in seen)))
    return FileDigests(index.size, {name: digest for name, digest in found.items() if name is not None}, found[None])


def portions(file: int, index: FileIndex, names: Iterable[Optional[str]], size: int) -> dict[Optional[str], Portion]:
    """Tensors of a file of `size` bytes of plaintext, as portions; None names its framing."""
    found: dict[Optional[str], Portion] = {}
    for name in names:
        if name is None:
            streams = streams_of({each: entry.extents for each, entry in index.tensors.items()}, size)
            found[name] = Portion(file, tuple(streams[None]), framing=True)
        else:
            found[name] = Portion(file, index.tensors[name].extents)
    return found


class _OneFile:
    """A file that is open, as number 0."""

    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader

    def read_into(self, _file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._reader.read_into(offset, buffer)

"""Digests of what is stored: of each tensor of a file and of its framing, and where they differ from a manifest.

For files that are there. Those of a file that is being written come with its bytes, see `storage.digest_sink`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Callable, Optional

import xxhash

from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.engine.integrity.manifest import Fault, FileDigests, Manifest, size_of
from ms_ckpt_ext.errors import FormatError, StorageError
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.registry import open_reader, read_index
from ms_ckpt_ext.storage import buffers
from ms_ckpt_ext.storage.digest_sink import Streams, streams_of
from ms_ckpt_ext.storage.reader import ByteReader
from ms_ckpt_ext.storage.threads import in_order

_BUFFER = 1 << 20  # stays in a core's cache between read and digest
_FRAMING = "names, dtypes, shapes and notes with the digest"
Opener = Callable[[str], ByteReader]


def digest_tensors(
    index: FileIndex, names: Optional[Iterable[str]] = None, workers: int = 1, opener: Opener = open_reader
) -> dict[str, str]:
    """Digest tensors of one file: name -> 32 hexadecimal digits, in file order.

    Streams every tensor through a buffer of 1 MiB; `workers` threads take a tensor each.

    Args:
        index: the file, as its reader describes it.
        names: which tensors; None for all.
        opener: path -> reader of the bytes the index's offsets count in (decrypted ones for an encrypted file).

    Raises:
        KeyError: a name the file does not hold.
        TruncatedFileError, StorageError: the file cannot be read.
    """
    wanted = list(index.tensors if names is None else names)
    entries = [index.tensors[name] for name in wanted]
    with opener(index.path) as reader:
        return dict(zip(wanted, in_order(lambda entry: _digest(reader, entry.extents), entries, workers)))


def _digest(reader: ByteReader, extents: Sequence[Extent]) -> str:
    state = xxhash.xxh3_128()
    buffer = buffers.scratch(min(_BUFFER, sum(extent.length for extent in extents)))
    for offset, length in extents:
        for at in range(offset, offset + length, _BUFFER):
            part = buffer[: min(_BUFFER, offset + length - at)]
            reader.read_into(at, part)
            state.update(part)
    return state.hexdigest()


def digest_framing(path: str, tensors: Mapping[str, TensorEntry], opener: Opener = open_reader) -> str:
    """Digest all bytes of a file that are no tensor's, in file order: 32 hexadecimal digits.

    Raises TruncatedFileError, StorageError: the file cannot be read.
    """
    with opener(path) as reader:
        return _digest(reader, tuple(streams(tensors, reader.size)[None]))


def streams(tensors: Mapping[str, TensorEntry], size: int) -> Streams:
    """What is digested of a file of `size` bytes: its tensors, and its framing."""
    return streams_of({name: entry.extents for name, entry in tensors.items()}, size)


def digest_file(index: FileIndex, workers: int = 1, opener: Opener = open_reader) -> FileDigests:
    """What a manifest should say about one file, read from the file. Raises as `digest_tensors`."""
    if not _is_plain(index):
        return FileDigests(index.size, {})
    tensors = digest_tensors(index, workers=workers, opener=opener)
    return FileDigests(index.size, tensors, digest_framing(index.path, index.tensors, opener))


def _is_plain(index: FileIndex) -> bool:
    return index.reader == "plain"


def check_digests(
    directory: str,
    manifest: Manifest,
    files: Optional[Iterable[str]] = None,
    workers: int = 1,
    indexer: Callable[[str], FileIndex] = read_index,
    opener: Opener = open_reader,
) -> list[Fault]:
    """Compare files with their manifest, streaming every tensor once; an empty list means all is as written.

    Args:
        directory: the manifest's folder.
        files: which of the manifest's files, relative to the folder; None for all of them.
        workers: threads, each with a buffer of 1 MiB.
        indexer, opener: readers of the files; those that hold a key where files are encrypted. Of a file without
            readable digests only the size is checked: what it holds is for `proof.prove_file`.

    Raises:
        KeyError: a file that the manifest does not list.
    """
    faults = []
    for name in manifest.files if files is None else files:
        expected, path = manifest.files[name], os.path.join(directory, *name.split("/"))
        size = size_of(directory, name)
        if size != expected.size:
            found = "no file" if size is None else f"{size} bytes"
            faults.append(Fault(name, None, found, f"{expected.size} bytes"))
        elif expected.readable:
            try:
                faults += _differences(name, indexer(path), expected, workers, opener)
            except (FormatError, StorageError) as error:
                faults.append(Fault(name, None, str(error), "contents as they were written"))
    return faults


def _differences(name: str, index: FileIndex, expected: FileDigests, workers: int, opener: Opener) -> list[Fault]:
    digests = digest_tensors(index, workers=workers, opener=opener)
    both = {**dict.fromkeys(expected.tensors, "no such tensor"), **digests}
    listed = {**dict.fromkeys(digests, "no such tensor"), **expected.tensors}
    faults = [Fault(name, tensor, both[tensor], listed[tensor]) for tensor in listed if both[tensor] != listed[tensor]]
    return [*faults, *framing_faults(name, index, expected, opener)]


def framing_faults(name: str, index: FileIndex, expected: FileDigests, opener: Opener) -> list[Fault]:
    """The one difference there may be in the framing of a file, which is called `name`. Raises as `digest_framing`."""
    if expected.framing is None:
        return []
    found = digest_framing(index.path, index.tensors, opener)
    same = found == expected.framing
    return [] if same else [Fault(name, None, f"{_FRAMING} {found}", f"{_FRAMING} {expected.framing}")]

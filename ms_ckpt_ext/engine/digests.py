"""A digest of every tensor, kept beside the files: `ms_ckpt_ext.digests.json`.

The digest is plain xxh3-128 of the tensor's bytes, row-major and little-endian as every format here stores them, so
`xxhash.xxh3_128(array.tobytes()).hexdigest()` or `xxh128sum` checks it without this package. Names of files are
relative to the manifest's folder, sizes are bytes on disk:

    {"format": "ms_ckpt_ext.digests", "version": 1, "algorithm": "xxh3-128",
     "files": {"part0.safetensors": {"size": 4096, "framing": "c9788c84a05f64d9a4b6d0ac2e8a5f0c",
                                     "tensors": {"layer.weight": "99aa06d3014798d86001c324468d497f"}}}}

`framing` is the digest of all bytes that are no tensor's, in file order: names, dtypes, shapes, a file's notes, its
checksum. Manifests of older releases lack it.

It finds accidents: bit rot, lost pages, truncation. It is no signature: who can change a file can change the manifest.

Encrypted files are listed with their size and without digests. A digest of the plaintext without a key would confirm
a guess at the contents, two equal digests would tell that two tensors are equal, and authenticated encryption finds
every changed byte by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.reads import Extent
from ms_ckpt_ext.errors import FormatError, StorageError, storage_error
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.registry import open_reader, read_index
from ms_ckpt_ext.storage import locks, memory
from ms_ckpt_ext.storage.durable import write_atomically
from ms_ckpt_ext.storage.reader import ByteReader
from ms_ckpt_ext.storage.threads import in_order

MANIFEST_NAME = "ms_ckpt_ext.digests.json"
_FORMAT = "ms_ckpt_ext.digests"
_ALGORITHM = "xxh3-128"
_HEX = re.compile(r"^[0-9a-f]{32}$")
_BUFFER = 1 << 20  # stays in a core's cache between read and digest
_FRAMING = "names, dtypes, shapes and notes with the digest"
Opener = Callable[[str], ByteReader]


class FileDigests(NamedTuple):
    """What the manifest knows of one file.

    Attributes:
        size: bytes on disk.
        tensors: name -> 32 hexadecimal digits of its xxh3-128; empty when the file is encrypted.
        framing: the digest of all other bytes; None when it is not known.
    """

    size: int
    tensors: Mapping[str, str]
    framing: Optional[str] = None

    def to_json(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        framing = {} if self.framing is None else {"framing": self.framing}
        return {"size": self.size, **framing, "tensors": dict(self.tensors)}


class Manifest(NamedTuple):
    """The digests of the files below one folder: name relative to it, with `/` -> digests."""

    files: Mapping[str, FileDigests]

    def to_json(self) -> bytes:
        """The manifest's file."""
        files = {name: held.to_json() for name, held in self.files.items()}
        content = {"format": _FORMAT, "version": 1, "algorithm": _ALGORITHM, "files": files}
        try:
            return json.dumps(content, indent=1, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # names of files need not be Unicode
            return json.dumps(content, indent=1).encode()


class Fault(NamedTuple):
    """Where a file and its manifest differ: `tensor` is None when it is about the file as a whole."""

    file: str
    tensor: Optional[str]
    found: str
    expected: str

    def __str__(self) -> str:
        what = f"{self.file!r}" if self.tensor is None else f"parameter {self.tensor!r} in {self.file!r}"
        return f"{what}: found {self.found}, the manifest says {self.expected}"


def load_manifest(directory: str) -> Optional[Manifest]:
    """The manifest of a folder as it stands, None when there is none. It may be older than the files: see `digests_of`.

    Raises:
        FormatError: the file is there but is not a manifest.
        StorageError: it cannot be read.
    """
    path = os.path.join(directory, MANIFEST_NAME)
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("read the digests in", path, error) from error
    try:
        return _parse(json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{path!r} is not a manifest of digests ({error!r}); remove it, or restore the checkpoint's own"
        ) from error


def _parse(content: Any) -> Manifest:
    if (content["format"], content["version"], content["algorithm"]) != (_FORMAT, 1, _ALGORITHM):
        raise ValueError(f"version {content['version']!r}, algorithm {content['algorithm']!r}")
    files = {}
    for name, held in content["files"].items():
        size, tensors, framing = held["size"], dict(held["tensors"]), held.get("framing")
        digests = [*tensors.values(), *([] if framing is None else [framing])]
        if type(size) is not int or size < 0 or not all(map(_HEX.match, digests)):
            raise ValueError(f"entry of {name!r}")
        files[name] = FileDigests(size, tensors, framing)
    return Manifest(files)


def digests_of(path: str) -> Optional[FileDigests]:
    """What is on record about one file, from the manifest beside it, else the one a folder up (`rank_N/…`).

    None when there is no manifest, it does not list the file, or it lists another size: then it is about an older
    file of that name. Raises as `load_manifest`, and StorageError when the file cannot be looked at.
    """
    folder, name = os.path.split(os.path.abspath(path))
    above, below = os.path.split(folder)
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise storage_error("look at", path, error) from error
    for directory, key in ((folder, name), (above, f"{below}/{name}")):
        manifest = load_manifest(directory)
        held = None if manifest is None else manifest.files.get(key)
        if held is not None:
            return held if held.size == size else None
    return None


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
    buffer = memory.scratch(min(_BUFFER, sum(extent.length for extent in extents)))
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
        extents = sorted(extent for entry in tensors.values() for extent in entry.extents)
        framing, at = [], 0
        for extent in (*extents, Extent(reader.size, 0)):
            framing.append(Extent(at, extent.offset - at))
            at = extent.offset + extent.length
        return _digest(reader, framing)


def digest_file(index: FileIndex, workers: int = 1, opener: Opener = open_reader) -> FileDigests:
    """What a manifest should say about one file, read from the file. Raises as `digest_tensors`."""
    if not _is_plain(index):
        return FileDigests(index.size, {})
    tensors = digest_tensors(index, workers=workers, opener=opener)
    return FileDigests(index.size, tensors, digest_framing(index.path, index.tensors, opener))


def _is_plain(index: FileIndex) -> bool:
    return index.reader == "plain"


def update_manifest(directory: str, files: Mapping[str, FileDigests]) -> None:
    """Put files on record in a folder's manifest, atomically; entries of other files stay while their sizes fit.

    For one writer at a time. A manifest that cannot be understood is replaced. Raises StorageError.
    """
    write_manifest(directory, renewed(directory, files))


def renewed(directory: str, files: Mapping[str, FileDigests], gone: Iterable[str] = ()) -> Manifest:
    """A folder's manifest with new entries; without those of files that are gone or have another size now."""
    try:
        known = load_manifest(directory)
    except FormatError:
        known = None
    dropped = set(gone)
    held = {} if known is None else {n: f for n, f in known.files.items() if n not in dropped}
    return Manifest({**{n: f for n, f in held.items() if _size(directory, n) == f.size}, **files})


def write_manifest(directory: str, manifest: Manifest) -> None:
    """Write or replace a folder's manifest, atomically and durably. Raises StorageError."""
    try:
        write_atomically(os.path.join(directory, MANIFEST_NAME), manifest.to_json())
    except OSError as error:
        raise storage_error("write the digests into", directory, error) from error


def _size(directory: str, name: str) -> Optional[int]:
    try:
        return os.stat(os.path.join(directory, *name.split("/"))).st_size
    except (OSError, ValueError):  # also a name that no file can have
        return None


def take_off_record(directory: str, names: Iterable[str]) -> list[str]:
    """Take files about to be written off older results' manifests: in their own folders, or above the directory.

    Other files stay on record there. To be done before the files are replaced: a record that lacks a file is true.

    Args:
        directory: where the new manifest goes, if there is one.
        names: the files, relative to the directory.

    Returns:
        Manifests that listed no others, which are to go when the files are replaced: their names relative to the
        directory, without that of the directory itself.

    Raises:
        StorageError: a manifest cannot be replaced.
    """
    listed: dict[str, set[str]] = {}
    base = os.path.basename(os.path.abspath(directory))
    for name in names:
        folder, file = os.path.split(name)
        if folder:
            listed.setdefault(folder, set()).add(file)
        else:
            listed.setdefault(os.pardir, set()).add(f"{base}/{file}")
    emptied = (folder for folder, files in listed.items() if _take_off(os.path.join(directory, folder), files))
    return [f"{folder}/{MANIFEST_NAME}" for folder in emptied]


def _take_off(directory: str, files: Collection[str]) -> bool:
    """Take files off a folder's manifest; True when it lists no others, and is left as it is."""
    with _alone_with_manifest(directory):
        try:
            manifest = load_manifest(directory)
        except (FormatError, StorageError):
            return False
        if manifest is None or manifest.files.keys().isdisjoint(files):
            return False
        others = {name: held for name, held in manifest.files.items() if name not in files}
        if others:
            write_manifest(directory, Manifest(others))
        return not others


@contextlib.contextmanager
def _alone_with_manifest(directory: str) -> Iterator[None]:
    """Keep out others that change a folder's manifest, if there is one: jobs for several ranks may run at once."""
    path = Path(directory, MANIFEST_NAME)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # none, or a read-only one, which can be replaced all the same
            yield
            return
        try:
            locks.wait_for_lock(descriptor, path)
            if locks.is_at(descriptor, path):  # else it was replaced meanwhile
                yield
                return
        finally:
            os.close(descriptor)


def check(
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
        indexer, opener: readers of the files; those that hold a key where files are encrypted. Of an encrypted file
            only the size is checked here: what it holds is for `proof.prove_file`.

    Raises:
        KeyError: a file that the manifest does not list.
        FormatError, StorageError: a file that is there cannot be read at all.
    """
    faults = []
    for name in manifest.files if files is None else files:
        expected, path = manifest.files[name], os.path.join(directory, *name.split("/"))
        size = _size(directory, name)
        if size != expected.size:
            found = "no file" if size is None else f"{size} bytes"
            faults.append(Fault(name, None, found, f"{expected.size} bytes"))
        elif expected.tensors:
            faults += _differences(name, indexer(path), expected, workers, opener)
    return faults


def _differences(name: str, index: FileIndex, expected: FileDigests, workers: int, opener: Opener) -> list[Fault]:
    digests = digest_tensors(index, workers=workers, opener=opener)
    both = {**dict.fromkeys(expected.tensors, "no such tensor"), **digests}
    listed = {**dict.fromkeys(digests, "no such tensor"), **expected.tensors}
    faults = [Fault(name, tensor, both[tensor], listed[tensor]) for tensor in listed if both[tensor] != listed[tensor]]
    if expected.framing is not None:
        framing = digest_framing(index.path, index.tensors, opener)
        if framing != expected.framing:
            faults.append(Fault(name, None, f"{_FRAMING} {framing}", f"{_FRAMING} {expected.framing}"))
    return faults

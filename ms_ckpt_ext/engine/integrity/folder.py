"""A folder and all that its manifests list: is every file what was written? Each is read once, whatever is compared.

1. Sizes are compared first.
2. Of a file with digests every tensor and the framing are digested, and of a plain one the checksum that it carries is
   compared, which covers what digests of an older manifest do not: the names of tensors.
3. An encrypted file without digests is decrypted whole, for its authentication tags and its checksum.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

from ms_ckpt_ext.engine.integrity.finding import Finding
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, FileDigests, Manifest, load_manifest, opened, size_of
from ms_ckpt_ext.engine.integrity.recorded import Expected, compare_files
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError
from ms_ckpt_ext.formats import crypto
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.registry import AUTHENTICATED, PLAIN, Access, read_index, stored_checksum
from ms_ckpt_ext.formats.table import SUFFIXES
from ms_ckpt_ext.storage.reader import PlainReader
from ms_ckpt_ext.storage.threads import in_order


@dataclass(frozen=True)
class ManifestCheck:
    """A checkpoint against its digests.

    Attributes:
        manifests: the manifests that were found.
        files, tensors: how many were checked.
        nbytes: bytes of the files.
        faults: what is not as it was written.
        unlisted: checkpoint files that no manifest lists.
        unchecked: files of which only the size could be compared, and why: encrypted, without a key; or without digests
            on record and with neither authentication nor a checksum inside.
    """

    manifests: tuple[str, ...]
    files: int
    tensors: int
    nbytes: int
    faults: tuple[Finding, ...]
    unlisted: tuple[str, ...]
    unchecked: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """True when every listed file was looked at and is as it is on record."""
        return not self.faults and not self.unchecked


class ListedFiles(NamedTuple):
    """A folder's manifests, and those of the rank folders in it: folder -> manifest."""

    root: str
    folders: tuple[str, ...]
    manifests: Mapping[str, Manifest]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, as they are listed."""
        return sum(entry.size for manifest in self.manifests.values() for entry in manifest.files.values())


def find_listed(path: str) -> ListedFiles:
    """The manifests of a folder.

    Raises:
        DiscoveryError: it is not a folder, or holds no manifest.
        FormatError, StorageError: one cannot be read.
    """
    if not os.path.isdir(path):
        what = "is a file" if os.path.isfile(path) else "does not exist"
        raise DiscoveryError(f"{path!r} {what}; a manifest lies in a directory, beside the files: give that")
    folders = (path, *map(str, rank_folders.folders_in(Path(path))))
    found = {folder: held for folder in folders if (held := load_manifest(folder)) is not None}
    if not found:
        raise DiscoveryError(
            f"{path!r} holds no {MANIFEST_NAME}, so nothing says what the files should hold; "
            "compare with another checkpoint, or give the strategy to check the checkpoint by itself"
        )
    return ListedFiles(path, folders, found)


def check_listed(
    listed: ListedFiles, access: Access, workers: int, progress: Callable[[int], None] = lambda _: None
) -> ManifestCheck:
    """Compare the files of a folder with its manifests; arguments as for `check_digests`."""
    found: list[Finding] = []
    tensors = 0
    for folder, manifest in listed.manifests.items():
        readable, closed = opened(manifest, access.key)
        tensors += sum(len(entry.tensors) for entry in readable.files.values())
        told = [*closed, *check_digests(folder, readable, None, workers, access, progress, {f.file for f in closed})]
        prefix = os.path.relpath(folder, listed.root)
        found += [each._replace(file=os.path.normpath(os.path.join(prefix, each.file))) for each in told]
    return ManifestCheck(
        tuple(os.path.join(folder, MANIFEST_NAME) for folder in listed.manifests),
        sum(len(manifest.files) for manifest in listed.manifests.values()),
        tensors,
        listed.nbytes,
        tuple(each for each in found if each.checked),
        tuple(_unlisted(listed)),
        tuple(each for each in found if not each.checked),
    )


def _unlisted(listed: ListedFiles) -> Iterator[str]:
    known = {os.path.normpath(os.path.join(folder, n)) for folder, held in listed.manifests.items() for n in held.files}
    for folder in listed.folders:
        for path in map(os.path.normpath, map(str, rank_folders.inside(Path(folder)))):
            if path.endswith(SUFFIXES) and os.path.isfile(path) and path not in known:
                yield path


def check_digests(
    directory: str,
    manifest: Manifest,
    files: Optional[Iterable[str]] = None,
    workers: int = 1,
    access: Access = PLAIN,
    progress: Callable[[int], None] = lambda _: None,
    closed: Collection[str] = (),
) -> list[Finding]:
    """Compare files with their manifest; an empty list means that all is as written.

    Args:
        directory: the manifest's folder.
        files: which of the manifest's files, relative to the folder; None for all of them.
        workers: threads, each with a buffer of 1 MiB.
        access: how encrypted files are opened.
        progress: is told the bytes read since its last call, from any thread.
        closed: files whose record does not open with the key, of which only the size is compared.

    Raises:
        KeyError: a file that the manifest does not list.
    """
    found: list[Finding] = []
    right: list[str] = []
    for name in manifest.files if files is None else files:
        size, expected = size_of(directory, name), manifest.files[name].size
        if size != expected:
            found.append(Finding(name, None, "no file" if size is None else f"{size} bytes", f"{expected} bytes"))
        elif name not in closed:
            right.append(name)
    plans = in_order(lambda name: _plan(directory, name, manifest.files[name], access), right, workers)
    found += [plan for plan in plans if isinstance(plan, Finding)]
    ready = [plan for plan in plans if not isinstance(plan, Finding)]
    return [*found, *_run([plan._replace(file=n) for n, plan in enumerate(ready)], access, workers, progress)]


def _run(plans: Sequence[Expected], access: Access, workers: int, progress: Callable[[int], None]) -> Iterator[Finding]:
    with Catalog(tuple(plan.table for plan in plans), {}, {}, {}, access).readers() as readers:
        for plan, told in zip(plans, compare_files(plans, readers, workers, progress, tolerant=True)):
            doubt = None if told else _doubt(plan)
            yield from told if doubt is None else [doubt]


def _plan(directory: str, name: str, record: FileDigests, access: Access) -> Union[Expected, Finding]:
    """How a file is compared with its record; or why it cannot be."""
    if record.sealed is not None:
        return _unchecked(name, "listed with encrypted digests, and no key is given")
    path = os.path.join(directory, *name.split("/"))
    try:
        if not record.readable and access.key is None and (container := _container_of(path)) is not None:
            return _unchecked(name, f"encrypted ({container}), and no key is given")
        index = read_index(path, access)
        checksum = stored_checksum(index)
    except CheckpointError as error:
        return Finding(name, None, str(error), f"contents as they were {'written' if record.readable else 'encrypted'}")
    if record.readable:
        return Expected(0, index, record, (None, *index.tensors), name, checksum)
    return Expected(0, index, record, (), name, checksum, index.reader in AUTHENTICATED)


def _doubt(plan: Expected) -> Optional[Finding]:
    """Why nothing is known of the contents of a file in which nothing wrong was found."""
    if plan.record.readable or plan.whole:
        return None
    if plan.table.reader == "plain":
        what = "not encrypted, and the manifest has no digests of its tensors"
        return _unchecked(plan.name, what, "compare it with another copy") if plan.table.tensors else None
    if plan.checksum is not None:
        return None
    return _unchecked(
        plan.name, f"{plan.table.reader} is not authenticated, and the file holds no checksum", "encrypt by AES-GCM"
    )


def _unchecked(name: str, why: str, remedy: str = "give the key") -> Finding:
    return Finding(name, None, why, "contents that can be checked", remedy=remedy, checked=False)


def _container_of(path: str) -> Optional[str]:
    """The container that a file is encrypted in, by its first bytes; None when it is plain. Raises StorageError."""
    with PlainReader(path) as reader:
        head = bytearray(min(crypto.SNIFF_BYTES, reader.size))
        reader.read_into(0, memoryview(head))
    return crypto.sniff(bytes(head))

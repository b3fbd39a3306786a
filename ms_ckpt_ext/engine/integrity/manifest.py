"""What is on record about files: a digest of every tensor, kept beside them: `ms_ckpt_ext.digests.json`.

The digest is plain xxh3-128 of the tensor's bytes, row-major and little-endian as every format here stores them, so
`xxhash.xxh3_128(array.tobytes()).hexdigest()` or `xxh128sum` checks it without this package. Names of files are
relative to the manifest's folder, sizes are bytes on disk:

    {"format": "ms_ckpt_ext.digests", "version": 1, "algorithm": "xxh3-128",
     "files": {"part0.safetensors": {"size": 4096, "framing": "c9788c84a05f64d9a4b6d0ac2e8a5f0c",
                                     "tensors": {"layer.weight": "99aa06d3014798d86001c324468d497f"}}}}

`framing` is the digest of all bytes outside tensors, in file order: names, dtypes, shapes, a file's notes, its
checksum. Manifests of older releases lack it.

It finds accidents: bit rot, lost pages, truncation. It is no signature: whoever can change files can change it as well.

Of an encrypted file `tensors` is empty and `sealed`, in base64, holds what would otherwise be there, encrypted with the
file's key (`formats.crypto.envelope`) and bound to its name and size. Readable digests of the plaintext would confirm a
guess at the contents, and equal ones would show that two tensors are equal. Nobody without the key can make a sealed
entry, or move it to another file; but an old file and its old manifest may be put back together.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from ms_ckpt_ext.errors import DecryptionError, FormatError, StorageError, storage_error
from ms_ckpt_ext.storage import locks
from ms_ckpt_ext.storage.linux import is_below, read_small, status_of, write_atomically
from ms_ckpt_ext.storage.publishing import places_of
from ms_ckpt_ext.storage.reader import from_json

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.integrity.finding import Finding
    from ms_ckpt_ext.formats.crypto import Key

MANIFEST_NAME = "ms_ckpt_ext.digests.json"
_FORMAT = "ms_ckpt_ext.digests"
_ALGORITHM = "xxh3-128"
_HEX = re.compile(r"^[0-9a-f]{32}$")


class FileDigests(NamedTuple):
    """What the manifest knows of one file.

    Attributes:
        size: bytes on disk.
        tensors: name -> 32 hexadecimal digits of its xxh3-128; empty when the file is encrypted.
        framing: the digest of all other bytes; None when it is not known.
        sealed: of an encrypted file, the other two, encrypted; None when they are not known.
    """

    size: int
    tensors: Mapping[str, str]
    framing: Optional[str] = None
    sealed: Optional[str] = None

    @property
    def known(self) -> bool:
        """False when there is nothing on record about the contents."""
        return self.readable or self.sealed is not None

    @property
    def readable(self) -> bool:
        """Whether there are digests, and they are not sealed."""
        return bool(self.tensors) or self.framing is not None

    def to_json(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        more = {"framing": self.framing, "sealed": self.sealed}
        known = {name: value for name, value in more.items() if value is not None}
        return {"size": self.size, **known, "tensors": dict(self.tensors)}

    @classmethod
    def from_json(cls, held: Any) -> FileDigests:
        """What `to_json` gave. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        size, tensors, framing, sealed = held["size"], dict(held["tensors"]), held.get("framing"), held.get("sealed")
        digests = [*tensors.values(), *([] if framing is None else [framing])]
        if type(size) is not int or not 0 <= size < 1 << 63 or not all(map(_HEX.match, digests)):
            raise ValueError(f"size {size!r}, or what is no digest")
        if sealed is not None and (not isinstance(sealed, str) or digests):
            raise ValueError("sealed digests that are no text, or stand beside readable ones")
        return cls(size, tensors, framing, sealed)

    def sealed_by(self, key: Key, name: str) -> FileDigests:
        """The entry of an encrypted file that its manifest calls `name`."""
        from ms_ckpt_ext.formats.crypto import envelope

        plain = json.dumps({"tensors": dict(self.tensors), "framing": self.framing}).encode()
        sealed = base64.b64encode(envelope.wrap(key, plain, _about(name, self.size)))
        return FileDigests(self.size, {}, None, sealed.decode())

    def opened_by(self, key: Optional[Key], name: str) -> FileDigests:
        """The readable digests of a sealed entry; the entry as it is, where it is not sealed or there is no key.

        Raises DecryptionError: it was sealed with another key or for another file, or it was altered.
        """
        if self.sealed is None or key is None:
            return self
        from ms_ckpt_ext.formats.crypto import envelope

        try:
            wrapped = base64.b64decode(self.sealed, validate=True)
            held = from_json(envelope.unwrap(key, wrapped, _about(name, self.size)))
            return FileDigests.from_json({"size": self.size, **held})
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # DecryptionError is a ValueError
            raise DecryptionError(
                f"the sealed digests of {name!r} in {MANIFEST_NAME} do not open ({error}): the key is wrong, or the "
                "manifest was altered or belongs to other files; check the key, or restore the checkpoint's own"
            ) from None


def _about(name: str, size: int) -> bytes:
    """What a sealed entry is bound to."""
    return size.to_bytes(8, "little") + name.encode(errors="surrogatepass")


class Manifest(NamedTuple):
    """The digests of the files below one folder: name relative to it, with `/` -> digests."""

    files: Mapping[str, FileDigests]

    def to_json(self) -> bytes:
        """The manifest's file: one line per file, as `json` indents in pure Python, which takes ten times as long."""
        try:
            return self._text(ensure_ascii=False).encode()
        except UnicodeEncodeError:  # names of files need not be Unicode
            return self._text(ensure_ascii=True).encode()

    def _text(self, ensure_ascii: bool) -> str:
        to_text = json.JSONEncoder(ensure_ascii=ensure_ascii).encode
        head = to_text({"format": _FORMAT, "version": 1, "algorithm": _ALGORITHM, "files": {}})[:-2]
        lines = (f"\n {to_text(name)}: {to_text(held.to_json())}" for name, held in self.files.items())
        return head + ",".join(lines) + "}}"


def load_manifest(directory: str) -> Optional[Manifest]:
    """The manifest of a folder as it stands, None when there is none. It may be older than the files.

    Raises:
        FormatError: the file is there but is not a manifest.
        StorageError: it cannot be read.
    """
    path = os.path.join(directory, MANIFEST_NAME)
    try:
        raw = read_small(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("read the digests in", path, error) from error
    try:
        return _parse(from_json(raw))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path!r} is not a manifest of digests ({error!r}); remove it, or restore the checkpoint's own"
        ) from error


def _parse(content: Any) -> Manifest:
    if (content["format"], content["version"], content["algorithm"]) != (_FORMAT, 1, _ALGORITHM):
        raise ValueError(f"version {content['version']!r}, algorithm {content['algorithm']!r}")
    return Manifest({name: FileDigests.from_json(held) for name, held in content["files"].items()})


def opened(manifest: Manifest, key: Optional[Key]) -> tuple[Manifest, list[Finding]]:
    """A manifest with readable digests, as far as there is a key, and what is wrong with those that do not open."""
    files, faults = {}, []
    for name, held in manifest.files.items():
        try:
            files[name] = held.opened_by(key, name)
        except DecryptionError as error:
            files[name] = held
            from ms_ckpt_ext.engine.integrity.finding import Finding

            faults.append(Finding(name, None, str(error), "digests that open with the key"))
    return Manifest(files), faults


Load = Callable[[str], Optional[Manifest]]
"""`load_manifest`, or one that remembers what it found."""


def recorded_digests(
    path: str, key: Optional[Key] = None, load: Load = load_manifest
) -> Optional[tuple[str, str, FileDigests]]:
    """What is on record about one file, in the manifest beside it, else in the one a folder up (`rank_N/…`).

    Returns:
        The manifest's folder, the file's name there, and the digests, opened if there is a key; of two records the
        first that says more than a size. None when no manifest lists the file.

    Raises:
        FormatError, StorageError: as `load_manifest`.
        DecryptionError: the record is sealed and does not open with the key.
    """
    folder, name = os.path.split(os.path.abspath(path))
    above, below = os.path.split(folder)
    found = []
    for directory, name_there in ((folder, name), (above, f"{below}/{name}")):
        manifest = load(directory)
        held = None if manifest is None else manifest.files.get(name_there)
        if held is not None:
            found.append((directory, name_there, held))
    if not found:
        return None
    directory, name_there, held = next((record for record in found if record[2].known), found[0])
    return directory, name_there, held.opened_by(key, name_there)


def update_manifest(directory: str, files: Mapping[str, FileDigests]) -> None:
    """Put files on record in a folder's manifest; entries of other files stay while their sizes fit.

    One process at a time does so, where the file system has locks. A manifest that cannot be understood is replaced.
    Raises StorageError.
    """
    with contextlib.ExitStack() as alone:
        with contextlib.suppress(StorageError):  # no locks: we trust that there is one process
            alone.enter_context(_alone(directory))
        write_manifest(directory, _renewed(directory, files))


def put_on(directory: str, entries: Mapping[str, Any], sync: bool) -> None:
    """Put files on record in a folder's manifest, as `update_manifest` does.

    Args:
        entries: file -> its entry, as `FileDigests.to_json` gives it; what is not one is left out.
        sync: the manifest is durable.

    Raises StorageError.
    """
    files = {}
    for name, entry in entries.items():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            files[name] = FileDigests.from_json(entry)
    with _alone(directory):
        write_manifest(directory, _renewed(directory, files), sync)


def take_off(directory: str, names: Collection[str], sync: bool) -> None:
    """Take files off all manifests: the directory's, those of their own folders, and those further up.

    To be done before they are replaced: a record that lacks a file is true. Other entries stay; an empty manifest goes.

    Args:
        names: the files, relative to the directory.
        sync: manifests are durable.

    Raises:
        StorageError: the manifest of the directory, or of a folder in it, cannot be replaced.
    """
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(os.path.dirname(name), []).append(os.path.basename(name))
    about: dict[str, set[str]] = {}
    for inner, bases in files.items():
        for folder, begins in places_of(os.path.join(directory, inner)):
            about.setdefault(folder, set()).update(begins + base for base in bases)
    below = os.path.join(os.path.realpath(directory), "")
    for folder, theirs in about.items():
        if status_of(os.path.join(folder, MANIFEST_NAME)) is not None:
            try:
                _take_off(folder, theirs, sync)
            except OSError:  # further up, others may own it: the record there is stale then, which a check finds
                if os.path.join(os.path.realpath(folder), "").startswith(below):
                    raise


def _take_off(directory: str, files: Collection[str], sync: bool) -> None:
    with _alone(directory):
        try:
            manifest = load_manifest(directory)
        except FormatError:
            return
        if manifest is None or manifest.files.keys().isdisjoint(files):
            return
        others = {name: held for name, held in manifest.files.items() if name not in files}
        if others:
            write_manifest(directory, Manifest(others), sync)
        else:
            os.unlink(os.path.join(directory, MANIFEST_NAME))


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Keep out others that change a folder's manifest: jobs for several ranks, files and trees may run at once."""
    path = locks.lock_of(Path(directory, MANIFEST_NAME))
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locks.alone(path))
        except OSError as error:
            raise error if isinstance(error, StorageError) else storage_error("lock", str(path), error) from error
        yield


def _renewed(directory: str, files: Mapping[str, FileDigests]) -> Manifest:
    """A folder's manifest with new entries; without those of files that are gone or have another size now."""
    try:
        known = load_manifest(directory)
    except FormatError:
        known = None
    held = {} if known is None else known.files
    return Manifest({**{n: f for n, f in held.items() if size_of(directory, n) == f.size}, **files})


def write_manifest(directory: str, manifest: Manifest, sync: bool = True) -> None:
    """Write or replace a folder's manifest, atomically. Raises StorageError."""
    try:
        write_atomically(os.path.join(directory, MANIFEST_NAME), manifest.to_json(), sync)
    except OSError as error:
        raise storage_error("write the digests into", directory, error) from error


def size_of(directory: str, name: str) -> Optional[int]:
    """Bytes on disk of a file that a folder's manifest lists; None when there is none, or its name leads elsewhere.

    Raises StorageError.
    """
    status = status_of(os.path.join(directory, *name.split("/"))) if is_below(name) else None
    return None if status is None else status.st_size

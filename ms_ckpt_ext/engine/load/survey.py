"""Who sees which file, and what is in it, found out together.

1. One rank per host lists the checkpoint; all listings are shared, and what a folder of MindFormers says about itself.
2. A file that several hosts list with the same size, times and inode is one file on shared storage. Otherwise (copies
   on local disks) every host's copy gets its header read, and copies with different headers are an error.
3. Every header is read by one rank that sees its file, the files spread evenly; the tables of contents are shared.

So 1,024 ranks open 1,024 files once in all, and hosts need not share storage. All ranks end with the same tables, in
the same order, and the same knowledge of who can read what. Nothing behind this lists files or reads headers again.

What is equal is looked at once: time grows with files and with ranks, not with their product.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.engine.load.hosts import Work, deal, told_apart
from ms_ckpt_ext.engine.source.catalog import Catalog, catalog_of
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, LayoutMismatchError, TransportError
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.storage.threads import in_order
from ms_ckpt_ext.transport.agree import (
    LAYOUT,
    NATURAL,
    WHOLE,
    Maybe,
    pack,
    share_texts,
    told_by_all,
    understanding,
    unpack_all,
)
from ms_ckpt_ext.transport.base import SAME_VERSION, Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.discovery.mindformers import Folder

_READERS = 8
"""Headers that a rank reads at a time."""


_LISTED = {
    "files": {str: (str, (NATURAL, WHOLE, WHOLE, NATURAL))},
    "sharded": bool,
    "names": Maybe({str: str}),
    "folder": Maybe(str),
    "problem": str,
}
"""The form of what a host tells of a listing: see `transport.agree.JsonForm`."""
_TENSOR = (str, str, [NATURAL], [(NATURAL, NATURAL)])
_TABLE = (str, NATURAL, WHOLE, [_TENSOR], {str: str}, str)
"""The form of a table of contents: see `_to_json`."""
_CUTS = ([str], [(str, [NATURAL], LAYOUT, [([NATURAL], [NATURAL])], Maybe(NATURAL))])
"""The form of what `engine.source.folders.cuts_to_json` makes."""
_LOOKED_INTO = {"tables": [(str, _TABLE)], "said": Maybe((Maybe(_CUTS),))}


class Survey(NamedTuple):
    """The checkpoint as all ranks together see it.

    Attributes:
        indexes: key -> table of contents; paths are this host's where it sees the file.
        sees: key -> ranks that can open the file; None when every rank sees every file.
        sharded, names, folder: see `engine.source.listing.Listing`.
        hosts: the hosts asked, for messages.
        host_of: every rank's host.
    """

    indexes: Mapping[str, FileIndex]
    sees: Optional[Mapping[str, frozenset[int]]]
    sharded: bool
    names: Optional[dict[str, str]]
    folder: Optional[Folder]
    hosts: tuple[str, ...]
    host_of: tuple[str, ...]

    @property
    def by_number(self) -> Optional[dict[int, frozenset[int]]]:
        """`sees` by the numbers that files have in a catalog."""
        return None if self.sees is None else dict(enumerate(self.sees.values()))

    def catalog(self, strategy: Optional[Strategy], access: Access) -> Catalog:
        """What the checkpoint holds, by the names that are stored. Raises as `catalog_of`."""
        return catalog_of(self.indexes, self.sharded, self.names, strategy, access, self.folder)


class _Sighting(NamedTuple):
    """A file as hosts list it whose listings are equal."""

    hosts: frozenset[str]
    path: str
    identity: tuple[int, ...]
    """Size, time of modification, time of change, inode."""


def survey(
    transport: Transport[Any], look: Callable[[], Listing], read: Callable[[str], FileIndex], host: str
) -> Survey:
    """Look at a checkpoint together.

    Args:
        look: lists the checkpoint on this host; called on one rank per host. A DiscoveryError counts as seeing none.
        read: reads one file's table of contents.
        host: key of this rank's host, see `hosts`.

    Raises:
        DiscoveryError: no host sees any file.
        LayoutMismatchError: two hosts hold different files of one key, or different metadata of a folder.
        FormatError, StorageError: on the rank that read the file; PeerError on the others.
    """
    hosts = told_apart(share_texts(transport, host))
    host = hosts[transport.rank]
    probe = hosts.index(host) == transport.rank
    listed = _list(look) if probe else _Listed()
    ranks_of = _positions(transport.share(pack(listed.for_others())))
    answers: list[dict[str, Any]] = unpack_all(ranks_of, _LISTED)
    sightings: dict[str, list[_Sighting]] = {}
    for ranks, answer in zip(ranks_of.values(), answers):
        lists = frozenset(hosts[rank] for rank in ranks)
        for key, (path, identity) in answer["files"].items():
            sightings.setdefault(key, []).append(_Sighting(lists, path, tuple(identity)))
    if not sightings and isinstance(listed.problem, DiscoveryError):
        raise listed.problem
    if not sightings:
        told = next((answer["problem"] for answer in answers if answer["problem"]), "")
        raise DiscoveryError(told or "no host sees a file of the checkpoint")
    speaker = _speaker({ranks[0]: answer["folder"] for ranks, answer in zip(ranks_of.values(), answers)}, hosts)
    keys = sorted(sightings, key=lambda key: (len(key), key) if key.isdigit() else (0, key))
    said = listed.folder if speaker == transport.rank else None
    able = _Able(hosts)
    tables, folder = _read_together(transport, keys, sightings, able, read, said)
    indexes = {key: _local(tables[key], sightings[key], host) for key in keys}
    sees = {key: able.ranks(sightings[key]) for key in keys}
    return Survey(
        indexes,
        None if all(len(ranks) == transport.size for ranks in sees.values()) else sees,
        any(answer["sharded"] for answer in answers),
        next((answer["names"] for answer in answers if answer["names"]), None),
        None if speaker is None or folder is None else _folder(folder, indexes),
        tuple(dict.fromkeys(hosts)),
        tuple(hosts),
    )


class _Listed(NamedTuple):
    """What one host lists: key -> path and identity; and why it lists nothing."""

    files: Mapping[str, tuple[str, tuple[int, ...]]] = {}
    sharded: bool = False
    names: Optional[dict[str, str]] = None
    folder: Optional[list[Any]] = None
    """What a folder of MindFormers says about itself, as JSON, in a list of one."""
    problem: Optional[Exception] = None

    def for_others(self) -> dict[str, Any]:
        """For the other hosts; what a folder says about itself is told by one of them, so here only its digest."""
        folder = self.folder and xxhash.xxh3_128_hexdigest(json.dumps(self.folder).encode())
        told = "" if self.problem is None else str(self.problem)
        return {**self._asdict(), "folder": folder, "problem": told}


def _list(look: Callable[[], Listing]) -> _Listed:
    try:
        listing = look()
        files = {key: (path, _identity(path)) for key, path in listing.files.items()}
    except (CheckpointError, OSError) as error:
        return _Listed(problem=error)
    if listing.folder is None:
        return _Listed(files, listing.sharded, listing.names)
    from ms_ckpt_ext.engine.source.folders import cuts_to_json

    return _Listed(files, listing.sharded, listing.names, [cuts_to_json(listing.folder)])


def _positions(payloads: Sequence[bytes]) -> dict[bytes, list[int]]:
    """Distinct payloads, and the ranks that have each: hosts that share their storage tell the same."""
    found: dict[bytes, list[int]] = {}
    for rank, payload in enumerate(payloads):
        found.setdefault(payload, []).append(rank)
    return found


def _speaker(digests: Mapping[int, Optional[str]], hosts: Sequence[str]) -> Optional[int]:
    """The rank that tells all what a folder says about itself; None where there is nothing to tell.

    Args:
        digests: of what it says, by the lowest rank that tells so.
    """
    known = {rank: digest for rank, digest in digests.items() if digest}
    if len(set(known.values())) > 1:
        told = ", ".join(hosts[rank] for rank in known)
        raise LayoutMismatchError(
            f"the metadata.json of the checkpoint's folder differs between hosts ({told}): copy the same checkpoint to "
            "all hosts"
        )
    return min(known, default=None)


def _folder(said: list[Any], indexes: Mapping[str, FileIndex]) -> Folder:
    """A folder of MindFormers as this host sees it, or the one that tells of it."""
    from ms_ckpt_ext.engine.source.folders import cuts_from_json
    from ms_ckpt_ext.formats.discovery.mindformers import Folder

    files = {key: index.path for key, index in indexes.items()}
    with understanding():
        return Folder(os.path.dirname(next(iter(files.values()))), files, cuts_from_json(said[0]))


def _identity(path: str) -> tuple[int, ...]:
    """The time of change as well, which no copy takes over: disks of one kind number their files alike."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class _Able:
    """The ranks that can open a file: those of the hosts that list it.

    Args:
        hosts: every rank's host.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self._on: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            self._on.setdefault(host, []).append(rank)
        self._known: dict[frozenset[str], frozenset[int]] = {}

    def ranks(self, sightings: Sequence[_Sighting]) -> frozenset[int]:
        """Who can; found once for all files of the same hosts."""
        first, *others = sightings
        which = first.hosts.union(*(sighting.hosts for sighting in others)) if others else first.hosts
        if which not in self._known:
            self._known[which] = frozenset(rank for host in which for rank in self._on[host])
        return self._known[which]


def _read_together(
    transport: Transport[Any],
    keys: Sequence[str],
    sightings: Mapping[str, list[_Sighting]],
    able: _Able,
    read: Callable[[str], FileIndex],
    said: Optional[list[Any]],
) -> tuple[dict[str, FileIndex], Any]:
    """Read every distinct file's header on one rank, and share the tables; and what one rank has `said`."""
    files = [(key, copies) for key in keys for copies in _distinct(sightings[key])]
    sees = {number: able.ranks(copies) for number, (_, copies) in enumerate(files)}
    readers = deal([Work(number, 1) for number in sees], [0] * transport.size, sees)
    here = able.hosts[transport.rank]
    mine = [
        (key, next(copy.path for copy in copies if here in copy.hosts))
        for (key, copies), reader in zip(files, readers)
        if reader == transport.rank
    ]

    def look_into() -> dict[str, Any]:
        tables = in_order(read, [path for _, path in mine], _READERS)
        return {"tables": [(key, _to_json(index)) for (key, _), index in zip(mine, tables)], "said": said}

    answers = told_by_all(transport, look_into, _LOOKED_INTO, _tables)
    found: dict[str, FileIndex] = {}
    for tables, _ in answers:
        for key, index in tables:
            before = found.setdefault(key, index)
            if before is not index and header_digest(before) != header_digest(index):
                raise LayoutMismatchError(
                    f"{before.path!r} and {index.path!r} on different hosts ({_hosts_of(sightings[key], able)}) "
                    "should be copies of one file, but their headers differ: copy the same checkpoint to all hosts"
                )
    if found.keys() != sightings.keys():
        raise TransportError(f"ranks told of {len(found)} files where {len(sightings)} were listed; {SAME_VERSION}")
    return found, next((said for _, said in answers if said), None)


def _hosts_of(sightings: Sequence[_Sighting], able: _Able) -> str:
    return ", ".join(dict.fromkeys(able.hosts[rank] for rank in sorted(able.ranks(sightings))))


def _distinct(sightings: Sequence[_Sighting]) -> list[list[_Sighting]]:
    """Group the sightings of a key that are surely the same file."""
    groups: dict[tuple[int, ...], list[_Sighting]] = {}
    for sighting in sightings:
        groups.setdefault(sighting.identity, []).append(sighting)
    return list(groups.values())


def header_digest(index: FileIndex) -> str:
    """Digest of a table of contents: equal for copies of one file wherever they lie."""
    content = [index.size, list(index.tensors.items()), sorted(index.metadata.items()), index.reader]
    return str(xxhash.xxh3_128_hexdigest(repr(content).encode()))


def _local(index: FileIndex, sightings: Sequence[_Sighting], host: str) -> FileIndex:
    """The table with this host's path and time, where this host sees the file."""
    here = next((s for s in sightings if host in s.hosts), None)
    if here is None:
        return index
    return FileIndex(here.path, index.size, here.identity[1], index.tensors, index.metadata, index.reader)


def _to_json(index: FileIndex) -> list[Any]:
    tensors = [[name, entry.dtype.name, entry.shape, entry.extents] for name, entry in index.tensors.items()]
    return [index.path, index.size, index.mtime_ns, tensors, dict(index.metadata), index.reader]


def _tables(told: Mapping[str, Any]) -> tuple[list[tuple[str, FileIndex]], Any]:
    """Tables by key, and what was said of a folder. Raises KeyError or ValueError."""
    return [(key, _from_json(raw)) for key, raw in told["tables"]], told["said"]


def _from_json(raw: list[Any]) -> FileIndex:
    path, size, mtime_ns, tensors, metadata, reader = raw
    entries = {
        name: TensorEntry(DTYPES[dtype], tuple(shape), tuple(Extent(*extent) for extent in extents))
        for name, dtype, shape, extents in tensors
    }
    return FileIndex(path, size, mtime_ns, entries, metadata, reader)

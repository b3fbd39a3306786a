"""Who sees which file, and what is in it, found out together.

1. One rank per host lists the checkpoint; all listings are shared.
2. A file that several hosts list with the same size, time and inode is one file on shared storage. Otherwise (copies
   on local disks) every host's copy gets its header read, and copies with different headers are an error.
3. Every header is read by one rank that sees its file, the files spread evenly; the tables of contents are shared.

So 1,024 ranks open 1,024 files once in all, and hosts need not share storage. All ranks end with the same tables, in
the same order, and the same knowledge of who can read what.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.geometry.dtype import DTYPES
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, LayoutMismatchError
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.base import Transport


@dataclass(frozen=True)
class Survey:
    """The checkpoint as all ranks together see it.

    Attributes:
        indexes: key -> table of contents; paths are this host's where it sees the file.
        sees: key -> ranks that can open the file; None when every rank sees every file.
        sharded, names: see `catalog.Listing`.
        hosts: the hosts asked, for messages.
    """

    indexes: Mapping[str, FileIndex]
    sees: Optional[Mapping[str, frozenset[int]]]
    sharded: bool
    names: Optional[dict[str, str]]
    hosts: tuple[str, ...]

    @property
    def by_number(self) -> Optional[dict[int, frozenset[int]]]:
        """`sees` by the numbers that files have in a catalog."""
        return None if self.sees is None else dict(enumerate(self.sees.values()))


class _Sighting(NamedTuple):
    """A file as one host lists it."""

    host: str
    path: str
    identity: tuple[int, int, int]
    """Size, modification time, inode."""


def survey(
    transport: Transport[Any], look: Callable[[], Listing], read: Callable[[str], FileIndex], host: str
) -> Survey:
    """Look at a checkpoint together.

    Args:
        look: lists the checkpoint on this host; called on one rank per host. A DiscoveryError counts as seeing none.
        read: reads one file's table of contents.
        host: this rank's host; ranks of one host see the same files.

    Raises:
        DiscoveryError: no host sees any file.
        LayoutMismatchError: two hosts hold different files of one key.
        FormatError, StorageError: on the rank that read the file; PeerError on the others.
    """
    hosts = [answer.decode() for answer in transport.share(host.encode())]
    probe = hosts.index(host) == transport.rank
    found, problem = _list(look) if probe else ({}, None)
    answers = [unpack(a) for a in transport.share(pack([found, "" if problem is None else str(problem)]))]
    sightings: dict[str, list[_Sighting]] = {}
    names: Optional[dict[str, str]] = None
    sharded = any(seen.get("sharded") for seen, _ in answers)
    for rank, (seen, _) in enumerate(answers):
        for key, (path, identity) in seen.get("files", {}).items():
            sightings.setdefault(key, []).append(_Sighting(hosts[rank], path, tuple(identity)))
        names = names or seen.get("names")
    if not sightings and isinstance(problem, DiscoveryError):
        raise problem
    if not sightings:
        raise DiscoveryError(next((p for _, p in answers if p), "no host sees a file of the checkpoint"))
    keys = sorted(sightings, key=lambda key: (len(key), key) if key.isdigit() else (0, key))
    tables = _read_together(transport, keys, sightings, hosts, read)
    everywhere = all(len({s.host for s in sightings[key]}) == len(set(hosts)) for key in keys)
    return Survey(
        {key: _local(tables[key], sightings[key], host) for key in keys},
        None if everywhere else {key: _ranks_on({s.host for s in sightings[key]}, hosts) for key in keys},
        sharded,
        names,
        tuple(dict.fromkeys(hosts)),
    )


def _list(look: Callable[[], Listing]) -> tuple[dict[str, Any], Optional[Exception]]:
    try:
        listing = look()
        files = {key: (path, _identity(path)) for key, path in listing.files.items()}
    except (CheckpointError, OSError) as error:
        return {}, error
    return {"files": files, "names": listing.names, "sharded": listing.sharded}, None


def _identity(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _ranks_on(which: set[str], hosts: Sequence[str]) -> frozenset[int]:
    return frozenset(rank for rank, host in enumerate(hosts) if host in which)


def _read_together(
    transport: Transport[Any],
    keys: Sequence[str],
    sightings: Mapping[str, list[_Sighting]],
    hosts: Sequence[str],
    read: Callable[[str], FileIndex],
) -> dict[str, FileIndex]:
    """Read every distinct file's header on one rank, and share the tables."""
    load = [0] * len(hosts)
    mine: list[tuple[str, str]] = []
    for key in keys:
        for copies in _distinct(sightings[key]):
            able = _ranks_on({copy.host for copy in copies}, hosts)
            reader = min(able, key=lambda rank: (load[rank], rank))
            load[reader] += 1
            if reader == transport.rank:
                mine.append((key, next(c.path for c in copies if c.host == hosts[reader])))
    error: Optional[BaseException] = None
    tables: list[tuple[str, FileIndex]] = []
    try:
        with ThreadPoolExecutor(max_workers=8) as pool:
            tables = list(zip((key for key, _ in mine), pool.map(read, (path for _, path in mine))))
    except CheckpointError as problem:
        error = problem
    share_status(transport, error)
    found: dict[str, FileIndex] = {}
    for answer in transport.share(pack([(key, _to_json(index)) for key, index in tables])):
        for key, raw in unpack(answer):
            index = _from_json(raw)
            before = found.setdefault(key, index)
            if header_digest(before) != header_digest(index):
                raise LayoutMismatchError(
                    f"{before.path!r} and {index.path!r} on different hosts ({_hosts_of(sightings[key])}) should be "
                    "copies of one file, but their headers differ: copy the same checkpoint to all hosts"
                )
    return found


def _hosts_of(sightings: Sequence[_Sighting]) -> str:
    return ", ".join(dict.fromkeys(s.host for s in sightings))


def _distinct(sightings: Sequence[_Sighting]) -> list[list[_Sighting]]:
    """Group the sightings of a key that are surely the same file."""
    groups: dict[tuple[int, int, int], list[_Sighting]] = {}
    for sighting in sightings:
        groups.setdefault(sighting.identity, []).append(sighting)
    return list(groups.values())


def header_digest(index: FileIndex) -> str:
    """Digest of a table of contents: equal for copies of one file wherever they lie."""
    content = [index.size, list(index.tensors.items()), sorted(index.metadata.items()), index.reader]
    return str(xxhash.xxh3_128_hexdigest(repr(content).encode()))


def _local(index: FileIndex, sightings: Sequence[_Sighting], host: str) -> FileIndex:
    """The table with this host's path and time, where this host sees the file."""
    here = next((s for s in sightings if s.host == host), None)
    if here is None:
        return index
    return FileIndex(here.path, index.size, here.identity[1], index.tensors, index.metadata, index.reader)


def pack(value: Any) -> bytes:
    """JSON, small enough to share."""
    return zlib.compress(json.dumps(value).encode(), 1)


def unpack(data: bytes) -> Any:
    """What `pack` was given; tuples are lists."""
    return json.loads(zlib.decompress(data))


def _to_json(index: FileIndex) -> list[Any]:
    tensors = [[name, entry.dtype.name, entry.shape, entry.extents] for name, entry in index.tensors.items()]
    return [index.path, index.size, index.mtime_ns, tensors, dict(index.metadata), index.reader]


def _from_json(raw: list[Any]) -> FileIndex:
    path, size, mtime_ns, tensors, metadata, reader = raw
    entries = {
        name: TensorEntry(DTYPES[dtype], tuple(shape), tuple(Extent(*extent) for extent in extents))
        for name, dtype, shape, extents in tensors
    }
    return FileIndex(path, size, mtime_ns, entries, metadata, reader)

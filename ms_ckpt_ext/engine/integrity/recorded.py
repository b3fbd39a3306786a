"""Stored bytes against the digests on record: by one process, or by all ranks together.

1. Of the files that hold a slice, one is chosen, and a load reads no other: what is read was checked.
2. What is wanted, and the framing of the files, is dealt out to the ranks that see it (`engine.load.hosts`). A
   tensor is digested once, by one rank, whole: what is on record is a digest of the whole.
3. All ranks are told what was found, and go on alike.

This costs one more read of every wanted byte over all ranks together, and its digest; memory is 1 MiB a thread.
An encrypted file without digests on record is left to its authentication, where it has one
(`engine.integrity.authenticate`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Callable, NamedTuple, Optional, Union

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor
from ms_ckpt_ext.engine.integrity.contents import Pass, Portion
from ms_ckpt_ext.engine.integrity.digests import portions
from ms_ckpt_ext.engine.integrity.finding import Finding
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, FileDigests, Load, load_manifest, recorded_digests
from ms_ckpt_ext.engine.load.hosts import Work, deal
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import CheckpointError, ChecksumError, UsageError
from ms_ckpt_ext.formats.checksum import StoredChecksum, Sums
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import AUTHENTICATED
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.agree import NATURAL, Maybe, told_by_all
from ms_ckpt_ext.transport.base import Transport

_Names = list[Optional[str]]
"""Tensors of a file; None for its framing."""
_NAMED = 3
_FRAMING = "names, dtypes, shapes and notes with the digest"
_ABSENT = "no such tensor"
FITTING = "contents that fit the file's checksum"
"""What is expected of a file that carries one."""


class Expected(NamedTuple):
    """A file that is to be compared with what is on record of it.

    Attributes:
        file: its number among the files that are read.
        table: its table of contents.
        record: its digests; what has none is not compared.
        names: what is compared: tensors, None for the framing and for what is on record but not there.
        name: what findings call it; "" for its path.
        checksum: its own, which is compared where nothing else differs.
        whole: read all of it, as decrypting it authenticates it.
    """

    file: int
    table: FileIndex
    record: FileDigests
    names: Collection[Optional[str]]
    name: str = ""
    checksum: Optional[StoredChecksum] = None
    whole: bool = False

    def wanted(self, size: int) -> dict[Optional[str], Portion]:
        """What is looked at."""
        listed, there = self.record.tensors, self.table.tensors
        known = (n for n in self.names if (self.record.framing if n is None else n in listed and n in there))
        return portions(self.file, self.table, known, size)

    def more(self, size: int) -> tuple[Extent, ...]:
        """What is read besides."""
        return (Extent(0, size),) if self.whole else () if self.checksum is None else self.checksum.extents

    def findings(self, found: Mapping[Optional[str], str]) -> Iterator[Finding]:
        """What differs, given the digests that were found."""
        listed, there, file = self.record.tensors, self.table.tensors, self.name or self.table.path
        lost = (name for name in listed if name not in there) if None in self.names else ()
        for name in (*self.names, *lost):
            if name is None and name in found and found[name] != self.record.framing:
                yield Finding(file, None, f"{_FRAMING} {found[name]}", f"{_FRAMING} {self.record.framing}")
            elif name is not None and (name not in found or found[name] != listed[name]):
                held = found.get(name, "a tensor of this name" if name in there else _ABSENT)
                at = there[name].extents[0].offset if name in found and there[name].extents else None
                yield Finding(file, name, held, listed.get(name, _ABSENT), at)


def compare_files(
    files: Sequence[Expected],
    readers: ReaderPool,
    workers: int,
    progress: Callable[[int], None] = lambda _: None,
    tolerant: bool = False,
) -> list[list[Finding]]:
    """Compare files with what is on record of each, reading every byte once; by file, what differs.

    Args:
        readers: of the files, by their numbers.
        workers: threads, each with a buffer of 1 MiB.
        progress: is told the bytes read since its last call, from any thread.
        tolerant: a file that cannot be read is a finding, not an error.

    Raises:
        FormatError, DecryptionError, StorageError: a file cannot be read.
    """
    failed: Optional[dict[int, CheckpointError]] = {} if tolerant else None
    wanted: dict[tuple[int, Optional[str]], Portion] = {}
    more: dict[int, tuple[Extent, ...]] = {}
    for each in files:
        size = _plain_size(readers, each, failed)
        if size is not None:
            wanted.update({(each.file, name): portion for name, portion in each.wanted(size).items()})
            more[each.file] = each.more(size)
    sums = {each.file: Sums(each.checksum.parts) for each in files if each.checksum is not None}
    seen = Pass(readers, [*wanted.values()], sums, more).run(workers, progress, failed)
    digests: dict[int, dict[Optional[str], str]] = {each.file: {} for each in files}
    for (file, name), one in zip(wanted, seen):
        digests[file][name] = one.digest
    return [_of_file(each, digests[each.file], sums.get(each.file), (failed or {}).get(each.file)) for each in files]


def _plain_size(readers: ReaderPool, each: Expected, failed: Optional[dict[int, CheckpointError]]) -> Optional[int]:
    """Bytes of a file's plaintext; None when it cannot be opened: the error is put in `failed`, or raised."""
    if each.table.reader == "plain":
        return each.table.size
    try:
        with readers.use(each.file) as reader:
            return reader.size
    except CheckpointError as error:
        if failed is None:
            raise
        failed[each.file] = error
        return None


def _of_file(
    each: Expected, digests: Mapping[Optional[str], str], sums: Optional[Sums], error: Optional[CheckpointError]
) -> list[Finding]:
    name = each.name or each.table.path
    if error is not None:
        return [Finding(name, None, str(error), f"contents as they were {'encrypted' if each.whole else 'written'}")]
    found = [*each.findings(digests)]
    if sums is not None and each.checksum is not None and not found:
        fault = each.checksum.fault(sums.total())
        found += [] if fault is None else [Finding(name, None, fault, FITTING)]
    return found


def settled(catalog: Catalog) -> Catalog:
    """The catalog with one file for every slice, the choices balanced by bytes; the same on all ranks."""
    load = [0] * len(catalog.files)

    def one(placement: Placement, tensor: SourceTensor) -> Placement:
        nbytes = tensor.meta.dtype.nbytes(math.prod(tensor.meta.shape)) // math.prod(placement.parts)
        holders = {}
        for cell, files in placement.holders.items():
            file = min(files, key=lambda number: load[number])
            load[file] += nbytes
            holders[cell] = (file,)
        return placement._replace(holders=holders)

    def narrowed(tensor: SourceTensor) -> SourceTensor:
        return tensor._replace(placements=tuple(one(placement, tensor) for placement in tensor.placements))

    tensors, extras = ({n: t.remade(narrowed) for n, t in group.items()} for group in (catalog.tensors, catalog.extras))
    return catalog._replace(tensors=tensors, extras=extras)


def audit(
    transport: Transport[Any], catalog: Catalog, wanted: Iterable[SourceTensor], sees: Optional[Sees], workers: int
) -> None:
    """Digest what is `wanted`, wherever it is stored, and compare. Collective.

    Args:
        wanted: parameters of the catalog; the same on all ranks.
        workers: threads of this rank.

    Raises:
        ChecksumError: on all ranks; names every rank's first findings with parameter, file and both digests.
        UsageError: a file has no digests on record; PeerError on the ranks that did not look at it.
        FormatError, StorageError: it, or what is on record, cannot be read; PeerError on the others.
    """
    mine = _deal(_pairs(wanted), catalog, sees, transport.size)[transport.rank]
    _require_none(_told(transport, lambda: _found(catalog, mine, workers)))


def audit_alone(catalog: Catalog, wanted: Iterable[SourceTensor], workers: int) -> None:
    """`audit` by one process, which is about to read any of the files that hold what is `wanted`. Raises as that."""
    (mine,) = _deal(_pairs(wanted), catalog, None, 1)
    _require_none(_found(catalog, mine, workers))


def damaged_files(transport: Transport[Any], catalog: Catalog, sees: Optional[Sees], workers: int) -> list[Finding]:
    """What differs in the files of a catalog from what is on record, on all ranks alike. Collective.

    A file without a record passes; a file or a record that cannot be read does not.
    """
    pairs = [(number, name) for number, index in enumerate(catalog.files) for name in (None, *index.tensors)]
    mine = _deal(pairs, catalog, sees, transport.size)[transport.rank]
    return _told(transport, lambda: _found(catalog, mine, workers, tolerant=True))


_FINDING = (str, Maybe(str), str, str, Maybe(NATURAL), Maybe(NATURAL), str, bool)
"""The form of a `Finding`: see `transport.agree.JsonForm`."""


def _told(transport: Transport[Any], look: Callable[[], list[Finding]]) -> list[Finding]:
    told: list[list[Any]] = told_by_all(transport, look, [_FINDING])
    return [Finding(*each)._replace(rank=rank) for rank, found in enumerate(told) for each in found]


def _require_none(found: Sequence[Finding]) -> None:
    if found:
        listed, more = "; ".join(map(str, found[:_NAMED])), len(found) - _NAMED
        raise ChecksumError(
            f"{listed}{f'; and {more} more' if more > 0 else ''}. The files were damaged after their digests were "
            "recorded: restore them or choose another checkpoint. Nothing was loaded"
        )


def _pairs(wanted: Iterable[SourceTensor]) -> list[tuple[int, Optional[str]]]:
    """(file, stored name) of what is wanted; before the tensors of a file, None for its framing."""
    files: dict[int, _Names] = {}
    for file, name in sorted({pair for tensor in wanted for pair in _stored(tensor)}):
        files.setdefault(file, [None]).append(name)
    return [(file, name) for file, names in files.items() for name in names]


def _stored(tensor: SourceTensor) -> Iterator[tuple[int, str]]:
    """(file, stored name) of everything a parameter is made of."""
    for each in tensor.stored():
        for placement in each.placements:
            for files in placement.holders.values():
                for file in files:
                    yield file, each.stored_name


def _deal(
    pairs: Sequence[tuple[int, Optional[str]]], catalog: Catalog, sees: Optional[Sees], world: int
) -> list[dict[int, _Names]]:
    """For every rank: file -> what to digest of it."""
    nbytes = [0 if name is None else catalog.files[file].tensors[name].nbytes for file, name in pairs]
    ranks = deal([Work(file, n) for (file, _), n in zip(pairs, nbytes)], [0] * world, sees)
    shares: list[dict[int, _Names]] = [{} for _ in range(world)]
    for rank, (file, name) in zip(ranks, pairs):
        shares[rank].setdefault(file, []).append(name)
    return shares


def _found(catalog: Catalog, share: Mapping[int, _Names], workers: int, tolerant: bool = False) -> list[Finding]:
    """What differs in a share of the files; with `tolerant`, also what cannot be read."""
    load = cache(load_manifest)  # one may list thousands of files
    found: list[Finding] = []
    files: list[Expected] = []
    for file, names in share.items():
        try:
            expected = _expected(catalog, file, names, load, not tolerant)
        except CheckpointError as error:
            if not tolerant:
                raise
            expected = Finding(catalog.files[file].path, None, str(error), "digests that can be read")
        if isinstance(expected, Finding):
            found.append(expected)
        elif expected is not None:
            files.append(expected)
    with catalog.readers() as readers:
        return found + [each for one in compare_files(files, readers, workers, tolerant=tolerant) for each in one]


def _expected(catalog: Catalog, file: int, names: _Names, load: Load, required: bool) -> Union[Expected, Finding, None]:
    """A file with what is on record about it; or what is wrong with it already; or None if nothing is compared.

    Raises:
        UsageError: digests are `required`, and there are none.
        FormatError, DecryptionError, StorageError: as `recorded_digests`.
    """
    index = catalog.files[file]
    found = recorded_digests(index.path, catalog.access.key, load)
    record = None if found is None else found[2]
    if record is not None and record.size != index.size:
        if index.reader != "plain" or not required:  # sizes are all that is on record in some cases
            return Finding(index.path, None, f"{index.size} bytes", f"{record.size} bytes")
        record = None  # about an older file of that name
    if not required:
        return Expected(file, index, record, names) if record is not None and record.readable else None
    if index.reader in AUTHENTICATED and (record is None or not record.readable):
        return None
    unknown = [name for name in names if name is not None and (record is None or name not in record.tensors)]
    if record is None or (unknown and record.framing is None) or not record.readable:
        what = repr(unknown[0]) if unknown else "names and shapes"
        raise UsageError(
            f"verify='full': no digest of {what} in {index.path!r} ({index.size} bytes) is on record: "
            f"{_why(index, record)}. Record digests when the checkpoint is written, or load without verify='full'"
        )
    return Expected(file, index, record, names)


def _why(index: FileIndex, recorded: Optional[FileDigests]) -> str:
    if recorded is None:
        return f"neither the file's folder nor the one above has a {MANIFEST_NAME} that lists it with this size"
    if recorded.tensors:
        return f"its {MANIFEST_NAME} lists the file, but without this parameter"
    sealed = "" if index.reader == "plain" else f", as it is encrypted ({index.reader}, which is not authenticated)"
    return f"its {MANIFEST_NAME} lists the file without digests{sealed}"

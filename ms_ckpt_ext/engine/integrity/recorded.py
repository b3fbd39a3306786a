"""Stored tensors against the digests on record, by all ranks together, before a Parameter changes.

1. Of a slice that several files hold one file is chosen, and the load reads no other: what is read was checked.
2. The tensors that are wanted, and the framing of their files, are dealt out to the ranks that see them, the largest
   first, each to whoever has the least so far. A tensor is digested once, by one rank, whole: what is on record is a
   digest of the whole.
3. All ranks tell what they found; if anything differs, all of them raise the same error.

This costs one more read of every wanted byte over all ranks together, and its digest; memory is 1 MiB a thread.
An encrypted file without digests on record is left to its authentication, where it has one
(`engine.integrity.authenticate`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Optional

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.core.planning.pieces import Block, Placement, SourceTensor
from ms_ckpt_ext.engine.integrity.digests import digest_tensors, framing_faults
from ms_ckpt_ext.engine.integrity.manifest import (
    MANIFEST_NAME,
    Fault,
    FileDigests,
    Load,
    load_manifest,
    recorded_digests,
)
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import ChecksumError, UsageError
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import AUTHENTICATED, reopen
from ms_ckpt_ext.storage.reader import ByteReader
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.base import Transport

_Names = list[Optional[str]]
"""Tensors of a file; None for its framing."""
_NAMED = 3


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
        recipe = tensor.recipe
        if recipe is not None:
            blocks = tuple(Block(narrowed(b.tensor), b.region, b.axes, b.start) for b in recipe.blocks)
            return tensor._replace(recipe=recipe._replace(blocks=blocks))
        return tensor._replace(placements=tuple(one(placement, tensor) for placement in tensor.placements))

    tensors, extras = ({n: narrowed(t) for n, t in group.items()} for group in (catalog.tensors, catalog.extras))
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
    faults: list[str] = []
    error: Optional[BaseException] = None
    try:
        faults = _faults(catalog, mine, workers)
    except Exception as problem:  # noqa: BLE001 - shared with all ranks before it is raised
        error = problem
    share_status(transport, error)
    told = enumerate(transport.share(json.dumps(faults).encode()))
    _require_none([f"{each} (read by rank {rank})" for rank, found in told if found for each in json.loads(found)])


def audit_alone(catalog: Catalog, wanted: Iterable[SourceTensor], workers: int) -> None:
    """`audit` by one process, which is about to read any of the files that hold what is `wanted`. Raises as that."""
    (mine,) = _deal(_pairs(wanted), catalog, None, 1)
    _require_none(_faults(catalog, mine, workers))


def _require_none(faults: list[str]) -> None:
    if faults:
        listed, more = "; ".join(faults[:_NAMED]), len(faults) - _NAMED
        raise ChecksumError(
            f"{listed}{f'; and {more} more' if more > 0 else ''}. The files were damaged after their digests were "
            "recorded: restore them or choose another checkpoint. Nothing was loaded"
        )


def _pairs(wanted: Iterable[SourceTensor]) -> list[tuple[int, str]]:
    return sorted({pair for tensor in wanted for pair in _stored(tensor)})


def _faults(catalog: Catalog, share: Mapping[int, _Names], workers: int) -> list[str]:
    load = cache(load_manifest)  # one may list thousands of files
    return [str(each) for file, names in share.items() for each in _differences(catalog, file, names, workers, load)]


def _stored(tensor: SourceTensor) -> Iterator[tuple[int, str]]:
    """(file, stored name) of everything a parameter is made of."""
    if tensor.recipe is not None:
        for block in tensor.recipe.blocks:
            yield from _stored(block.tensor)
    for placement in tensor.placements:
        for files in placement.holders.values():
            for file in files:
                yield file, tensor.stored_name


def _deal(
    pairs: Iterable[tuple[int, str]], catalog: Catalog, sees: Optional[Sees], world: int
) -> list[dict[int, _Names]]:
    """For every rank: file -> what to digest of it."""
    sized = sorted(((catalog.files[file].tensors[name].nbytes, file, name) for file, name in pairs), reverse=True)
    load = [0] * world
    held: dict[int, dict[int, int]] = {}
    shares: list[dict[int, _Names]] = [{} for _ in range(world)]
    for nbytes, file, name in sized:
        able = range(world) if sees is None else sorted(sees[file])
        rank = min(able, key=lambda each: load[each])
        load[rank] += nbytes
        shares[rank].setdefault(file, []).append(name)
        mine = held.setdefault(file, {})
        mine[rank] = mine.get(rank, 0) + nbytes
    for file, ranks in held.items():  # of a file, the framing goes to who has most of the tensors
        shares[max(ranks, key=lambda each: ranks[each])][file].append(None)
    return shares


def _differences(catalog: Catalog, file: int, wanted: _Names, workers: int, load: Load = load_manifest) -> list[Fault]:
    index, names = catalog.files[file], [name for name in wanted if name is not None]
    found = recorded_digests(index.path, catalog.access.key, load)
    recorded = None if found is None else found[2]
    if recorded is not None and recorded.size != index.size:
        if index.reader != "plain":  # sizes are all that is on record in some cases, and no file of another is right
            return [Fault(index.path, None, f"{index.size} bytes", f"{recorded.size} bytes")]
        recorded = None  # about an older file of that name
    if index.reader in AUTHENTICATED and (recorded is None or not recorded.readable):
        return []
    unknown = [name for name in names if recorded is None or name not in recorded.tensors]
    if recorded is None or (unknown and recorded.framing is None) or not recorded.readable:
        what = repr(unknown[0]) if unknown else "names and shapes"
        raise UsageError(
            f"verify='full': no digest of {what} in {index.path!r} ({index.size} bytes) is on record: "
            f"{_why(index, recorded)}. Record digests when the checkpoint is written, or load without verify='full'"
        )

    def opener(_path: str) -> ByteReader:
        return reopen(index, catalog.access)

    digests = digest_tensors(index, [name for name in names if name not in unknown], workers, opener)
    faults = [Fault(index.path, name, "a tensor of this name", "none") for name in unknown]
    for name, digest in digests.items():
        if digest != recorded.tensors[name]:
            faults.append(Fault(index.path, name, digest, recorded.tensors[name]))
    return faults + (framing_faults(index.path, index, recorded, opener) if None in wanted else [])


def _why(index: FileIndex, recorded: Optional[FileDigests]) -> str:
    if recorded is None:
        return f"neither the file's folder nor the one above has a {MANIFEST_NAME} that lists it with this size"
    if recorded.tensors:
        return f"its {MANIFEST_NAME} lists the file, but without this parameter"
    sealed = "" if index.reader == "plain" else f", as it is encrypted ({index.reader}, which is not authenticated)"
    return f"its {MANIFEST_NAME} lists the file without digests{sealed}"

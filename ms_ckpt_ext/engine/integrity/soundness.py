"""Is one checkpoint whole and sound? Every stored byte is read once.

1. Every cell of every parameter must be in some file, and every parameter of the strategy in some cell.
2. Every stored slice is digested (`engine.integrity.contents`); files that hold the same cell must have the same
   digest, and so must what several ranks hold outside the strategy. Where pipeline stages cut a parameter differently
   (tied embeddings), what their slices have in common is read again, and compared byte for byte.
3. NaN and infinities in every distinct cell are counted on the way.
4. Slices that should differ must not all be equal (`whole_slices`).
5. Of files that carry a checksum of their own, the rest is read too, and all is summed on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.groups import natural
from ms_ckpt_ext.core.geometry.layout import Cell, cell_region
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, locate
from ms_ckpt_ext.engine.integrity.compare import tallies
from ms_ckpt_ext.engine.integrity.contents import Pass, Portion, Seen
from ms_ckpt_ext.engine.integrity.copies import Overlap, overlaps
from ms_ckpt_ext.engine.integrity.finding import Finding
from ms_ckpt_ext.engine.integrity.pairing import Pair
from ms_ckpt_ext.engine.integrity.recorded import FITTING
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.whole_slices import Gathered, Look, Probe, find_gathered
from ms_ckpt_ext.errors import CoverageError
from ms_ckpt_ext.formats.checksum import StoredChecksum, Sums
from ms_ckpt_ext.formats.index import TensorEntry
from ms_ckpt_ext.formats.registry import stored_checksum


class Gap(NamedTuple):
    """A part of a parameter that no file holds; `ranks` are those whose files should."""

    name: str
    region: str
    ranks: tuple[int, ...]


class Unequal(NamedTuple):
    """Files that should hold the same bytes and do not: `groups` of files that agree, the largest first."""

    name: str
    region: str
    groups: tuple[tuple[str, ...], ...]


class NotFinite(NamedTuple):
    """A parameter with elements that are NaN or infinite."""

    name: str
    nans: int
    infinities: int


@dataclass(frozen=True)
class Health:
    """What was found in one checkpoint.

    Attributes:
        parameters, files: how many there are.
        nbytes: bytes read of slices.
        copies_compared: slices that were compared with another copy of them.
        absent: parameters of the strategy that no file holds.
        gaps: parts of parameters that no file holds.
        unequal: copies that differ: of one slice, or of what several ranks hold outside the strategy.
        outside: names of those that the strategy does not list: frozen parameters, training scalars, states of random
            generators. Nothing says whether they are cut, or each rank's own, or damaged.
        not_finite: parameters with NaN or infinities.
        checksums: files that carry a checksum, which was verified.
        damaged: those of them whose contents do not fit it.
        gathered: slices that should differ and are all equal, as `integrated_save=True` makes them.
    """

    parameters: int
    files: int
    nbytes: int
    copies_compared: int
    absent: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    unequal: tuple[Unequal, ...] = ()
    not_finite: tuple[NotFinite, ...] = ()
    checksums: int = 0
    damaged: tuple[Finding, ...] = ()
    gathered: Optional[Gathered] = None
    outside: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing is missing or damaged and copies, but not slices, are equal. NaN may be intended."""
        return not (self.absent or self.gaps or self.unequal or self.damaged or self.gathered)


class _Slice(NamedTuple):
    """A stored tensor of one file, and the cell of its parameter that it is; `first` of the files that hold it."""

    name: str
    cell: Optional[tuple[int, Cell]]
    file: int
    entry: TensorEntry
    first: bool


def check_values(
    catalog: Catalog,
    tensors: Mapping[str, SourceTensor],
    strategy: Optional[Strategy],
    wanted: Callable[[str], bool],
    workers: int,
    progress: Callable[[int], None] = lambda _: None,
    allow_equal_slices: bool = False,
) -> Health:
    """Read all of a checkpoint and report what is wrong with it.

    Args:
        catalog: the checkpoint.
        tensors: those of its parameters that are to be looked at.
        strategy: of the job that saved it; what it lists must be there.
        wanted: whether a name is to be looked at, for what the checkpoint lacks and what lies outside the strategy.
        workers: threads, each with a buffer of 1 MiB.
        progress: told the bytes read since its last call, from any thread.
        allow_equal_slices: do not check that the slices are slices.

    Raises:
        FormatError, StorageError: a file cannot be read.
    """
    slices = [*_slices(catalog, tensors), *_outside(catalog, wanted)]
    checksums = _checksums(catalog, slices)
    sums = {file: Sums(stored.parts) for file, stored in checksums.items()}
    with catalog.readers() as readers:
        covered = {file: stored.extents for file, stored in checksums.items()}
        portions = [Portion(s.file, s.entry.extents, s.entry.dtype, s.first) for s in slices]
        seen = Pass(readers, portions, sums, covered).run(workers, progress)
        readers.verify()
    unequal, compared = _compared(catalog, tensors, slices, seen)
    meeting = _meeting(tensors)
    unequal += _unlike(catalog, meeting, workers, progress)
    return Health(
        parameters=len({s.name for s in slices}),
        files=len(catalog.files),
        nbytes=sum(s.entry.nbytes for s in slices),
        copies_compared=compared + len({(n, files[0]) for n, both in meeting for files in both.files if not files[1:]}),
        absent=_absent(slices, strategy, wanted),
        gaps=tuple(_gaps(tensors)),
        unequal=tuple(unequal),
        not_finite=tuple(_not_finite(slices, seen)),
        checksums=len(checksums),
        damaged=tuple(_damaged(catalog, checksums, sums)),
        gathered=None if allow_equal_slices else _gathered(catalog, tensors, _Known(catalog, slices, seen)),
        outside=tuple(each.name for each in unequal if each.name not in tensors),
    )


def _absent(slices: Sequence[_Slice], strategy: Optional[Strategy], wanted: Callable[[str], bool]) -> tuple[str, ...]:
    """Parameters of the strategy that no file holds; accumulated gradients need not be there."""
    held = {s.name for s in slices}
    listed = (name for name in (strategy.layouts if strategy else ()) if name not in held and wanted(name))
    return tuple(sorted(name for name in listed if not name.startswith(ACCUMULATED_GRADIENT_PREFIX)))


class _Known:
    """Answers for stretches of slices by what is known of whole slices: they count as equal where the wholes are."""

    def __init__(self, catalog: Catalog, slices: Sequence[_Slice], seen: Sequence[Seen]) -> None:
        self._files = catalog.files
        self._seen = {(s.file, s.entry.extents): each for s, each in zip(slices, seen)}

    def __call__(self, probes: Sequence[Probe]) -> list[Seen]:
        return [self._seen[p.file, self._files[p.file].tensors[p.name].extents] for p in probes]


def _gathered(catalog: Catalog, tensors: Mapping[str, SourceTensor], look: Look) -> Optional[Gathered]:
    found = find_gathered(catalog, tensors, look)
    return None if found is None or found.constant else found


def bytes_to_read(catalog: Catalog, tensors: Mapping[str, SourceTensor], wanted: Callable[[str], bool]) -> int:
    """How much `check_values` reads."""
    slices = [*_slices(catalog, tensors), *_outside(catalog, wanted)]
    overlapping = sum(_pair(name, both).nbytes for name, both in _meeting(tensors))
    whole = _checksums(catalog, slices)
    rest = sum(s.entry.nbytes for s in slices if s.file not in whole)
    return rest + overlapping + sum(catalog.files[file].size for file in whole)


def _checksums(catalog: Catalog, slices: Sequence[_Slice]) -> dict[int, StoredChecksum]:
    """The checksums of files that hold a slice, or no tensor at all."""
    looked_at = {item.file for item in slices}
    stored = {
        number: stored_checksum(index)
        for number, index in enumerate(catalog.files)
        if number in looked_at or not index.tensors
    }
    return {number: each for number, each in stored.items() if each is not None}


def _damaged(catalog: Catalog, checksums: Mapping[int, StoredChecksum], sums: Mapping[int, Sums]) -> Iterator[Finding]:
    for file, stored in checksums.items():
        fault = stored.fault(sums[file].total())
        if fault is not None:
            yield Finding(catalog.files[file].path, None, fault, FITTING)


def _slices(catalog: Catalog, tensors: Mapping[str, SourceTensor]) -> Iterator[_Slice]:
    for name, tensor in tensors.items():
        for number, placement in enumerate(tensor.placements):
            for cell, files in placement.holders.items():
                for file in files:
                    entry = catalog.files[file].tensors[tensor.stored_name]
                    yield _Slice(name, (number, cell), file, entry, file == files[0])


def _outside(catalog: Catalog, wanted: Callable[[str], bool]) -> Iterator[_Slice]:
    """What lies outside the strategy, in every file that has it."""
    for name in filter(wanted, sorted({**catalog.extras, **catalog.unproven, **catalog.own})):
        files = [number for number, index in enumerate(catalog.files) if name in index.tensors]
        for file in files:
            yield _Slice(name, None, file, catalog.files[file].tensors[name], file == files[0])


def _gaps(tensors: Mapping[str, SourceTensor]) -> Iterator[Gap]:
    for name, tensor in tensors.items():
        if not all(tensor.meta.shape):
            continue
        try:
            locate(tensor, Region.whole(tensor.meta.shape))
        except CoverageError:
            yield from _missing(name, tensor)


def _missing(name: str, tensor: SourceTensor) -> Iterator[Gap]:
    """Cells that the first placement lacks, and no other makes up for."""
    for placement in tensor.placements[:1]:
        for cell, ranks in sorted(placement.expected.items()):
            region = cell_region(cell, placement.parts, tensor.meta.shape)
            try:
                locate(tensor, region)
            except CoverageError:
                yield Gap(name, str(region), ranks)


def _compared(
    catalog: Catalog, tensors: Mapping[str, SourceTensor], slices: Sequence[_Slice], seen: Sequence[Seen]
) -> tuple[list[Unequal], int]:
    """(copies that differ, how many were compared)."""
    copies: dict[tuple[str, Optional[tuple[int, Cell]]], dict[tuple[object, ...], list[int]]] = {}
    for number, item in enumerate(slices):
        held = item.entry.dtype, item.entry.shape, seen[number].digest
        copies.setdefault((item.name, item.cell), {}).setdefault(held, []).append(item.file)
    unequal, compared = [], 0
    for (name, cell), groups in copies.items():
        holders = sum(map(len, groups.values()))
        compared += holders if holders > 1 else 0
        if len(groups) > 1:
            files = sorted(groups.values(), key=lambda numbers: (-len(numbers), numbers))
            paths = tuple(tuple(catalog.files[number].path for number in group) for group in files)
            unequal.append(Unequal(name, _region(tensors[name], *cell) if cell else "whole", paths))
    return unequal, compared


def _meeting(tensors: Mapping[str, SourceTensor]) -> list[tuple[str, Overlap]]:
    """Where slices of different cuts have something in common."""
    return [(name, both) for name, tensor in tensors.items() for both in overlaps(tensor)]


def _pair(name: str, both: Overlap) -> Pair:
    return Pair(name, both.one, both.other, (both.region,))


def _unlike(
    catalog: Catalog, meeting: Sequence[tuple[str, Overlap]], workers: int, progress: Callable[[int], None]
) -> Iterator[Unequal]:
    """Where such slices differ."""
    pairs = [_pair(name, both) for name, both in meeting]
    for number in sorted(tallies(pairs, catalog, catalog, workers, progress=progress)):
        name, both = meeting[number]
        groups = tuple(tuple(catalog.files[file].path for file in files) for files in both.files)
        yield Unequal(name, str(both.region), groups)


def _region(tensor: SourceTensor, number: int, cell: Cell) -> str:
    placement: Placement = tensor.placements[number]
    return str(cell_region(cell, placement.parts, tensor.meta.shape)) if math.prod(tensor.meta.shape) else "empty"


def _not_finite(slices: Sequence[_Slice], seen: Sequence[Seen]) -> Iterator[NotFinite]:
    counts: dict[str, tuple[int, int]] = {}
    for number, item in enumerate(slices):
        nans, infinities = counts.get(item.name, (0, 0))
        counts[item.name] = (nans + seen[number].nans, infinities + seen[number].infinities)
    for name, (nans, infinities) in sorted(counts.items(), key=lambda item: natural(item[0])):
        if nans or infinities:
            yield NotFinite(name, nans, infinities)

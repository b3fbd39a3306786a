"""Are slices really slices? With `integrated_save=True`, MindSpore's default, every rank's file holds whole parameters.

The strategy is the same in either case, so a merge would put whole parameters side by side. Only the bytes show it:
slices that should be different boxes of a parameter are equal, for all parameters that are cut.

1. Of every cut parameter the beginnings of two slices are compared, the smallest first, in batches that grow. The first
   that differ prove slices: an ordinary checkpoint costs two small reads.
2. Where none differ, all slices are compared: whole, as long as their sum is small, else in samples.
3. Slices of which every element is the same, such as the zeros of a fresh optimizer, prove nothing. Where there are no
   others, a warning says so and nothing is refused.

Where only the cuts of the optimizer shard are gathered (`optimizer_weight_shard_aggregated_save`), it is the slices of
one optimizer shard group that are equal. They are looked at first: where they differ, nothing was gathered.

A comparison asks for stretches of stored tensors (`Probe`) and gets the digest of each. How it is answered (`Look`) is
left to the caller: by one process, or by ranks each of which reads a part of what it sees (`engine.unlisted.dealt`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Callable, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import ranges
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.integrity.contents import Pass, Portion, Seen
from ms_ckpt_ext.engine.source.catalog import Catalog, read_listing
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.registry import PLAIN, Access
from ms_ckpt_ext.storage.reader import ReadCount

PROBE_BYTES = 4096
"""Bytes of two slices that are compared before anything else."""
WHOLE_BYTES = 256 << 20
"""Slices with equal beginnings are compared whole up to this many bytes in sum, the smallest first."""
_SAMPLES, _MOST_ROWS, _NAMED = 8, 1024, 3
_MEANT = "If these slices are equal on purpose, say so with allow_equal_slices=True (--allow-equal-slices)"
_REMEDY = (
    "The files were saved with integrated_save=True, MindSpore's default, so each holds whole parameters, which would "
    "be put side by side. Save with integrated_save=False; or take one rank's file, such as {0!r}, for the whole "
    f"model, without a strategy. {_MEANT}"
)
_SHARDS_REMEDY = (
    "The files were saved with the optimizer's shards gathered (optimizer_weight_shard_aggregated_save=True), which "
    "would be put side by side. Save without that, or give layouts that have no optimizer shard. "
    f"{_MEANT}"
)


class Probe(NamedTuple):
    """Bytes `start .. start + length` of the contents of the tensor that file number `file` stores as `name`.

    `start` is a multiple of 16, the widest element.
    """

    file: int
    name: str
    start: int
    length: int


Look = Callable[[Sequence[Probe]], list[Seen]]
"""Answers probes, in order. Raises FormatError or StorageError when a file cannot be read."""


class Alone:
    """A `Look` of this process. `count` is what was read; each of its `workers` takes a buffer of 1 MiB."""

    def __init__(self, catalog: Catalog, workers: int = 8) -> None:
        self._catalog, self._workers = catalog, workers
        self.count = ReadCount()

    def __call__(self, probes: Sequence[Probe]) -> list[Seen]:
        with self._catalog.readers() as readers:
            seen = Pass(readers, [self._portion(probe) for probe in probes]).run(self._workers)
            readers.verify()
        self.count.add(readers.count)
        return seen

    def _portion(self, probe: Probe) -> Portion:
        entry = self._catalog.files[probe.file].tensors[probe.name]
        return Portion(probe.file, tuple(ranges(entry.extents, probe.start, probe.length)), entry.dtype)


class Gathered(NamedTuple):
    """Slices that should be different boxes of a parameter but are equal, for all parameters that are cut.

    Attributes:
        names: the parameters, beginning with one that shows it.
        files: two files that hold equal slices of the first.
        shards: only slices that an optimizer shard alone separates are equal; else those of all cuts.
        constant: every element of each slice is the same, so nothing follows.
    """

    names: tuple[str, ...]
    files: tuple[str, str]
    shards: bool
    constant: bool

    def __str__(self) -> str:
        cuts = "every slice of an optimizer shard" if self.shards else "every slice"
        more = f" and {len(self.names) - _NAMED} more" if len(self.names) > _NAMED else ""
        listed = ", ".join(map(repr, self.names[:_NAMED])) + more
        count = f"the {len(self.names)} parameters that" if len(self.names) > 1 else "the one parameter that"
        return (
            f"{cuts} of {count} the strategy cuts ({listed}) holds the same bytes, in {self.files[0]!r} as in "
            f"{self.files[1]!r}"
        )


class _Group(NamedTuple):
    """Slices of one parameter that should be different boxes: `files` hold one each, of `nbytes` bytes."""

    name: str
    stored_name: str
    nbytes: int
    files: tuple[int, ...]


class _Row(NamedTuple):
    """The same stretch of several slices of a group."""

    group: _Group
    probes: tuple[Probe, ...]


def read_slices(
    listing: Listing, strategy: Optional[Strategy], access: Access = PLAIN, allow_equal_slices: bool = False
) -> Catalog:
    """A checkpoint from its listing, checked to hold real slices; warns of copies that differ (`tied`).

    Raises as `read_listing` and `refuse_gathered`.
    """
    catalog = read_listing(listing, strategy, access)
    refuse_gathered(catalog, Alone(catalog), allow_equal_slices)
    if any(len(tensor.placements) > 1 for tensor in catalog.tensors.values()):
        from ms_ckpt_ext.engine.unlisted.tied import warn_unlike

        warn_unlike(catalog, Alone(catalog))
    return catalog


def refuse_gathered(catalog: Catalog, look: Look, allowed: bool = False) -> None:
    """Raise LayoutMismatchError where the files hold whole parameters instead of slices, unless that is `allowed`.

    `catalog` is that of the files, before rules and name maps. Raises FormatError or StorageError as `look` does.
    """
    found = None if allowed else find_gathered(catalog, catalog.tensors, look)
    if found is None:
        return
    if not found.constant:
        raise LayoutMismatchError(f"{found}. {_SHARDS_REMEDY if found.shards else _REMEDY.format(*found.files)}")
    log.warning("%s, each one value throughout: nothing tells whether the files hold slices or whole parameters", found)


def find_gathered(catalog: Catalog, tensors: Mapping[str, SourceTensor], look: Look) -> Optional[Gathered]:
    """Which of these parameters were gathered into every file; None where slices are real, or nothing is cut.

    The same inputs make the same probes, so `look` may be collective.
    """
    if catalog.strategy is None:
        return None
    shards = _shard_groups(catalog, tensors, catalog.strategy)
    gathered = _equal(catalog, shards, look, True)
    if shards and gathered is None:
        return None  # slices that differ within a shard group were not gathered at all
    every = _equal(catalog, _groups(catalog, tensors), look, False)
    return gathered if gathered and not gathered.constant and (every is None or every.constant) else every


def _equal(catalog: Catalog, groups: Sequence[_Group], look: Look, shards: bool) -> Optional[Gathered]:
    """Whether the slices of every group are equal; None where some differ, or there are no groups."""
    shown: Optional[_Group] = None
    for rows in (_heads(groups), _contents(groups)):
        for batch in _growing(rows):
            answers = iter(look([probe for row in batch for probe in row.probes]))
            for row in batch:
                first, *others = (next(answers) for _ in row.probes)
                if any(other.digest != first.digest for other in others):
                    return None
                shown = shown or (None if first.constant else row.group)
    if not groups:
        return None
    told = shown or groups[0]
    names = tuple(dict.fromkeys(group.name for group in groups))
    files = catalog.files[told.files[0]].path, catalog.files[told.files[-1]].path
    return Gathered((told.name, *(name for name in names if name != told.name)), files, shards, shown is None)


def _heads(groups: Sequence[_Group]) -> Iterator[_Row]:
    """The beginnings of two slices of every parameter."""
    firsts: dict[str, _Group] = {}
    for group in groups:
        firsts.setdefault(group.name, group)
    for group in firsts.values():
        ends = group.files[0], group.files[-1]
        length = min(PROBE_BYTES, group.nbytes)
        yield _Row(group, tuple(Probe(file, group.stored_name, 0, length) for file in ends))


def _contents(groups: Sequence[_Group]) -> Iterator[_Row]:
    """All of every slice, then, once the sum would be too large, samples of the others."""
    left = WHOLE_BYTES
    for group in groups:
        left -= group.nbytes * len(group.files)
        for start, length in ((0, group.nbytes),) if left >= 0 else _samples(group.nbytes):
            yield _Row(group, tuple(Probe(file, group.stored_name, start, length) for file in group.files))


def _samples(nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of evenly spread stretches, the last one at the end."""
    last = max(0, nbytes - PROBE_BYTES)
    for number in range(_SAMPLES):
        start = last * number // (_SAMPLES - 1) // 16 * 16
        yield start, min(PROBE_BYTES, nbytes - start)


def _growing(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Batches of one row, two, four, …: the first few often suffice, and a batch is one round trip between ranks."""
    most = 1
    while batch := list(islice(rows, most)):
        yield batch
        most = min(2 * most, _MOST_ROWS)


def _groups(catalog: Catalog, tensors: Mapping[str, SourceTensor]) -> list[_Group]:
    """Every parameter that is cut, with a file for each slice present; the smallest first."""
    found = [
        _group(catalog, tensor, [placement.holders[cell][0] for cell in sorted(placement.holders)])
        for tensor in tensors.values()
        for placement in tensor.placements
    ]
    return _sorted(found)


def _shard_groups(catalog: Catalog, tensors: Mapping[str, SourceTensor], strategy: Strategy) -> list[_Group]:
    """The slices that only an optimizer shard separates."""
    found = []
    for name, tensor in tensors.items():
        ways = {(layout.parts, layout.shards) for layout in strategy.layouts.get(name, {}).values()}
        for placement in tensor.placements:
            shards = [count for parts, count in ways if parts == placement.parts]
            if len(shards) == 1 and shards[0] > 1:
                by_box: dict[Cell, list[int]] = {}
                for cell in sorted(placement.holders):
                    by_box.setdefault((cell[0] // shards[0], *cell[1:]), []).append(placement.holders[cell][0])
                found += [_group(catalog, tensor, files) for files in by_box.values()]
    return _sorted(found)


def _group(catalog: Catalog, tensor: SourceTensor, files: Sequence[int]) -> _Group:
    nbytes = catalog.files[files[0]].tensors[tensor.stored_name].nbytes if files else 0
    return _Group(tensor.meta.name, tensor.stored_name, nbytes, tuple(files))


def _sorted(groups: Sequence[_Group]) -> list[_Group]:
    return sorted(
        (group for group in groups if group.nbytes and len(group.files) > 1), key=lambda g: (g.nbytes, g.name)
    )

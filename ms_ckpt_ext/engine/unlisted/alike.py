"""Do the ranks hold the same of what no strategy lists? Compared at a cost that does not grow with their number.

1. Where digests of every copy are on record, these are compared, for all ranks; no contents are read.
2. Else small tensors, up to `SMALL` bytes, are read from all ranks' files.
3. Of larger ones, `SAMPLES` samples of `SAMPLE` bytes are read, spread from end to end, from the files of a few ranks
   that stand for all (`core.geometry.neighbours`): they differ if the tensor is cut, whatever it is cut along.
4. Where the samples are equal, those of the ranks that differ on an axis the strategy knows are read whole.

So a tensor of n bytes costs at most n for each pipeline stage that has it and for each device axis, and 64 KiB for each
other divisor of a stage's device count. What differs only between ranks that are not looked at is not found this way:
`Depth.ALL`, which `verify` uses, looks at every byte of every copy.

Who reads is an argument: one process alone (`whole_slices.Alone`), or all ranks of a job, which share the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache, lru_cache, partial
from typing import Callable, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.neighbours import Axis, Representatives, axes_of, representatives
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, load_manifest, recorded_digests
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import Group, UnlistedTensor, alike
from ms_ckpt_ext.engine.unlisted.whole_slices import Alone, Look, Probe
from ms_ckpt_ext.errors import FormatError, StorageError

SMALL = 4096
"""Bytes up to which a tensor is read from all ranks' files: scalars, states of random generators, cursors."""
SAMPLES, SAMPLE = 16, 4096
"""How many samples of a larger tensor are compared before the whole of it, and the bytes of each."""


class Depth(Enum):
    """How much is compared: steps 1 to 3, steps 1 to 4, or every byte of every copy, whatever is on record."""

    SAMPLES = 1
    STANDING = 2
    ALL = 3


OnRecord = Callable[[Sequence[int]], Mapping[int, Mapping[str, str]]]
"""Numbers of files -> for those that are on record, name in the file -> digest."""
Copies = dict[tuple[str, int], tuple[Probe, ...]]
"""(name in the catalog, rank) -> the stretches of that copy that are looked at."""


def compared(
    catalog: Catalog,
    names: Optional[Iterable[str]] = None,
    look: Optional[Look] = None,
    on_record: Optional[OnRecord] = None,
    depth: Depth = Depth.STANDING,
) -> Catalog:
    """The catalog with `unproven` tensors moved to its `extras` where they are alike, and to `own` where they differ.

    Args:
        names: which to compare; None for all. Others stay unproven.
        look: reads and digests; by default this process, alone.
        on_record: finds digests on record; by default this process, unless `look` is given.
        depth: how much is looked at.

    Raises:
        FormatError, StorageError: a file cannot be read.
    """
    wanted = set(catalog.unproven) if names is None else catalog.unproven.keys() & set(names)
    todo = [held for name, held in catalog.unproven.items() if name in wanted]
    if not todo:
        return catalog
    alone = Alone(catalog)
    if on_record is None:
        on_record = partial(recorded, catalog) if look is None and depth is not Depth.ALL else _nothing
    groups = _groups(catalog, todo, look or alone, on_record, depth)
    if alone.count.reads:
        told = len(todo), alone.count.nbytes, alone.count.reads
        log.info("compared %d tensors outside the strategy: %d bytes in %d reads", *told)
    same = {held.name: alike(held, catalog.files) for held in todo if len(groups[held.name]) == 1}
    own = {held.name: held._replace(groups=groups[held.name]) for held in todo if held.name not in same}
    return catalog._replace(
        extras=dict(sorted({**catalog.extras, **same}.items())),
        own=dict(sorted({**catalog.own, **own}.items())),
        unproven={name: held for name, held in catalog.unproven.items() if name not in wanted},
    )


def _nothing(_files: Sequence[int]) -> Mapping[int, Mapping[str, str]]:
    return {}


def _groups(
    catalog: Catalog, todo: Sequence[UnlistedTensor], look: Look, on_record: OnRecord, depth: Depth
) -> dict[str, tuple[Group, ...]]:
    """By name, the ranks that were looked at, in groups that hold the same."""
    found = _by_records(todo, on_record(sorted({file for held in todo for file in held.files.values()})))
    left = [held for held in todo if held.name not in found]
    standing = _Standing(catalog, depth)
    found.update(_seen({copy: probes for held in left for copy, probes in standing.first(held).items()}, look))
    alike_so_far = [held for held in left if len(found[held.name]) == 1]
    found.update(_seen({copy: probes for held in alike_so_far for copy, probes in standing.second(held).items()}, look))
    return found


class _Standing:
    """Which ranks' copies are looked at, and where."""

    def __init__(self, catalog: Catalog, depth: Depth) -> None:
        self._depth = depth
        self._files = catalog.files
        strategy = catalog.strategy
        self._devices = strategy.devices_per_stage if strategy else 1
        self._axes: tuple[Axis, ...] = axes_of(strategy.layouts) if strategy else ()
        self._known: dict[tuple[int, ...], Representatives] = {}

    def _of(self, held: UnlistedTensor) -> Representatives:
        ranks = tuple(held.files)
        if ranks not in self._known:
            self._known[ranks] = representatives(ranks, self._devices, self._axes)
        return self._known[ranks]

    def first(self, held: UnlistedTensor) -> Copies:
        """All copies of a small tensor, or samples of some of a larger one."""
        nbytes = self._nbytes(held)
        if nbytes <= SMALL or self._depth is Depth.ALL:
            return _copies(held, held.files, (Extent(0, nbytes),))
        stand = self._of(held)
        return _copies(held, sorted((*stand.whole, *stand.sampled)), samples(nbytes))

    def second(self, held: UnlistedTensor) -> Copies:
        """The whole of some copies, unless the first look saw all of it."""
        nbytes = self._nbytes(held)
        whole = (Extent(0, nbytes),)
        seen = nbytes <= SMALL or samples(nbytes) == whole
        return {} if seen or self._depth is not Depth.STANDING else _copies(held, self._of(held).whole, whole)

    def _nbytes(self, held: UnlistedTensor) -> int:
        return held.entry(self._files, next(iter(held.files))).nbytes


def _copies(held: UnlistedTensor, ranks: Iterable[int], stretches: Sequence[Extent]) -> Copies:
    return {
        (held.name, rank): tuple(Probe(held.files[rank], held.stored_name, *s) for s in stretches) for rank in ranks
    }


@lru_cache(maxsize=4096)
def samples(nbytes: int) -> tuple[Extent, ...]:
    """Stretches spread evenly over so many bytes, from the first to the last of them.

    >>> [extent.offset for extent in samples(16 * 4096 * 3)][:3], samples(100)
    ([0, 12832, 25664], (Extent(offset=0, length=100),))
    """
    if nbytes <= SAMPLES * SAMPLE:
        return (Extent(0, nbytes),)
    starts = [(nbytes - SAMPLE) * number // (SAMPLES - 1) // 16 * 16 for number in range(SAMPLES)]
    return (*(Extent(start, SAMPLE) for start in starts[:-1]), Extent(starts[-1], nbytes - starts[-1]))


def _by_records(
    todo: Sequence[UnlistedTensor], recorded: Mapping[int, Mapping[str, str]]
) -> dict[str, tuple[Group, ...]]:
    """For names of which every copy has a digest on record: the ranks, grouped by digest."""
    found: dict[str, tuple[Group, ...]] = {}
    for held in todo:
        ranks: dict[str, list[int]] = {}
        for rank, file in held.files.items():
            digest = recorded.get(file, {}).get(held.stored_name)
            if digest is not None:
                ranks.setdefault(digest, []).append(rank)
        if sum(map(len, ranks.values())) == len(held.files):
            found[held.name] = tuple(Group(f"contents of digest {d}", tuple(r)) for d, r in ranks.items())
    return found


def _seen(copies: Copies, look: Look) -> dict[str, tuple[Group, ...]]:
    """By name, the ranks whose copies were looked at, in groups with equal digests."""
    if not copies:
        return {}
    told = iter(look([probe for probes in copies.values() for probe in probes]))
    ranks: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for (name, rank), probes in copies.items():
        ranks.setdefault(name, {}).setdefault(tuple(next(told).digest for _ in probes), []).append(rank)
    return {name: tuple(_in_groups(name, groups, copies)) for name, groups in ranks.items()}


def _in_groups(name: str, ranks: Mapping[tuple[str, ...], Sequence[int]], copies: Copies) -> Iterator[Group]:
    """The groups, each with the place of the first difference in words."""
    at = next((number for number, seen in enumerate(zip(*ranks)) if len(set(seen)) > 1), 0)
    for digests, which in ranks.items():
        _, _, start, length = copies[name, which[0]][at]
        yield Group(f"contents {digests[at][:8]}… in bytes {start} to {start + length}", tuple(which))


def recorded(catalog: Catalog, files: Sequence[int]) -> dict[int, Mapping[str, str]]:
    """Numbers of files -> name in the file -> digest on record, for files that have not changed since."""
    load = cache(load_manifest)
    found: dict[int, Mapping[str, str]] = {}
    for file in files:
        index = catalog.files[file]
        try:
            record = recorded_digests(index.path, catalog.access.key, load)
            if record is None or record[2].size != index.size or not record[2].tensors:
                continue
            if os.stat(os.path.join(record[0], MANIFEST_NAME)).st_mtime_ns >= index.mtime_ns:
                found[file] = record[2].tensors
        except (FormatError, StorageError, OSError):  # a record that cannot be read counts as none
            continue
    return found

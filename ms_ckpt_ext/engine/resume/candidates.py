"""Which checkpoints a training job left in a directory, from what all hosts see, and whether they agree with records.

Looked for in the directory and in the folders of its first level:

    rank_N/PREFIX-EPOCH_STEP.ckpt, rank_N/net.safetensors, …    one for every name that the rank folders share
    PREFIX-EPOCH_STEP.ckpt, PREFIX_rank_N-EPOCH_STEP.ckpt, …    ranks in one folder, or one process
    *.safetensors with a map or an index, or all parts of one   a model of whole parameters
    iteration_N/*.safetensors with common.json, metadata.json   MindFormers' own, which includes its layouts

The names are read as `formats.discovery.saves` and `formats.discovery.whole_models` do for every load; files whose
names do not form a model are a candidate with the reason. `engine.resume.trial_order` puts them in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.resume.records import Record, home_name
from ms_ckpt_ext.engine.resume.sightings import CheckpointFolder, Noted, Sight
from ms_ckpt_ext.engine.source.listing import Listing, list_checkpoint
from ms_ckpt_ext.errors import DiscoveryError, name_ranks
from ms_ckpt_ext.formats.discovery.rank_folders import RANK_FOLDER
from ms_ckpt_ext.formats.discovery.saves import grouped
from ms_ckpt_ext.formats.discovery.whole_models import loose

_MERGED = "merged"


class SizedFile(NamedTuple):
    """A file of a checkpoint: relative to its folder, and its size in bytes."""

    file: str
    size: int


@dataclass(frozen=True)
class Candidate:
    """Files that look like one checkpoint.

    Attributes:
        folder: relative to the directory that was looked at; "" for itself.
        name: what the ranks' file names share, or `_MERGED`.
        files: number of the rank, or of the part of one model -> file; empty where a map lists them.
        modified: latest modification time, in seconds since 1970.
        records: what was recorded about it.
        trouble: why it cannot be used, judged by names alone; "" if nothing speaks against it.
        parts: the numbers are those of parts.
        alike: for one without records: a recorded one of the same series, with files of the same sizes rank by rank,
            so that what was recorded about the job holds here, too; None where there is none.
        unlike: why the layouts of another save of the series may not be its own; "" where nothing says so.
    """

    folder: str
    name: str
    files: Mapping[int, SizedFile]
    modified: float
    records: tuple[Record, ...] = ()
    trouble: str = ""
    parts: bool = False
    alike: Optional[Candidate] = None
    unlike: str = ""

    @property
    def title(self) -> str:
        """Its path relative to the directory; for a sharded one, with the name that its ranks' files have in common."""
        return "/".join(filter(None, (self.folder, "" if self.merged else self.name))) or "."

    @property
    def merged(self) -> bool:
        """Whether it is whole parameters in a few files that a map lists."""
        return self.name == _MERGED

    @property
    def job(self) -> tuple[Record, ...]:
        """Records of the job that saved it."""
        return self.records or (self.alike.records if self.alike else ())

    @property
    def whole(self) -> bool:
        """Whether every file holds whole parameters only."""
        return self.merged or self.parts or (bool(self.job) and not self.job[0].sharded)

    def place(self, directory: str) -> str:
        """Its folder on this host; `directory` as in `listing`."""
        base = os.path.dirname(directory) or os.curdir if os.path.isfile(directory) else directory
        return os.path.join(base, self.folder) if self.folder else base

    def homes(self) -> list[str]:
        """Names under which records of the job lie in its folder."""
        files = self.files if self.records or self.alike is None else self.alike.files
        return list(dict.fromkeys(home_name(held.file, rank) for rank, held in files.items()))

    def listing(self, directory: str, files: Mapping[int, SizedFile], kind: Optional[str]) -> Listing:
        """Its files as this host sees them.

        Args:
            directory: what was looked at, on this host; or the file that was named.
            files: which of its files count, see `check_ranks`.
            kind: the wanted format of a map's files.

        Raises:
            see `list_checkpoint`.
        """
        if self.merged:
            return list_checkpoint(os.path.join(directory, self.folder) if self.folder else directory, None, kind=kind)
        folder = self.place(directory)
        paths = {number: os.path.join(folder, *held.file.split("/")) for number, held in files.items()}
        there = {number: path for number, path in paths.items() if os.path.exists(path)}
        if self.parts:
            return Listing({os.path.basename(path): path for path in there.values()}, False, None)
        return Listing({str(rank): path for rank, path in there.items()}, True, None)


def candidates(seen: Iterable[Iterable[CheckpointFolder]]) -> list[Candidate]:
    """The checkpoints among what several hosts see, in no special order. A file of two sizes is `trouble`."""
    folders: dict[str, list[CheckpointFolder]] = {}
    for places in seen:
        for place in places:
            folders.setdefault(place.folder, []).append(place)
    return [candidate for places in folders.values() for candidate in _in_folder(places)]


def _in_folder(places: list[CheckpointFolder]) -> Iterator[Candidate]:
    folder, files = places[0].folder, {sight.file: sight for place in places for sight in place.files}
    torn = {sight.file for place in places for sight in place.files if files[sight.file].size != sight.size}
    in_ranks = [file for file in files if "/" in file]
    mapped = next((place for place in places if place.mapped), None)
    if mapped is not None:
        trouble = next((place.complaint for place in places if place.complaint), "")
        yield Candidate(folder, _MERGED, {}, max(place.modified for place in places), (), trouble)
        if not in_ranks:
            return  # the files beside the map are its parts
    noted = _together(places)
    alone = [file for file in files if "/" not in file]
    if places[0].named:
        found = [Candidate(folder, file, {0: SizedFile(file, 0)}, 0.0) for file in alone]
    else:
        found = [*_by_ranks(folder, in_ranks), *(_flat(folder, alone, bool(in_ranks)) if mapped is None else ())]
    yield from (_noted(_measured(candidate, files, torn), noted) for candidate in found)


def _by_ranks(folder: str, files: Iterable[str]) -> Iterator[Candidate]:
    """The saves in rank folders."""
    paths: dict[tuple[int, str], str] = {}
    doubled: dict[str, str] = {}
    for file in sorted(files):
        owner, name = file.split("/")
        match = RANK_FOLDER.match(owner)
        rank = int(match[1]) if match else 0
        before = paths.setdefault((rank, name), file)
        if before != file:
            doubled[name] = f"{before!r} and {file!r} are both of rank {rank}: move the one that is not meant away"
    names: dict[int, list[str]] = {}
    for rank, name in paths:
        names.setdefault(rank, []).append(name)
    for shared, group in grouped(names).items():
        held = {rank: SizedFile(paths[rank, name], 0) for rank, name in group.items()}
        trouble = next((doubled[name] for name in group.values() if name in doubled), "")
        yield Candidate(folder, shared, held, 0.0, trouble=trouble)


def _flat(folder: str, files: Iterable[str], beside: bool) -> Iterator[Candidate]:
    """The saves in one folder without a map, `beside` rank folders or not."""
    for name, found in loose(files).items():
        held = {number: SizedFile(file, 0) for number, file in found.files.items()}
        title = f"./{name}" if beside else name
        yield Candidate(folder, title, held, 0.0, trouble=found.fault, parts=found.parts)


def _measured(found: Candidate, seen: Mapping[str, Sight], torn: set[str]) -> Candidate:
    """The candidate with sizes and times; a file that differs between hosts is `trouble`."""
    sights = {number: seen[held.file] for number, held in found.files.items()}
    differ = [number for number, sight in sights.items() if sight.file in torn]
    trouble = f"hosts hold different files of {name_ranks(differ)}" if differ else ""
    return replace(
        found,
        files={number: SizedFile(sight.file, sight.size) for number, sight in sights.items()},
        modified=max(sight.modified for sight in sights.values()),
        trouble=found.trouble or trouble,
    )


def _together(places: Iterable[CheckpointFolder]) -> dict[str, Noted]:
    """All hosts' records of every save."""
    found: dict[str, Noted] = {}
    for place in places:
        for name, noted in place.noted.items():
            before = found.get(name, Noted((), ""))
            records = {record.rank: record for record in (*before.records, *noted.records)}
            found[name] = Noted(tuple(records[rank] for rank in sorted(records)), before.trouble or noted.trouble)
    return found


def _noted(found: Candidate, noted: Mapping[str, Noted]) -> Candidate:
    """The candidate with its records: those that are about its files."""
    held = [noted[home] for home in found.homes() if home in noted]
    records = {
        record.rank: record
        for told in held
        for record in told.records
        if record.rank not in found.files or found.files[record.rank].file == record.file
    }
    if not any(rank in found.files for rank in records):
        records = {}  # they are about another save, whose name differs in a number that may be a rank's
    trouble = next((told.trouble for told in held if told.trouble), "")
    return replace(found, records=tuple(records[rank] for rank in sorted(records)), trouble=found.trouble or trouble)


def check_noted(candidate: Candidate) -> None:
    """Compare files with records.

    Files without records do not count as missing: a save without records is judged by its files alone, here and where
    its headers are read.

    Raises:
        DiscoveryError: a rank's file is missing, or of another size, or ranks recorded different steps.
    """
    if candidate.trouble:
        raise DiscoveryError(candidate.trouble)
    if not candidate.records:
        return
    world = max(record.world for record in candidate.records)
    by_rank = {record.rank: record for record in candidate.records if record.world == world}
    if len({(record.step, record.sharded) for record in by_rank.values()}) > 1:
        raise DiscoveryError("its ranks recorded different steps: a newer save of the same name was cut short")
    gone = [rank for rank in range(world) if rank not in candidate.files]
    if gone:
        told = [by_rank[rank].file for rank in gone if rank in by_rank]
        raise DiscoveryError(
            f"the files of {name_ranks(gone)} are gone: {told[:3]}"
            if told
            else f"the files of {name_ranks(gone)} of {world} are missing, and none of these recorded its own"
        )
    for rank, record in by_rank.items():
        held = candidate.files[rank]
        if (held.file, held.size) != (record.file, record.size):
            raise DiscoveryError(
                f"{held.file!r} has {held.size} bytes, and {record.file!r} was saved with {record.size}"
            )


def unnoted(candidate: Candidate) -> list[int]:
    """Ranks that did not record their files, of a checkpoint that others recorded."""
    if not candidate.records:
        return []
    noted = {record.rank for record in candidate.records}
    return [rank for rank in range(max(record.world for record in candidate.records)) if rank not in noted]


def check_ranks(candidate: Candidate, strategy: Optional[Strategy]) -> dict[int, SizedFile]:
    """The files to load: those of all ranks of the strategy; without one, the lowest rank's, which holds all.

    Raises:
        DiscoveryError: a rank's file is missing.
        StrategyError: the strategy lacks pipeline stages.
    """
    if candidate.merged or candidate.parts:
        return dict(candidate.files)
    world = max((record.world for record in candidate.job), default=1)
    if strategy is None:
        lowest = min(candidate.files)
        if lowest and not candidate.whole:
            raise DiscoveryError(
                f"the only file is that of rank {lowest}, {candidate.files[lowest].file!r}, and without a strategy "
                "only rank 0 counts as a whole model: give train_strategy_filename"
            )
        return {lowest: candidate.files[lowest]}
    strategy.check_complete()
    missing = [rank for rank in range(strategy.world) if rank not in candidate.files]
    if missing:
        raise DiscoveryError(f"the files of {name_ranks(missing)} are missing; {strategy.origin} has {strategy.world}")
    if candidate.job and world != strategy.world:
        raise DiscoveryError(f"{world} ranks saved it, and {strategy.origin} is for {strategy.world}")
    return {rank: candidate.files[rank] for rank in range(strategy.world)}

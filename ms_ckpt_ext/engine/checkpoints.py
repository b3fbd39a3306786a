"""Which checkpoints a training job left in a directory, newest first, and whether what was noted about them holds.

Looked for in the directory and in the folders of its first level:

    rank_N/PREFIX-EPOCH_STEP.ckpt, rank_N/net.safetensors, …    one for every name that the rank folders share
    PREFIX-EPOCH_STEP.ckpt, PREFIX_rank_N-EPOCH_STEP.ckpt, …    ranks in one folder, or one process
    *.safetensors with param_name_map.json or Hugging Face's    a merged one
    iteration_N/*.safetensors with common.json, metadata.json   MindFormers' own, which knows its layouts

Newest first means: those with records (`engine.records`) before all others, by the time of the save; the others by the
last two numbers of their names, as MindSpore orders them (folder names count before), then by modification time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.strategy import Strategy
from ms_ckpt_ext.engine.records import Record, read_records, record_of, shared_name
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, name_ranks
from ms_ckpt_ext.formats import discovery, mindformers
from ms_ckpt_ext.formats.kind import STRATEGY, kind_of

MERGED = "merged"
_MERGED_BY = (discovery.MAP_NAME, discovery.HF_INDEX_NAME, mindformers.METADATA_NAME, mindformers.COMMON_NAME)
_RANK = re.compile(r"rank_(\d+)")


class Held(NamedTuple):
    """A rank's file: relative to the checkpoint's folder, and its size in bytes."""

    file: str
    size: int


@dataclass(frozen=True)
class Candidate:
    """Files that look like one checkpoint.

    Attributes:
        folder: relative to the directory that was looked at; "" for itself.
        name: what the ranks' file names share, or `MERGED`.
        files: rank -> file; a merged checkpoint has none here.
        modified: latest modification time, in seconds since 1970.
        records: what is noted about it.
        trouble: why it cannot be used, as far as looking at names told; "" if nothing speaks against it.
    """

    folder: str
    name: str
    files: Mapping[int, Held]
    modified: float
    records: tuple[Record, ...] = ()
    trouble: str = ""

    @property
    def title(self) -> str:
        """Its path relative to the directory; for a sharded one, of what its ranks' files have in common."""
        return "/".join(filter(None, (self.folder, "" if self.merged else self.name))) or "."

    @property
    def merged(self) -> bool:
        """Whole parameters in a few files."""
        return self.name == MERGED

    @property
    def whole(self) -> bool:
        """No file holds a part of a parameter only."""
        return self.merged or (bool(self.records) and not self.records[0].sharded)

    @property
    def suffix(self) -> str:
        """The format of its files, with the dot."""
        return os.path.splitext(self.name)[1]

    def age(self) -> tuple[Any, ...]:
        """Sorts the newest last."""
        if self.records:
            return (1, (max(record.saved for record in self.records),), self.modified)
        stem = os.path.splitext(self.name)[0]
        return (0, (*_numbers(os.path.basename(self.folder)), *_numbers(stem)), self.modified)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)][-2:]


def find_candidates(directory: str, kind: Optional[str] = None) -> list[Candidate]:
    """Every checkpoint below a directory, as far as this host sees it, in no special order. Opens no checkpoint file.

    Args:
        directory: one that does not exist has none.
        kind: "safetensors" or "ckpt"; None for both.
    """
    root = Path(directory)
    if not root.is_dir():
        return []
    suffixes = [f".{suffix}" for suffix in discovery.FORMATS if kind in (None, suffix)]
    folders = [root, *discovery.inside(root, lambda p: p.is_dir() and not _RANK.fullmatch(p.name))]
    return [c for folder in folders if not folder.name.startswith(".") for c in _in_folder(root, folder, suffixes)]


def _in_folder(root: Path, folder: Path, suffixes: list[str]) -> Iterator[Candidate]:
    where = "" if folder == root else folder.name
    if any((folder / name).is_file() for name in _MERGED_BY):
        yield Candidate(where, MERGED, {}, folder.stat().st_mtime, trouble=mindformers.complaint(str(folder)))
        if not discovery.is_sharded(str(folder)):
            return  # the files beside the map are its parts
    found: dict[str, dict[int, Held]] = {}
    modified: dict[str, float] = {}
    doubled: dict[str, str] = {}
    for rank, path in _checkpoint_files(folder, suffixes):
        try:
            status = path.stat()
        except FileNotFoundError:  # deleted meanwhile, as the oldest ones are
            continue
        name = shared_name(path.name, rank)
        file = path.relative_to(folder).as_posix()
        before = found.setdefault(name, {}).setdefault(rank, Held(file, status.st_size))
        if before.file != file:
            doubled[name] = f"{before.file!r} and {file!r} are both of rank {rank}: move the one that is not meant away"
        modified[name] = max(status.st_mtime, modified.get(name, 0.0))
    for name, files in found.items():
        records, trouble = _records(str(folder), name)
        yield Candidate(where, name, files, modified[name], records, doubled.get(name) or trouble)


def _checkpoint_files(folder: Path, suffixes: list[str]) -> Iterator[tuple[int, Path]]:
    """(rank, path) of what may be a rank's checkpoint."""
    children = discovery.inside(folder)
    rank_folders = [(int(m[1]), p) for p in children if (m := _RANK.fullmatch(p.name)) and p.is_dir()]
    for rank, rank_folder in sorted(rank_folders):
        named = (path for path in discovery.inside(rank_folder) if path.suffix in suffixes)
        yield from ((rank, path) for path in named if not path.is_dir())
    if not rank_folders:
        for path in children:
            if path.suffix in suffixes and path.is_file() and kind_of(str(path)) != STRATEGY:
                number = _RANK.search(path.name)
                yield (int(number[1]) if number else 0), path


def _records(folder: str, name: str) -> tuple[tuple[Record, ...], str]:
    try:
        return tuple(read_records(folder, name)), ""
    except CheckpointError as error:
        return (), str(error)


def together(seen: Iterable[Iterable[Candidate]]) -> list[Candidate]:
    """What several hosts see, as one; newest first. A file that two hosts see in different sizes is trouble."""
    merged: dict[str, Candidate] = {}
    for candidates in seen:
        for candidate in candidates:
            known = merged.get(candidate.title)
            merged[candidate.title] = candidate if known is None else _both(known, candidate)
    ordered = sorted(merged.values(), key=Candidate.age, reverse=True)
    torn = [candidate for candidate in ordered if _cut_short(candidate, ordered)]
    told = [
        replace(c, trouble=c.trouble or "it has no records, and an older one has: its save was cut short") for c in torn
    ]
    return told + [candidate for candidate in ordered if candidate not in torn]


def _cut_short(candidate: Candidate, all_of_them: list[Candidate]) -> bool:
    """Where checkpoints are recorded, one that is newer than they and has no records was not finished."""
    recorded = [
        other.modified
        for other in all_of_them
        if other.records and (other.folder, other.suffix) == (candidate.folder, candidate.suffix)
    ]
    return not candidate.records and bool(recorded) and candidate.modified > max(recorded)


def _both(one: Candidate, other: Candidate) -> Candidate:
    differ = [rank for rank in one.files if other.files.get(rank, one.files[rank]) != one.files[rank]]
    trouble = f"hosts hold different files of {name_ranks(differ)}" if differ else ""
    records = {record.rank: record for record in (*one.records, *other.records)}
    return replace(
        one,
        files={**one.files, **other.files},
        modified=max(one.modified, other.modified),
        records=tuple(records[rank] for rank in sorted(records)),
        trouble=one.trouble or other.trouble or trouble,
    )


def check_noted(candidate: Candidate) -> None:
    """Compare files with records. Raises DiscoveryError when a rank's record or file is missing, or another size."""
    if candidate.trouble:
        raise DiscoveryError(candidate.trouble)
    if not candidate.records:
        return
    world = max(record.world for record in candidate.records)
    by_rank = {record.rank: record for record in candidate.records if record.world == world}
    silent = [rank for rank in range(world) if rank not in by_rank]
    if silent:
        raise DiscoveryError(f"{name_ranks(silent)} of {world} did not record that their files are complete")
    if len({(record.step, record.sharded) for record in by_rank.values()}) > 1:
        raise DiscoveryError("its ranks recorded different steps: a newer save of the same name was cut short")
    gone = [rank for rank, record in by_rank.items() if rank not in candidate.files]
    if gone:
        raise DiscoveryError(f"the files of {name_ranks(gone)} are gone: {[by_rank[rank].file for rank in gone[:3]]}")
    for rank, record in by_rank.items():
        held = candidate.files[rank]
        if (held.file, held.size) != (record.file, record.size):
            raise DiscoveryError(
                f"{held.file!r} has {held.size} bytes, and {record.file!r} was saved with {record.size}"
            )


def check_ranks(candidate: Candidate, strategy: Optional[Strategy]) -> dict[int, Held]:
    """The files to load: of all ranks that the strategy knows; without one, the lowest rank's, which holds all.

    Raises:
        DiscoveryError: a rank's file is missing.
        StrategyError: the strategy lacks pipeline stages.
    """
    world = max((record.world for record in candidate.records), default=1)
    if strategy is None:
        lowest = min(candidate.files)
        return {lowest: candidate.files[lowest]}
    strategy.check_complete()
    missing = [rank for rank in range(strategy.world) if rank not in candidate.files]
    if missing:
        raise DiscoveryError(f"the files of {name_ranks(missing)} are missing; {strategy.origin} has {strategy.world}")
    if candidate.records and world != strategy.world:
        raise DiscoveryError(f"{world} ranks saved it, and {strategy.origin} is for {strategy.world}")
    return {rank: candidate.files[rank] for rank in range(strategy.world)}


def to_json(candidate: Candidate) -> list[Any]:
    """For the other hosts."""
    records = [vars(record) for record in candidate.records]
    files = [[rank, *held] for rank, held in candidate.files.items()]
    return [candidate.folder, candidate.name, files, candidate.modified, records, candidate.trouble]


def from_json(raw: list[Any]) -> Candidate:
    """What `to_json` was given."""
    folder, name, files, modified, records, trouble = raw
    held = {rank: Held(file, size) for rank, file, size in files}
    return Candidate(folder, name, held, modified, tuple(map(record_of, records)), trouble)

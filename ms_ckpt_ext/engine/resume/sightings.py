"""What lies where checkpoints may be, as one host sees it: sent to the other hosts before anything is concluded.

The directory and the folders of its first level are listed: files of checkpoint formats, in rank folders or not, maps
that describe a whole model, and the records of saves. No checkpoint is opened, except as many `.ckpt` files as are
needed to tell checkpoints from strategies. `engine.resume.candidates` decides which files form a checkpoint, once all
hosts' parts are together. For a chosen one the hosts then share the layouts of the job that saved it: those recorded
with it, or in the strategy files that training jobs keep nearby.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.geometry.layout import layout_from_json
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.resume import records
from ms_ckpt_ext.engine.resume.records import Record, read_records, record_from_json, strategy_folder
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, StrategyError, name_ranks
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.discovery.whole_models import is_map
from ms_ckpt_ext.formats.table import (
    COMMON_NAME,
    FORMATS,
    METADATA_NAME,
    SAFETENSORS,
    STRATEGY,
    STRATEGY_SUFFIXES,
    is_mindformers,
    kind_of,
)
from ms_ckpt_ext.storage.linux import is_below
from ms_ckpt_ext.transport.agree import LAYOUT, NATURAL, share_values
from ms_ckpt_ext.transport.base import Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.resume.candidates import Candidate

_FOLDERS = ("strategy", os.path.join("..", "strategy"))
"""Where MindFormers and most scripts keep layouts, relative to a checkpoint's folder."""


FOLDER_FORM = (
    str,
    [(str, NATURAL, float)],
    str,
    float,
    {str: ([{str: {str, int, float, bool, type(None)}}], str)},
    str,
    bool,
)
"""What `folder_to_json` makes, after a trip through JSON: see `transport.agree.JsonForm`."""
_ENTRY = (str, NATURAL, LAYOUT)
"""The form of an entry of a strategy: see `entries`."""


class Sight(NamedTuple):
    """A file: relative to the folder, with `/`; its size in bytes, and when it was modified, in seconds since 1970."""

    file: str
    size: int
    modified: float


class Noted(NamedTuple):
    """The records of a save, and what is wrong with them; "" if nothing."""

    records: tuple[Record, ...]
    trouble: str


class CheckpointFolder(NamedTuple):
    """A folder that may hold checkpoints.

    Attributes:
        folder: relative to the directory that was looked at; "" for itself.
        files: of checkpoint formats, in it and in its rank folders.
        mapped: name of the file that makes its own files one model: a map, MindFormers' metadata; "" if none does.
        modified: of the folder itself.
        noted: name of a save -> what was recorded about it.
        complaint: why a model with a map should not be used; "" if nothing speaks against it.
        named: the file itself was given, not the folder.
    """

    folder: str
    files: tuple[Sight, ...]
    mapped: str
    modified: float
    noted: dict[str, Noted]
    complaint: str = ""
    named: bool = False


def look(path: str, kind: Optional[str] = None) -> list[CheckpointFolder]:
    """What this host sees of checkpoints.

    Args:
        path: a directory, or one file, or the index of a model in parts. If it does not exist, the result is empty.
        kind: "safetensors" or "ckpt"; None for both.

    Raises:
        DiscoveryError: two folders belong to one rank, or a folder vanished.
        StorageError: the directory or a rank's folder cannot be listed.
    """
    suffixes = [suffix for suffix in FORMATS if kind in (None, suffix)]
    root = Path(path)
    if root.is_file():
        return [_file(root, suffixes)]
    if not root.is_dir():
        return []
    return [
        _place(root, "", suffixes),
        *(_place(folder, folder.name, suffixes) for folder in rank_folders.folders_in(root, _is_other)),
    ]


def _file(path: Path, suffixes: list[str]) -> CheckpointFolder:
    """One file that was named; other files beside it are ignored."""
    status = path.stat()
    if is_map(path.name):
        return CheckpointFolder("", (), path.name, status.st_mtime, {}, named=True)
    if not path.name.endswith(tuple(f".{suffix}" for suffix in suffixes)) or kind_of(str(path)) == STRATEGY:
        raise DiscoveryError(
            f"{str(path)!r} is a file, and no {rank_folders.or_suffixes(suffixes[0] if len(suffixes) == 1 else None)} "
            "checkpoint; give a checkpoint, or the directory of a training's checkpoints"
        )
    return CheckpointFolder(
        "", (Sight(path.name, status.st_size, status.st_mtime),), "", status.st_mtime, {}, named=True
    )


def _is_other(folder: Path) -> bool:
    """Whether a folder is neither a rank's nor the records' nor hidden."""
    hidden = folder.name.startswith(".") or folder.name == records.RECORDS_FOLDER
    return not hidden and rank_folders.RANK_FOLDER.match(folder.name) is None


def _place(folder: Path, name: str, suffixes: list[str]) -> CheckpointFolder:
    ranks = [child for child in rank_folders.inside(folder, Path.is_dir) if rank_folders.RANK_FOLDER.match(child.name)]
    known: dict[str, str] = {}
    names = [f"{rank.name}/{file}" for rank in ranks for file in rank_folders.checkpoint_names(rank, suffixes, known)]
    names += rank_folders.checkpoint_names(folder, suffixes)
    mapped = _mapped(folder)
    return CheckpointFolder(
        name,
        tuple(_sights(folder, names)),
        mapped,
        folder.stat().st_mtime,
        dict(_noted(folder)),
        _complaint(folder) if mapped else "",
    )


def _mapped(folder: Path) -> str:
    """The file that makes a folder's files one model: a map or MindFormers' own; else one of MindFormers' parts."""
    there = [child.name for child in rank_folders.inside(folder, Path.is_file)]
    named = [name for name in there if name in (METADATA_NAME, COMMON_NAME) or is_map(name)]
    files = [name for name in there if name.endswith(SAFETENSORS.suffix)]
    theirs = bool(files) and all(map(is_mindformers, files))
    return next(iter(named), files[0] if theirs else "")


def _complaint(folder: Path) -> str:
    if not (folder / COMMON_NAME).is_file():
        return ""
    from ms_ckpt_ext.formats.discovery.mindformers import complaint

    return complaint(str(folder))


def _sights(folder: Path, names: Iterable[str]) -> Iterator[Sight]:
    for name in names:
        try:
            status = (folder / name).stat()
        except FileNotFoundError:  # deleted meanwhile, as the oldest ones are
            continue
        yield Sight(name, status.st_size, status.st_mtime)


def _noted(folder: Path) -> Iterator[tuple[str, Noted]]:
    home = folder / records.RECORDS_FOLDER
    if not home.is_dir():
        return
    for place in rank_folders.inside(home, Path.is_dir):
        try:
            yield place.name, Noted(tuple(read_records(str(folder), place.name)), "")
        except CheckpointError as error:
            yield place.name, Noted((), str(error))


def folder_to_json(place: CheckpointFolder) -> list[Any]:
    """As JSON values, for the other hosts."""
    noted = {name: [[vars(record) for record in held.records], held.trouble] for name, held in place.noted.items()}
    return [place.folder, place.files, place.mapped, place.modified, noted, place.complaint, place.named]


def folder_from_json(raw: list[Any]) -> CheckpointFolder:
    """What `folder_to_json` was given. Raises ValueError, KeyError or TypeError for anything else."""
    folder, files, mapped, modified, noted, complaint, named = raw
    odd = [name for name in (folder, mapped) if name and not is_below(name)]
    odd += [name for name, _, _ in files if not is_below(name) or name.count("/") > 1]
    if odd:
        raise ValueError(f"{odd[0]!r:.80} is no name of a file or folder")
    held = {name: Noted(tuple(map(record_from_json, told)), trouble) for name, (told, trouble) in noted.items()}
    return CheckpointFolder(folder, tuple(Sight(*file) for file in files), mapped, modified, held, complaint, named)


def find_layouts(transport: Transport[Any], candidate: Candidate, folder: str, probe: bool) -> Optional[Strategy]:
    """The layouts that cut a checkpoint, recorded with it or found beside it; None when it is whole. Collective.

    Args:
        transport: between the ranks, of which one per host is a `probe` and looks into files.
        candidate: in `folder` on this host.

    Raises:
        StrategyError: on all ranks, when there are none, or they are damaged or contradict each other.
    """
    if candidate.whole:
        return None
    mine = _layouts_near(folder, candidate) if probe else _Found([], "", "", False)
    answers = share_values(transport, mine, ([_ENTRY], str, str, bool), _found)
    answers = [answer for answer in answers if answer.recorded and answer.items] or answers
    origin = next((answer.origin for answer in answers if answer.items), "")
    if not origin:
        problem = next((answer.problem for answer in answers if answer.problem), "") or candidate.unlike
        if problem or len(candidate.files) > 1:
            raise StrategyError(problem or "no layouts of the job that saved it: give train_strategy_filename")
        return None
    return Strategy.from_items([item for answer in answers for item in answer.items], origin)


def check_alike(transport: Transport[Any], candidate: Candidate, folder: str, probe: bool) -> None:
    """Check that what was trained is alike on all ranks that recorded no layouts, as it is taken for whole. Collective.

    A network that MindSpore did not cut has no layouts, whether its ranks hold the same or it cuts its slices itself;
    the recorded digests show which. A rank's own statistics, for which no optimizer has a state, may differ.

    Args:
        see `find_layouts`.

    Raises:
        StrategyError: on all ranks, when a parameter with an optimizer state differs between ranks.
    """
    mine = _trained(folder, candidate) if probe else []
    answers: list[list[tuple[int, str]]] = share_values(transport, mine, [(NATURAL, str)])
    told = dict(chain.from_iterable(answers))
    odd = [rank for rank in sorted(told) if told[rank] != told[min(told)]]
    if odd:
        raise StrategyError(
            f"{name_ranks(odd)} saved other values of what was trained than rank {min(told)}, and no layouts: these "
            "are slices, and nothing tells of what, or the ranks did not train alike (each began with random values of "
            "its own); give train_strategy_filename, which says what is a slice and what is whole"
        )


def _trained(folder: str, candidate: Candidate) -> list[tuple[int, str]]:
    """(rank, one digest of all parameters with optimizer states), for files on this host that have digests."""
    from ms_ckpt_ext.core.geometry.groups import STATES, group_of
    from ms_ckpt_ext.engine.integrity.manifest import load_manifest

    found = []
    for rank, held in candidate.files.items():
        place, name = os.path.split(os.path.join(folder, *held.file.split("/")))
        manifest = None
        with suppress(CheckpointError):  # of a folder that cannot be read; its file is looked at later
            manifest = load_manifest(place)
        digests = manifest.files[name].tensors if manifest is not None and name in manifest.files else {}
        states = {each.partition(".")[2] for each in digests if group_of(each, digests) == STATES}
        trained = sorted((each, digests[each]) for each in states & digests.keys())
        if trained:
            found.append((rank, xxhash.xxh3_128_hexdigest(repr(trained).encode())))
    return found


class _Found(NamedTuple):
    """Layouts on one host: entries (as JSON, where they are sent), their origin, what was wrong, and whether they were
    recorded."""

    items: list[Any]
    origin: str
    problem: str
    recorded: bool


def _found(told: Sequence[Any]) -> _Found:
    """What a rank told, with entries as items of a strategy. Raises StrategyError."""
    items, origin, problem, recorded = told
    made = [LayoutItem(name, stage, layout_from_json(raw)) for name, stage, raw in items]
    return _Found(made, origin, problem, recorded)


def _layouts_near(folder: str, candidate: Candidate) -> _Found:
    recorded = [strategy_folder(folder, home) for home in candidate.homes()] if candidate.job else []
    beside = [] if candidate.records else [os.path.join(folder, near) for near in _FOLDERS]
    noted = [*filter(os.path.isdir, recorded)]
    places = noted or [*filter(os.path.isdir, beside)][:1]
    items: dict[str, Any] = {}
    try:
        for place in places:
            items.update((json.dumps(item), item) for item in _items_in(place))
    except CheckpointError as error:
        return _Found([], "", str(error), bool(noted))
    origin = " and ".join(f"strategy directory {os.path.normpath(place)!r}" for place in places)
    return _Found(list(items.values()), origin, "", bool(noted))


def _items_in(folder: str) -> list[Any]:
    """The layouts of all files of a folder, each once: every rank of a stage may have saved the same."""
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    found: dict[str, Any] = {}
    for path in rank_folders.inside(Path(folder), Path.is_file):
        if path.suffix in STRATEGY_SUFFIXES:
            for item in entries(load_strategy(path)):
                found.setdefault(json.dumps(item), item)
    return list(found.values())


def entries(strategy: Strategy) -> list[Any]:
    """A strategy as JSON values: an entry for every parameter and stage."""
    return [[name, stage, layout] for name, stages in strategy.layouts.items() for stage, layout in stages.items()]

"""What lies where checkpoints may be, as one host sees it: told to the other hosts before anything is made of it.

Looked at are the directory and the folders of its first level: files of checkpoint formats, in rank folders or not,
maps that speak for a whole model, and the records of saves. No checkpoint is opened; of `.ckpt` files as many as are
needed to tell checkpoints from strategies. What of this is one checkpoint is for `engine.resume.candidates` to say,
once all hosts' parts are together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.engine.resume import records
from ms_ckpt_ext.engine.resume.records import Record, read_records, record_from_json
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.discovery.whole_models import is_map
from ms_ckpt_ext.formats.table import (
    COMMON_NAME,
    FORMATS,
    METADATA_NAME,
    SAFETENSORS,
    STRATEGY,
    is_mindformers,
    kind_of,
)


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
        mapped: name of the file that makes its own files one model: a map, MindFormers' metadata; "" without.
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
        path: a directory, or one file, or the index of a model in parts. What does not exist holds nothing.
        kind: "safetensors" or "ckpt"; None for both.

    Raises:
        DiscoveryError: two folders of one rank, or one that vanished.
        StorageError: the directory or a rank's folder cannot be looked into.
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
    """One file that was named; what lies around it has nothing to do with it."""
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
    """Whether a folder is no rank's, no records' and not hidden."""
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
    """What makes the files of a folder one model; of several the map itself comes first, as MindFormers' files do."""
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
    """For the other hosts."""
    noted = {name: [[vars(record) for record in held.records], held.trouble] for name, held in place.noted.items()}
    return [place.folder, place.files, place.mapped, place.modified, noted, place.complaint, place.named]


def folder_from_json(raw: list[Any]) -> CheckpointFolder:
    """What `folder_to_json` was given."""
    folder, files, mapped, modified, noted, complaint, named = raw
    held = {name: Noted(tuple(map(record_from_json, told)), trouble) for name, (told, trouble) in noted.items()}
    return CheckpointFolder(folder, tuple(Sight(*file) for file in files), mapped, modified, held, complaint, named)

"""What a job may overwrite and what not: results of this package, files of others, folders of the source's ranks.

What another program or person put into the target is not ours to remove: a file goes when the job's own naming says it
is an older result of the kind, when MindSpore's map does, or when it is on record as published by this package and
untouched. Results stay out of the folders where the source's ranks have their files: the newest file of a rank folder
counts as that rank's, so a result beside it would be the shard of the next job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Callable

from ms_ckpt_ext.engine.files.job import Job
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import UsageError, storage_error
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.storage import journal
from ms_ckpt_ext.storage.hidden import HiddenFolder
from ms_ckpt_ext.storage.published import Published, places_of, read_published, state_of

_PARTS = {
    "mindspore": re.compile(r"^part\d+\.(safetensors|ckpt)$"),
    "huggingface": re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$"),
}
INDEXES = {"mindspore": rank_folders.MAP_NAME, "huggingface": rank_folders.HF_INDEX_NAME}
"""Naming of a merge -> its index."""
_SINGLE = "model.safetensors"
_WHY = {
    "mindspore": "beside a map of MindSpore's nobody could tell which of the two is meant",
    "huggingface": "this merge would replace it",
}
_RANK_FOLDER = re.compile(r"^rank_(\d+)$")


def check_apart(catalog: Catalog, folder: str, job: Job) -> None:
    """Refuse a job in `folder` that would put files where a rank of the source has its own, or could have.

    That is any of several folders that hold source files, and every `ROOT/rank_N`, there or not, of a root in whose
    rank folders source files lie. One folder that is no rank's is nobody's: a result may go beside its source.

    Raises UsageError.
    """
    sources = set(_spellings(file.path for file in catalog.files))
    taken = set(_spellings(os.path.join(folder, name) for name in job.everything))
    roots = {os.path.dirname(each) for each in sources if _is_rank_folder(each)}
    held = taken & sources if len({os.path.realpath(each) for each in sources}) > 1 else set()
    wrong = held | {each for each in taken if _is_rank_folder(each) and os.path.dirname(each) in roots}
    if wrong:
        raise UsageError(
            f"{min(wrong)!r} is a rank folder of the source, and a file that is written there would be taken "
            "for that rank's; choose another target directory"
        )


def _is_rank_folder(folder: str) -> bool:
    return _RANK_FOLDER.match(os.path.basename(folder)) is not None


def _spellings(paths: Iterable[str]) -> Iterator[str]:
    """The folders of files: where they really are, and where they are by name, for a rank folder may be a link."""
    for folder in {os.path.dirname(os.path.abspath(path)) for path in paths}:
        yield os.path.realpath(folder)
        yield os.path.join(os.path.realpath(os.path.dirname(folder)), os.path.basename(folder))


def of_merge(target: str, naming: str) -> list[str]:
    """Files of an older merge: of this naming, and of the other one where this package or MindSpore made them.

    Raises:
        UsageError: files of a Hugging Face model that this package did not write. With its naming they would be
            replaced; beside MindSpore's map, nobody could tell which of the two a loader takes.
    """
    there = _names_in(target)
    model = [name for name in there if _is_of(name, "huggingface")]
    if model and not _made_here(target, model, "huggingface"):
        raise _not_ours(target, model, _WHY[naming])
    if naming == "huggingface" and _SINGLE in there:
        if not Records().holds(target, _SINGLE):
            raise _not_ours(target, [_SINGLE], "transformers takes it before the index of this merge")
        model.append(_SINGLE)
    parts = [name for name in there if _is_of(name, "mindspore")]
    if naming == "huggingface" and INDEXES["mindspore"] not in parts and not _made_here(target, parts, "mindspore"):
        parts = []
    return [*model, *parts, *(name for name in there if name in rank_folders.HYPER_NAMES)]


def _not_ours(target: str, names: Sequence[str], why: str) -> UsageError:
    return UsageError(
        f"{target!r} holds {names[0]!r}{f' and {len(names) - 1} more files' if names[1:] else ''} of a Hugging Face "
        f"model that was not written here, and {why}; choose another target, or move that model away"
    )


def _names_in(target: str) -> list[str]:
    """Names in the target, if there is one. What is there must be known: StorageError when it may not be listed."""
    try:
        return sorted(os.listdir(target))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_error("look for an older result in", target, error) from error


def _is_of(name: str, naming: str) -> bool:
    return name == INDEXES[naming] or _PARTS[naming].match(name) is not None


def _made_here(target: str, names: Sequence[str], naming: str) -> bool:
    """Whether this package published files of a naming, or was killed while it did."""
    index, records = INDEXES[naming], Records()
    if journal.is_unfinished(Path(target, index)):
        return True
    known = any(_PARTS[naming].match(name) for name in records.names(target))
    return known and all(name == index or records.holds(target, name) for name in names)


def of_recut(
    target: str, names: Sequence[str], file_name: Callable[[int], str], every_rank: bool = False
) -> tuple[str, ...]:
    """Files that an older job of this kind published: the same but for the format, or of ranks there are no more.

    Args:
        names: the files that are to be written, relative to the target.
        file_name: rank -> what the job calls its file.
        every_rank: files of this very name in other ranks' folders go, whoever wrote them.
    """
    if not os.path.isdir(target):
        return ()
    ranks = [int(match[1]) for match in map(_RANK_FOLDER.match, _names_in(target)) if match]
    beyond, records = dict.fromkeys(map(file_name, ranks)), Records()
    gone = [
        name
        for name in dict.fromkeys(each for named in (*names, *beyond) for each in in_any_format(named))
        if name not in names
        and os.path.isfile(os.path.join(target, name))
        and ((every_rank and name in beyond) or records.holds(target, name))
    ]
    return tuple(gone)


def in_any_format(name: str) -> Iterator[str]:
    """What a file is called in each of the formats."""
    stem, _ = os.path.splitext(name)
    return (f"{stem}.{form}" for form in rank_folders.FORMATS)


class Records:
    """What is on record as published by this package, in any folder; each record is read once.

    A record is that of the folder of a job's target, so a file is looked for in its own folder's and in those further
    up. What an interrupted job was about to publish counts as well: whoever comes next finishes that.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[Published, set[str]]] = {}

    def holds(self, folder: str, name: str) -> bool:
        """Whether a file in a folder is as it was published."""
        path = Path(folder, name)
        state = state_of(path)
        for above, begins in places_of(str(path.parent)):
            published, begun = self._of(above)
            if published.is_as_published(begins + path.name, state) or begins + path.name in begun:
                return True
        return False

    def names(self, folder: str) -> set[str]:
        """Files below a folder that are on its record, or about to be."""
        published, begun = self._of(folder)
        return published.files.keys() | begun

    def _of(self, folder: str) -> tuple[Published, set[str]]:
        if folder not in self._read:
            begun = map(journal.read_journal, HiddenFolder(Path(folder)).journals())
            self._read[folder] = read_published(Path(folder)), {name for each in begun if each for name in each.files}
        return self._read[folder]

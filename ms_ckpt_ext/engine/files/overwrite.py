"""What a job may overwrite and what not: results of this package, files of others.

What another program or person put into the target is not ours to remove: a file goes when the job's own naming says it
is an older result of the kind, when MindSpore's map does, or when it is on record as published by this package and
untouched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

from ms_ckpt_ext.errors import UsageError, storage_error
from ms_ckpt_ext.formats.discovery.rank_folders import HYPER_NAMES, INDEX_NAMES, RANK_FOLDER
from ms_ckpt_ext.formats.table import FORMATS, SUFFIXES
from ms_ckpt_ext.storage import publishing
from ms_ckpt_ext.storage.linux import is_folder
from ms_ckpt_ext.storage.locks import HiddenFolder
from ms_ckpt_ext.storage.publishing import Published, places_of, read_published, state_of

_PARTS = {
    "mindspore": re.compile(rf"^part\d+({'|'.join(map(re.escape, SUFFIXES))})$"),
    "huggingface": re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$"),
}
_SINGLE = "model.safetensors"
_WHY = {
    "mindspore": "beside a map of MindSpore's nobody could tell which of the two is meant",
    "huggingface": "this merge would replace it",
}


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
    if naming == "huggingface" and INDEX_NAMES["mindspore"] not in parts and not _made_here(target, parts, "mindspore"):
        parts = []
    return [*model, *parts, *(name for name in there if name in HYPER_NAMES)]


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
    return name == INDEX_NAMES[naming] or _PARTS[naming].match(name) is not None


def _made_here(target: str, names: Sequence[str], naming: str) -> bool:
    """Whether this package published files of a naming, or was killed while it did."""
    index, records = INDEX_NAMES[naming], Records()
    if publishing.is_unfinished(Path(target, index)):
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
    if not is_folder(target):
        return ()
    ranks = [int(match[1]) for match in map(RANK_FOLDER.match, _names_in(target)) if match]
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
    return (f"{stem}.{form}" for form in FORMATS)


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
            begun = map(publishing.read_journal, HiddenFolder(Path(folder)).journals())
            self._read[folder] = read_published(Path(folder)), {name for each in begun if each for name in each.files}
        return self._read[folder]

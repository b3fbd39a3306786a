"""Which files a conversion is about, and what their results are called."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import DiscoveryError, UsageError, also, storage_error
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.discovery.whole_models import is_map
from ms_ckpt_ext.formats.table import FORMATS, STRATEGY, SUFFIXES, kind_of


class Inputs(NamedTuple):
    """What a conversion has to do.

    Attributes:
        source, target: directories.
        files: input relative to the source -> output relative to the target.
        maps: parameter maps that are carried along, relative to both.
        beside: results get their inputs' names, except for the suffix, in the inputs' own directory.
    """

    source: str
    target: str
    files: dict[str, str]
    maps: tuple[str, ...] = ()
    beside: bool = False

    @property
    def inputs(self) -> dict[str, str]:
        """Output relative to the target -> path of its input."""
        return {output: os.path.join(self.source, name) for name, output in self.files.items()}

    def renamed_in(self, name: str) -> dict[str, str]:
        """File names as the map `name` has them -> their new names."""
        folder = os.path.dirname(name)
        mine = {old: new for old, new in self.files.items() if os.path.dirname(old) == folder}
        return {os.path.basename(old): os.path.basename(new) for old, new in mine.items()}


def find_inputs(source: str, target: str, to: Optional[str], pattern: Optional[re.Pattern[str]]) -> Inputs:
    """The files of a conversion.

    Args:
        source: a file or a directory; of a directory, every checkpoint file below it.
        target: a directory, or the new path of a single file.
        to: the wanted format.
        pattern: must be found in a file's name.

    Raises:
        DiscoveryError: nothing to convert, or files of both formats.
        UsageError: the arguments contradict each other or the source.
    """
    if os.path.isfile(source):
        return _single(source, target, to, pattern)
    _refuse_absent(source)
    names = _walk(source)
    files = _checkpoints(source, names, SUFFIXES, pattern)
    if to is not None:
        files = _of_one_kind(source, files, to, same_place=_same(source, target))
    return _inputs(source, target, files, to, tuple(name for name in names if is_map(_base(name))))


def find_in_ranks(source: str, target: str, to: str, pattern: Optional[re.Pattern[str]]) -> Inputs:
    """The files of a conversion as MindSpore chooses them: one, or those in the folders `rank*` of a directory.

    They are those of other formats than `to`; the rest is ignored. Arguments and errors as of `find_inputs`.
    """
    if os.path.isfile(source):
        return _single(source, target, to, None)
    _refuse_absent(source)
    below = rank_folders.inside(Path(source), Path.is_dir)
    folders = [child.name for child in below if child.name.startswith("rank")]
    if not folders:
        raise DiscoveryError(f"{source!r} holds no folder whose name starts with 'rank'; check the path")
    names = [
        f"{folder}/{child.name}"
        for folder in folders
        for child in rank_folders.inside(Path(source, folder), Path.is_file)
    ]
    others = other_suffixes(to)
    return _inputs(source, target, _checkpoints(source, sorted(names), others, pattern), to, kind=" or ".join(others))


def _refuse_absent(source: str) -> None:
    if not os.path.isdir(source):
        raise also(DiscoveryError, FileNotFoundError)(f"no such file or directory: {source!r}; check the path")


def _checkpoints(
    source: str, names: list[str], suffixes: tuple[str, ...], pattern: Optional[re.Pattern[str]]
) -> list[str]:
    """The checkpoints among these names that have one of the suffixes and match the pattern."""
    named = (name for name in names if name.endswith(suffixes) and (not pattern or pattern.search(_base(name))))
    return [name for name in named if kind_of(os.path.join(source, name)) != STRATEGY]


def _inputs(
    source: str, target: str, files: list[str], to: Optional[str], maps: tuple[str, ...] = (), kind: str = "checkpoint"
) -> Inputs:
    if not files:
        raise DiscoveryError(f"{source!r} holds no {kind} file to convert; check the path and file_name_regex")
    renamed = {name: _renamed(name, to) for name in files}
    return Inputs(source, target, renamed, maps, to is not None and _same(source, target))


def _is_new_path(target: str) -> bool:
    """Whether a target is the path of a single result: it has a format's suffix, and is no directory."""
    return target.endswith(SUFFIXES) and not os.path.isdir(target)


_base = os.path.basename
_LOST = "lost+found"
"""A folder of the file system itself, at the root of a disk; it holds no checkpoint."""


def _single(path: str, target: str, to: Optional[str], pattern: Optional[re.Pattern[str]]) -> Inputs:
    """One file: into a directory, or to a path that ends in a format's suffix."""
    folder, name = os.path.split(path)
    folder = folder or "."
    if pattern and not pattern.search(name):
        raise UsageError(f"file_name_regex {pattern.pattern!r} is not found in the name of the file {path!r}")
    if not name.endswith(SUFFIXES):
        raise UsageError(f"{path!r} is not a checkpoint by its name: {' or '.join(SUFFIXES)}")
    if _is_new_path(target):
        if to is not None and not target.endswith(f".{to}"):
            raise UsageError(f"the target {target!r} and the wanted format {to!r} contradict each other")
        return Inputs(folder, os.path.dirname(target) or ".", {name: _base(target)})
    return _inputs(folder, target, [name], to)


def _same(one: str, other: str) -> bool:
    """Whether two paths lead to one directory, whichever of its spellings the file system takes."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _renamed(name: str, to: Optional[str]) -> str:
    return name if to is None else f"{os.path.splitext(name)[0]}.{to}"


def _walk(source: str) -> list[str]:
    """Files below a directory, relative to it, without hidden ones."""
    found = []

    def refused(error: OSError) -> None:
        if os.path.basename(str(error.filename)) == _LOST:
            log.warning("%r is passed over: it cannot be looked into (%s)", str(error.filename), error.strerror)
            return
        raise storage_error("look into", str(error.filename), error) from error

    for root, inner, names in os.walk(source, onerror=refused):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(root, name), source) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_one_kind(source: str, files: list[str], to: str, same_place: bool) -> list[str]:
    """The files that are not of the wanted format yet. The others may only be results of an earlier run."""
    wanted = [name for name in files if name.endswith(other_suffixes(to))]
    results = {_renamed(name, to) for name in wanted} if same_place else set()
    strange = [name for name in files if name not in wanted and name not in results]
    if wanted and strange:
        raise DiscoveryError(
            f"{source!r} holds both {' and '.join(SUFFIXES)} files ({wanted[0]!r} and {strange[0]!r}), so which ones "
            "are the checkpoint is not clear; select them by file_name_regex, or move the others away"
        )
    return wanted or strange


def other_suffixes(to: str) -> tuple[str, ...]:
    """Suffixes of the formats that are converted from."""
    return tuple(each.suffix for each in FORMATS.values() if each.name != to)

"""Which files a conversion is about, and what their results are called."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, NoReturn, Optional

from ms_ckpt_ext.engine.origin import foreign
from ms_ckpt_ext.errors import DiscoveryError, UsageError, storage_error
from ms_ckpt_ext.formats import discovery
from ms_ckpt_ext.formats.kind import STRATEGY, kind_of
from ms_ckpt_ext.formats.unified import is_map


class Inputs(NamedTuple):
    """What a conversion has to do.

    Attributes:
        source, target: directories.
        files: input relative to the source -> output relative to the target.
        maps: parameter maps that go along, relative to both.
    """

    source: str
    target: str
    files: dict[str, str]
    maps: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, str]:
        """Output relative to the target -> path of its input."""
        return {output: os.path.join(self.source, name) for name, output in self.files.items()}

    def renamed_in(self, name: str) -> dict[str, str]:
        """File names as the map `name` has them -> their new names."""
        folder = os.path.dirname(name)
        mine = {old: new for old, new in self.files.items() if os.path.dirname(old) == folder}
        return {os.path.basename(old): os.path.basename(new) for old, new in mine.items()}


def find(source: str, target: str, to: Optional[str], pattern: Optional[re.Pattern[str]], below: str = "") -> Inputs:
    """The files of a conversion.

    Args:
        source: a file or a directory.
        target: a directory, or the new path of a single file.
        to: the wanted format.
        pattern: must be found in a file's name.
        below: of a directory, only files in folders of it whose names begin so; "" for all files, however deep.

    Raises:
        DiscoveryError: nothing to convert, files of both formats, or results beside their inputs would replace files
            that no earlier conversion wrote.
        UsageError: the arguments contradict each other or the source.
    """
    found = _find(source, target, to, pattern, below)
    if to is not None and not _is_new_path(target) and _same(found.source, found.target):
        _refuse_foreign(found)
    return found


def _is_new_path(target: str) -> bool:
    """Whether a target is the path of the one result, by its suffix: unless it is a directory, whatever its name."""
    return target.endswith(_SUFFIXES) and not os.path.isdir(target)


def _find(source: str, target: str, to: Optional[str], pattern: Optional[re.Pattern[str]], below: str) -> Inputs:
    if os.path.isfile(source):
        folder, name = os.path.split(source)
        if pattern and not pattern.search(name):
            raise UsageError(f"file_name_regex {pattern.pattern!r} is not found in the name of the file {source!r}")
        return _single(folder or ".", name, target, to)
    if not os.path.isdir(source):
        raise DiscoveryError(f"no such file or directory: {source!r}; check the path")
    folders = [child.name for child in discovery.inside(Path(source), Path.is_dir) if child.name.startswith(below)]
    if below and not folders:
        raise DiscoveryError(f"{source!r} holds no folder whose name starts with {below!r}; check the path")
    names = _walk(source, folders if below else None)
    files = [name for name in names if name.endswith(_SUFFIXES) and (not pattern or pattern.search(_base(name)))]
    files = [name for name in files if kind_of(os.path.join(source, name)) != STRATEGY]
    if to is not None:
        files = _of_one_kind(source, files, to, same_place=_same(source, target))
    if not files:
        raise DiscoveryError(f"{source!r} holds no checkpoint file to convert; check the path and file_name_regex")
    return Inputs(
        source,
        target,
        {name: _renamed(name, to) for name in files},
        tuple(name for name in names if is_map(_base(name))) if not below else (),
    )


_SUFFIXES = tuple(f".{kind}" for kind in discovery.FORMATS)
_base = os.path.basename


def _single(folder: str, name: str, target: str, to: Optional[str]) -> Inputs:
    """One file: into a directory, or to a path that ends in a format's suffix."""
    if not name.endswith(_SUFFIXES):
        raise UsageError(f"{os.path.join(folder, name)!r} is not a checkpoint by its name: {' or '.join(_SUFFIXES)}")
    if _is_new_path(target):
        if to is not None and not target.endswith(f".{to}"):
            raise UsageError(f"the target {target!r} and the wanted format {to!r} contradict each other")
        return Inputs(folder, os.path.dirname(target) or ".", {name: _base(target)})
    return Inputs(folder, target, {name: _renamed(name, to)})


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _refuse_foreign(found: Inputs) -> None:
    """Beside a checkpoint, a file of the other format and the same name may well be another checkpoint."""
    inputs = {output: name for name, output in found.files.items() if output != name}
    in_the_way = foreign(found.target, inputs)
    if in_the_way:
        name, more = in_the_way[0], f" and {len(in_the_way) - 1} more like it" if in_the_way[1:] else ""
        raise DiscoveryError(
            f"{os.path.join(found.target, name)!r}{more} is in the way of what {inputs[name]!r} becomes: no conversion "
            "here is on record to have written it as it is; move it away, or choose another directory for the results"
        )


def _renamed(name: str, to: Optional[str]) -> str:
    return name if to is None else f"{os.path.splitext(name)[0]}.{to}"


def _walk(source: str, folders: Optional[list[str]]) -> list[str]:
    """Files below a directory, relative to it; hidden ones aside. With `folders`, those directly in these folders."""
    if folders is not None:
        return sorted(
            f"{folder}/{child.name}"
            for folder in folders
            for child in discovery.inside(Path(source, folder), Path.is_file)
        )
    found = []

    def refused(error: OSError) -> NoReturn:
        raise storage_error("look into", str(error.filename), error) from error

    for root, inner, names in os.walk(source, onerror=refused):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(root, name), source) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_one_kind(source: str, files: list[str], to: str, same_place: bool) -> list[str]:
    """The files that are not of the wanted format yet. The others may only be results of an earlier run."""
    wanted = [name for name in files if name.endswith(other_suffix(to))]
    results = {_renamed(name, to) for name in wanted} if same_place else set()
    strange = [name for name in files if name not in wanted and name not in results]
    if wanted and strange:
        raise DiscoveryError(
            f"{source!r} holds both .safetensors and .ckpt files ({wanted[0]!r} and {strange[0]!r}), so which ones are "
            "the checkpoint is not clear; select them by file_name_regex, or move the others away"
        )
    return wanted or strange


def other_suffix(to: str) -> str:
    """Suffix of the format that is converted from."""
    return ".ckpt" if to == "safetensors" else ".safetensors"

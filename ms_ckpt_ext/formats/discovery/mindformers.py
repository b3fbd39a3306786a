"""MindFormers' own checkpoint folders: `iteration_00000010/` with `metadata.json`, `common.json` and safetensors.

    root/latest_checkpointed_iteration.txt         the number of the newest one
    root/iteration_%08d/{prefix}-model-{file:07d}-{files:07d}.safetensors     parameters of one or more ranks
    root/iteration_%08d/{prefix}-opt-{file:07d}-{files:07d}.safetensors       optimizer states
    root/iteration_%08d/metadata.json              what file holds which slice; absent when one device saved all whole
    root/iteration_%08d/common.json                training scalars, and whether the training was healthy

Files that the metadata names and that do not exist matter only to whoever wants their parameters: the optimizer's are
often deleted to save space, and weights load without them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import DiscoveryError, FormatError, storage_error
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.discovery.mindformers_metadata import ParameterCut, file_name, layout_of, read_cuts
from ms_ckpt_ext.formats.table import COMMON_NAME, METADATA_NAME, SAFETENSORS, TRACKER_NAME
from ms_ckpt_ext.storage.reader import from_json

__all__ = [
    "COMMON_NAME",
    "METADATA_NAME",
    "ParameterCut",
    "Folder",
    "file_name",
    "find_folder",
    "layout_of",
    "read_common",
    "read_cuts",
]
_ITERATION = re.compile(r"[0-9]{1,18}")
_COUNTS = ("epoch_num", "step_num", "global_step", "global_batch_size")
HEALTHY = 0


class Folder(NamedTuple):
    """A checkpoint folder.

    Attributes:
        path: the folder of one iteration.
        files: name -> path of every safetensors file that belongs to it and is there: those that the metadata names,
            and others of MindFormers, which hold what no metadata lists.
        cuts: parameter -> how it lies in the files; None when every file holds whole parameters.
    """

    path: str
    files: dict[str, str]
    cuts: Optional[dict[str, ParameterCut]]


def find_folder(directory: str) -> Optional[Folder]:
    """The checkpoint in `directory`, an iteration's folder or the root above it; None when it is neither.

    Raises:
        DiscoveryError: no file that the metadata names is there, or the newest iteration is gone; or the files are
            those of several ranks, and nothing states how they are cut.
        FormatError, StrategyError: as `read_cuts`; or the newest iteration is not a number.
    """
    root = Path(directory)
    tracker = root / TRACKER_NAME
    if os.path.isfile(tracker):
        root = _newest(tracker)
    names = [path.name for path in rank_folders.inside(root, Path.is_file)] if os.path.isdir(root) else []
    files = {name: str(root / name) for name in names if name.endswith(SAFETENSORS.suffix)}
    if METADATA_NAME not in names:
        return _whole(root, files)
    cuts = read_cuts(str(root / METADATA_NAME))
    if cuts is None:
        return None
    named = sorted({file for cut in cuts.values() for holders in cut.holders.values() for file in holders})
    held = {name: files[name] for name in named if name in files}
    if not held:
        told = f"names {len(named)} files, {named[0]!r} and so on" if named else "names no file"
        raise DiscoveryError(
            f"{str(root / METADATA_NAME)!r} {told}, and {str(root)!r} holds none of these: the save did not finish, or "
            "files were moved; use another iteration"
        )
    prefixes = {_prefix(name) for name in held} - {None}
    beside = {name: path for name, path in files.items() if _prefix(name) in prefixes}
    aside = sorted(files.keys() - held.keys() - beside.keys())
    if aside:
        log.warning("%r has files that no %s names, such as %r: left aside", str(root), METADATA_NAME, aside[0])
    return Folder(str(root), dict(sorted({**held, **beside}.items())), cuts)


def _prefix(file: str) -> Optional[str]:
    told = file_name(file)
    return None if told is None else told.prefix


def _whole(root: Path, files: dict[str, str]) -> Optional[Folder]:
    """The folder of what one device saved; None when the files are not MindFormers'."""
    told = {name: file_name(name) for name in files}
    totals = sorted({name.total for name in told.values() if name is not None})
    if not files or None in told.values():
        return None
    prefixes = sorted({name.prefix for name in told.values() if name is not None})
    if prefixes[1:]:
        raise DiscoveryError(
            f"{str(root)!r} holds files of several checkpoints, {prefixes[0]!r} and {prefixes[1]!r} by their names; "
            "keep those that are meant, and move the others away"
        )
    if totals != [1]:
        raise DiscoveryError(
            f"{str(root)!r} holds files of {totals[-1]} ranks, such as {next(iter(files))!r}, and no {METADATA_NAME} "
            "that says how they are cut: the save did not finish, or it was lost; restore it, or use another iteration"
        )
    return Folder(str(root), files, None)


def _newest(tracker: Path) -> Path:
    from ms_ckpt_ext.storage.linux import read_small

    try:
        text = read_small(tracker)[:100].decode("utf-8", "replace").strip()
    except OSError as error:
        raise storage_error("read", str(tracker), error) from error
    if not _ITERATION.fullmatch(text):
        raise FormatError(
            f"{str(tracker)!r} should hold the number of the newest iteration, and holds {text!r}: restore it, or give "
            "the folder of an iteration"
        )
    folder = tracker.parent / f"iteration_{int(text):08d}"
    if not folder.is_dir():
        raise DiscoveryError(
            f"{str(tracker)!r} says the newest iteration is {text!r}, but there is no {folder.name!r} beside it; "
            "give the folder of an iteration that is there"
        )
    if complaint(str(folder)):
        log.warning("%r is the newest iteration, and taken, but %s", str(folder), complaint(str(folder)))
    return folder


def read_common(folder: str) -> Mapping[str, Union[int, float, str]]:
    """The training scalars of an iteration's `common.json`, without those that are null; empty when there is no file.

    Raises:
        FormatError: it is not JSON, or what should be a number is not one.
    """
    path = os.path.join(folder, COMMON_NAME)
    if not os.path.isfile(path):
        return {}
    from ms_ckpt_ext.storage.linux import read_small

    try:
        held: Any = from_json(read_small(path))
        if not isinstance(held, dict):
            raise ValueError(f"a dictionary is expected, and it holds a {type(held).__name__}")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path!r} is not what MindFormers writes ({error}); use another iteration") from error
    told = {name: value for name, value in held.items() if value is not None}
    for name, value in told.items():
        counts = name in _COUNTS and not (type(value) is int and 0 <= value < 1 << 63)
        if counts or (name in ("loss_scale", "ckpt_status") and not _is_finite(value)):
            raise FormatError(f"{path!r} says that {name} is {value!r:.60}, which is impossible; use another iteration")
    return {name: value for name, value in told.items() if isinstance(value, (int, float, str))}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < math.inf and abs(value) < 1 << 1000


def complaint(folder: str) -> str:
    """Why an iteration's `common.json` speaks against using it; "" when it does not.

    MindFormers' health monitor notes 0 for a healthy checkpoint, and null where it did not check.
    """
    try:
        status = read_common(folder).get("ckpt_status", HEALTHY)
    except FormatError as error:
        return str(error)
    if status == HEALTHY:
        return ""
    return (
        f"its {COMMON_NAME} says ckpt_status {status!r}: MindFormers judged the training unhealthy when it was saved "
        "(0 is healthy)"
    )

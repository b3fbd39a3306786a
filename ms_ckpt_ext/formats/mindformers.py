"""MindFormers' own checkpoint folders: `iteration_00000010/` with `metadata.json`, `common.json` and safetensors.

    root/latest_checkpointed_iteration.txt         the number of the newest one
    root/iteration_%08d/{prefix}-model-{file:07d}-{files:07d}.safetensors     parameters of one or more ranks
    root/iteration_%08d/{prefix}-opt-{file:07d}-{files:07d}.safetensors       optimizer states
    root/iteration_%08d/metadata.json              who holds which slice; absent when one device saved everything whole
    root/iteration_%08d/common.json                training scalars; not needed here

`metadata.json` says for every parameter its full shape, its layout in MindSpore's terms, and for every slice the files
that hold it. A slice is named by `global_offset`, which is no offset: it is the slice's number, row-major over the grid
of slices. Read with MindFormers 2.0 and 2.1 at hand; both write the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.layout import Cell, Layout, whole
from ms_ckpt_ext.core.region import Shape
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, FormatError, StrategyError
from ms_ckpt_ext.formats import discovery

METADATA_NAME = "metadata.json"
COMMON_NAME = "common.json"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
_FILE = re.compile(r"-(model|opt)-\d{7}-\d{7}\.safetensors$")


class Cut(NamedTuple):
    """One parameter of a folder: its full shape, how it is cut, and which files (by name) hold every slice."""

    shape: Shape
    layout: Layout
    holders: Mapping[Cell, tuple[str, ...]]


class Folder(NamedTuple):
    """A checkpoint folder.

    Attributes:
        path: the folder of one iteration.
        files: name -> path of every safetensors file.
        cuts: parameter -> how it lies in the files; None when every file holds whole parameters.
    """

    path: str
    files: dict[str, str]
    cuts: Optional[dict[str, Cut]]


def find_folder(directory: str) -> Optional[Folder]:
    """The checkpoint in `directory`, an iteration's folder or the root above; None when it is no such directory.

    Raises:
        DiscoveryError: a file that the metadata names is not there, or the newest iteration is gone.
        FormatError, StrategyError: as `read_cuts`.
    """
    root = Path(directory)
    tracker = root / TRACKER_NAME
    if os.path.isfile(tracker):
        root = _newest(tracker)
    names = [path.name for path in discovery.inside(root, Path.is_file)] if os.path.isdir(root) else []
    files = {name: str(root / name) for name in names if name.endswith(".safetensors")}
    if METADATA_NAME not in names:
        ours = bool(files) and all(_FILE.search(name) for name in files)
        return Folder(str(root), files, None) if ours else None
    cuts = read_cuts(str(root / METADATA_NAME))
    if cuts is None:
        return None
    named = {file for cut in cuts.values() for holders in cut.holders.values() for file in holders}
    absent = sorted(named - set(files))
    if absent:
        raise DiscoveryError(
            f"{str(root / METADATA_NAME)!r} names {len(absent)} files that {str(root)!r} does not hold, the first is "
            f"{absent[0]!r}: the save did not finish, or files were moved; use another iteration"
        )
    return Folder(str(root), {name: files[name] for name in sorted(named)}, cuts)


def _newest(tracker: Path) -> Path:
    text = tracker.read_text(encoding="utf-8").strip()
    folder = tracker.parent / f"iteration_{int(text) if text.isdigit() else -1:08d}"
    if not folder.is_dir():
        raise DiscoveryError(
            f"{str(tracker)!r} says the newest iteration is {text!r}, but there is no {folder.name!r} beside it; "
            "give the folder of an iteration that is there"
        )
    return folder


def read_cuts(path: str) -> Optional[dict[str, Cut]]:
    """The parameters of a `metadata.json`; None when the file is something else of that name.

    Raises:
        FormatError: it is not JSON, or lacks something; names the parameter.
        StrategyError: a layout that this package does not know how to cut, such as an interleaved one; names it too.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path!r} is not readable JSON ({error}); use another iteration") from error
    if not isinstance(content, dict) or not {"state_dict_metadata", "storage_data"} <= content.keys():
        return None
    try:
        holders = _holders(content["storage_data"])
        return {name: _cut(name, entry, holders, path) for name, entry in content["state_dict_metadata"].items()}
    except (AttributeError, KeyError, TypeError, SyntaxError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise FormatError(f"{path!r} is not laid out as MindFormers does ({type(error).__name__}: {error})") from error


def _holders(storage: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, int], tuple[str, ...]]:
    """(parameter, number of the slice) -> files."""
    import ast  # here, for few folders are MindFormers's

    found = {}
    for key, places in storage.items():
        name, offset = ast.literal_eval(key)
        names = tuple(dict.fromkeys(place["file_name"] for place in places))
        for file in names:
            if not isinstance(file, str) or os.path.basename(file) != file:
                raise FormatError(f"slice {key} lies in {file!r}, which is not the name of a file beside the metadata")
        found[name, int(offset[0])] = names
    return found


def _cut(name: str, entry: Mapping[str, Any], holders: Mapping[tuple[str, int], tuple[str, ...]], path: str) -> Cut:
    shape = tuple(int(extent) for extent in entry["global_shape"] or ())
    raw = entry["layout"]
    layout = whole(len(shape)) if raw is None else layout_of(name, raw, path)
    if len(layout.parts) != len(shape):
        raise FormatError(
            f"{path!r}: parameter {name!r} has shape {list(shape)} and a layout of {len(layout.parts)} axes"
        )
    cells = {}
    for chunk in entry["chunk"]:
        number = int(chunk["global_offset"][0])
        local = tuple(int(extent) for extent in chunk["local_shape"] or ())
        if local != layout.slice_shape(shape):
            raise FormatError(
                f"{path!r}: slice {number} of {name!r} has shape {list(local)}, but its layout cuts {list(shape)} into "
                f"slices of {list(layout.slice_shape(shape))}"
            )
        cells[_cell(number, layout.parts)] = holders.get((name, number), ())
    return Cut(shape, layout, cells)


def _cell(number: int, parts: Shape) -> Cell:
    """The slice's place in the grid: row-major."""
    cell = []
    for extent in reversed(parts):
        number, index = divmod(number, extent)
        cell.append(index)
    return tuple(reversed(cell))


def layout_of(name: str, raw: Mapping[str, Any], origin: str) -> Layout:
    """A layout as `mindspore.Layout.to_dict` gives it.

    Raises:
        StrategyError: an interleaved layout, or ranks that are no pipeline stage in order.
    """
    if raw.get("interleaved_parallel"):
        raise StrategyError(
            f"{origin}: parameter {name!r} has an interleaved_parallel layout, which is not cut into boxes; "
            "save without interleaving, or load it with MindFormers' own loader"
        )
    ranks = list(raw["rank_list"])
    if ranks != list(range(ranks[0], ranks[0] + len(ranks))) or ranks[0] % len(ranks):
        raise StrategyError(
            f"{origin}: parameter {name!r} lies on ranks {ranks[:8]}, which are no pipeline stage in order; "
            "load it with MindFormers' own loader"
        )
    groups = ((value,) if isinstance(value, int) else tuple(value) for value in raw["tensor_map"])
    layout = Layout(
        tuple(int(extent) for extent in raw["device_matrix"]),
        tuple(tuple(int(axis) for axis in group if axis != -1) for group in groups),
    )
    if layout.devices != len(ranks):
        raise StrategyError(f"{origin}: parameter {name!r}: {layout.devices} devices, but {len(ranks)} ranks")
    return layout

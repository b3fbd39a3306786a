"""MindFormers' checkpoint folders as a source: which file holds which slice of which parameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.layout import Cell, layout_from_json
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, LayoutItem, Strategy
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.engine.source.sharded import Outside, outside_of
from ms_ckpt_ext.errors import LayoutMismatchError, StrategyError
from ms_ckpt_ext.formats.discovery.mindformers import METADATA_NAME, Folder, ParameterCut, file_name
from ms_ckpt_ext.formats.index import FileIndex


class FolderContents(NamedTuple):
    """What a folder holds; see `catalog.Catalog` for the words.

    Attributes:
        tensors: parameters that are there with all their slices.
        absent: where the others should be.
        outside: what the files hold beside the parameters that the metadata lists.
        strategy: the layouts of those; None where every file holds whole parameters.
        ranks: rank -> number of its file.
    """

    tensors: dict[str, SourceTensor]
    absent: dict[str, str]
    outside: Outside
    strategy: Optional[Strategy]
    ranks: dict[int, int]


def folder_contents(index_of: Mapping[str, FileIndex], folder: Folder) -> FolderContents:
    """Every parameter of a folder, from the headers of its files (by name).

    Raises:
        LayoutMismatchError: a slice's shape or dtype contradicts the metadata, or two files hold a whole parameter.
    """
    indexes = tuple(index_of.values())
    if folder.cuts is None:
        return FolderContents(_whole_tensors(indexes, folder), {}, Outside({}, {}, {}), None, {})
    numbers = {file: number for number, file in enumerate(index_of)}
    tensors: dict[str, SourceTensor] = {}
    absent: dict[str, str] = {}
    for name, cut in folder.cuts.items():
        holders = _holders(name, cut, numbers, indexes)
        lacking = _lacking(cut, holders, numbers)
        if lacking:
            absent[name] = f"{lacking}: restore it, or use another iteration than {folder.path!r}"
        else:
            tensors[name] = _cut_tensor(name, cut, holders, indexes)
    strategy = _strategy(folder)
    if strategy is None:
        return FolderContents(tensors, absent, Outside({}, {}, {}), None, {})
    weights, states = _of_kind("model", numbers), _of_kind("opt", numbers)
    parts = [outside_of(indexes, ranks, folder.cuts.keys()) for ranks in (weights, states)]
    outside = Outside(*({**one, **other} for one, other in zip(*parts)))  # an optimizer's file leaves out the network's
    return FolderContents(tensors, absent, outside, strategy, weights or states)


def cuts_to_json(folder: Folder) -> Any:
    """How the parameters of a folder are cut, for other hosts; file names once each."""
    if folder.cuts is None:
        return None
    files: dict[str, int] = {}
    cuts = [
        [
            name,
            cut.shape,
            cut.layout,
            [[cell, [files.setdefault(file, len(files)) for file in held]] for cell, held in cut.holders.items()],
            cut.stage,
        ]
        for name, cut in folder.cuts.items()
    ]
    return [list(files), cuts]


def cuts_from_json(raw: Any) -> Optional[dict[str, ParameterCut]]:
    """What `cuts_to_json` was given."""
    if raw is None:
        return None
    files, cuts = raw
    return {
        name: ParameterCut(
            tuple(shape),
            layout_from_json(layout),
            {tuple(cell): tuple(files[number] for number in held) for cell, held in holders},
            stage,
        )
        for name, shape, layout, holders, stage in cuts
    }


def _of_kind(kind: str, numbers: Mapping[str, int]) -> dict[int, int]:
    """Rank -> number of its file of this kind. Only saves with replicas hold what no metadata lists, and number so."""
    told = ((file_name(file), number) for file, number in numbers.items())
    return {name.number: number for name, number in told if name is not None and name.kind == kind}


def _strategy(folder: Folder) -> Optional[Strategy]:
    """The layouts of a folder as a strategy; None where there is none, or stages of several sizes."""
    items = [
        LayoutItem(name, cut.stage, cut.layout) for name, cut in (folder.cuts or {}).items() if cut.stage is not None
    ]
    try:
        return Strategy.from_items(items, f"{METADATA_NAME} of {folder.path!r}")
    except StrategyError:
        return None


def _whole_tensors(indexes: tuple[FileIndex, ...], folder: Folder) -> dict[str, SourceTensor]:
    """One device saved everything, parameters in one file and optimizer states in another."""
    held: dict[str, SourceTensor] = {}
    for number, index in enumerate(indexes):
        for name, entry in index.tensors.items():
            if name in held:
                raise LayoutMismatchError(
                    f"parameter {name!r} is in {index.path!r} and in another file of {folder.path!r}, and there is no "
                    f"{METADATA_NAME} to say how it is cut; restore that file"
                )
            if not name.startswith(ACCUMULATED_GRADIENT_PREFIX):
                held[name] = stored_whole(TensorMeta(name, entry.dtype, entry.shape), (number,))
    return held


def _holders(
    name: str, cut: ParameterCut, numbers: Mapping[str, int], indexes: Sequence[FileIndex]
) -> dict[Cell, tuple[int, ...]]:
    """The files, by number, that hold a slice as the metadata says."""
    return {
        cell: tuple(n for n in map(numbers.get, files) if n is not None and name in indexes[n].tensors)
        for cell, files in cut.holders.items()
    }


def _lacking(cut: ParameterCut, holders: Mapping[Cell, tuple[int, ...]], numbers: Mapping[str, int]) -> str:
    """Where the first slice that no file holds should be; "" when all are there."""
    for number, cell in enumerate(itertools.product(*map(range, cut.layout.parts))):
        if holders.get(cell):
            continue
        slice_ = f"slice {number} of {math.prod(cut.layout.parts)}"
        files = cut.holders.get(cell)
        if not files:
            return f"several files, and {METADATA_NAME} names none for {slice_}"
        there = next((file for file in files if file in numbers), None)
        why = "is not there" if there is None else "does not hold it"
        return f"{(there or files[0])!r} ({slice_}, says {METADATA_NAME}), which {why}"
    return ""


def _cut_tensor(
    name: str, cut: ParameterCut, holders: Mapping[Cell, tuple[int, ...]], indexes: Sequence[FileIndex]
) -> SourceTensor:
    entries = [(indexes[number], indexes[number].tensors[name]) for files in holders.values() for number in files]
    dtype, wanted = entries[0][1].dtype, cut.layout.slice_shape(cut.shape)
    for index, entry in entries:
        if (entry.dtype, entry.shape) != (dtype, wanted):
            raise LayoutMismatchError(
                f"parameter {name!r} is {entry.dtype.name}{list(entry.shape)} in {index.path!r}, but "
                f"{METADATA_NAME} says {dtype.name}{list(wanted)}: "
                "the files do not belong together; use another iteration"
            )
    placement = Placement(cut.layout.parts, holders, cut.layout.holders)
    return SourceTensor(TensorMeta(name, dtype, cut.shape), name, (placement,))

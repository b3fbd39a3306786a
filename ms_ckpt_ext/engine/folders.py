"""MindFormers' checkpoint folders as a source: which file holds which slice of which parameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ms_ckpt_ext.core.layout import Cell
from ms_ckpt_ext.core.plan import Placement, SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.core.strategy import ACCUMULATED_GRADIENT_PREFIX
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.mindformers import METADATA_NAME, Cut, Folder


class Contents(NamedTuple):
    """Parameters that are there with all their slices, and where the others should be: see `catalog.Catalog`."""

    tensors: dict[str, SourceTensor]
    absent: dict[str, str]


def folder_contents(index_of: Mapping[str, FileIndex], folder: Folder) -> Contents:
    """Every parameter of a folder, from the headers of its files (by name).

    Raises:
        LayoutMismatchError: a slice's shape or dtype contradicts the metadata, or two files hold a whole parameter.
    """
    if folder.cuts is None:
        return Contents(_whole_tensors(tuple(index_of.values()), folder), {})
    found = Contents({}, {})
    numbers = {file: number for number, file in enumerate(index_of)}
    for name, cut in folder.cuts.items():
        holders = _holders(name, cut, numbers, tuple(index_of.values()))
        lacking = _lacking(cut, holders, numbers)
        if lacking:
            found.absent[name] = f"{lacking}: restore it, or use another iteration than {folder.path!r}"
        else:
            found.tensors[name] = _cut_tensor(name, cut, holders, tuple(index_of.values()))
    return found


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
    name: str, cut: Cut, numbers: Mapping[str, int], indexes: Sequence[FileIndex]
) -> dict[Cell, tuple[int, ...]]:
    """The files, by number, that hold a slice as the metadata says."""
    return {
        cell: tuple(n for n in map(numbers.get, files) if n is not None and name in indexes[n].tensors)
        for cell, files in cut.holders.items()
    }


def _lacking(cut: Cut, holders: Mapping[Cell, tuple[int, ...]], numbers: Mapping[str, int]) -> str:
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
    name: str, cut: Cut, holders: Mapping[Cell, tuple[int, ...]], indexes: Sequence[FileIndex]
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

"""MindFormers' checkpoint folders as a source: which file holds which slice of which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

from ms_ckpt_ext.core.layout import Cell
from ms_ckpt_ext.core.plan import Placement, SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.core.strategy import ACCUMULATED_GRADIENT_PREFIX
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.mindformers import METADATA_NAME, Cut, Folder


def folder_tensors(index_of: Mapping[str, FileIndex], folder: Folder) -> dict[str, SourceTensor]:
    """Every parameter of a folder, from the headers of its files (by name).

    Raises:
        LayoutMismatchError: a slice's shape or dtype contradicts the metadata, or two files hold a whole parameter.
    """
    indexes = tuple(index_of.values())
    if folder.cuts is None:
        return _whole_tensors(indexes, folder)
    numbers = {file: number for number, file in enumerate(index_of)}
    return {
        name: _cut_tensor(name, cut, numbers, indexes)
        for name, cut in folder.cuts.items()
        if not name.startswith(ACCUMULATED_GRADIENT_PREFIX) and any(cut.holders.values())
    }


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


def _cut_tensor(name: str, cut: Cut, numbers: Mapping[str, int], indexes: tuple[FileIndex, ...]) -> SourceTensor:
    holders: dict[Cell, tuple[int, ...]] = {}
    first: Optional[tuple[int, TensorEntry]] = None
    for cell, files in cut.holders.items():
        for file in files:
            number = numbers[file]
            entry = indexes[number].tensors.get(name)
            if entry is None:
                continue
            first = first or (number, entry)
            if (entry.dtype, entry.shape) != (first[1].dtype, cut.layout.slice_shape(cut.shape)):
                raise LayoutMismatchError(
                    f"parameter {name!r} is {entry.dtype.name}{list(entry.shape)} in {indexes[number].path!r}, but "
                    f"{METADATA_NAME} says {first[1].dtype.name}{list(cut.layout.slice_shape(cut.shape))}: "
                    "the files do not belong together; use another iteration"
                )
            holders[cell] = (*holders.get(cell, ()), number)
    if first is None:
        raise LayoutMismatchError(
            f"{METADATA_NAME} lists parameter {name!r}, but none of its files holds it; "
            "the files do not belong together: use another iteration"
        )
    placement = Placement(cut.layout.parts, holders, cut.layout.holders)
    return SourceTensor(TensorMeta(name, first[1].dtype, cut.shape), name, (placement,))

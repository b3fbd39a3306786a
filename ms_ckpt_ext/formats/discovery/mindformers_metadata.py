"""MindFormers' `metadata.json`: how every parameter of a folder is cut, and which file holds which slice.

    state_dict_metadata   name -> full shape, layout in MindSpore's terms, and the slices that there are ("chunk")
    storage_data          "('name', (slice,))" -> the files that hold the slice, who saved each, and whose slice it is

A slice is named by `global_offset`, which is not an offset but the slice's number, row-major over the grid of slices.
Much is stated twice, and both statements are compared. Errors are: a number that the layout does not have, two slices
of a parameter in one file (which holds one tensor of a name), a rank that has another slice by its layout, files of
ranks in another order. A missing slice or file is not judged here: whoever serves weights needs no optimizer states.

This follows MindFormers 2.0 and 2.1, which write the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, digits, whole
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX
from ms_ckpt_ext.errors import CheckpointError, FormatError, StrategyError, name_ranks
from ms_ckpt_ext.formats.table import MINDFORMERS_FILE
from ms_ckpt_ext.storage.reader import from_json

_OTHER = "the file is damaged or was edited: restore it, or use another iteration"
_JUNK = (AttributeError, KeyError, IndexError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError)
"""What may be raised by JSON of another structure."""
_LONGEST_KEY = 1 << 16
_SHOWN = 400


class ParameterCut(NamedTuple):
    """One parameter of a folder: its full shape, how it is cut, and which files (by name) hold the slices listed.

    `stage` is the pipeline stage of its layout; None where there is no layout, and the parameter is whole.
    """

    shape: Shape
    layout: Layout
    holders: Mapping[Cell, tuple[str, ...]]
    stage: Optional[int]


class FileName(NamedTuple):
    """What a file's name says: `{prefix}-{kind}-{number}-{total}.safetensors`, or without a prefix."""

    prefix: str
    kind: str
    number: int
    total: int


class _Place(NamedTuple):
    """A file that holds a slice; the rank that saved it and all ranks whose slice it is, where that is stated."""

    file: str
    saved_by: Optional[int]
    ranks: tuple[int, ...]


_Places = dict[str, dict[int, tuple[_Place, ...]]]
"""Parameter -> number of the slice -> the files that hold it."""
_Wrong = Callable[[str], FormatError]
"""Makes the error that names the parameter, from what is wrong with it."""


def file_name(file: str) -> Optional[FileName]:
    """What a file's name says, None when it is not MindFormers'.

    >>> file_name("qwen3-opt-0000001-0000004.safetensors")
    FileName(prefix='qwen3', kind='opt', number=1, total=4)
    """
    found = MINDFORMERS_FILE.search(file)
    return None if found is None else FileName(file[: found.start()], found[1], int(found[2]), int(found[3]))


def read_cuts(path: str) -> Optional[dict[str, ParameterCut]]:
    """The parameters of a `metadata.json`, accumulated gradients aside; None when it is another program's.

    Raises:
        FormatError: it is not JSON, lacks something, or contradicts itself; names the parameter.
        StrategyError: a layout that this package does not know how to cut, such as an interleaved one; names it, too.
    """
    from ms_ckpt_ext.storage.linux import read_small

    try:
        content = from_json(read_small(path))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path!r} is not readable JSON ({error}); use another iteration") from error
    if not isinstance(content, dict) or not {"state_dict_metadata", "storage_data"} <= content.keys():
        return None
    try:
        return _cuts(content["state_dict_metadata"], _places(content["storage_data"]), path)
    except _JUNK as error:
        if isinstance(error, CheckpointError):
            raise
        raise FormatError(f"{path!r} is not laid out as MindFormers does ({type(error).__name__}: {error})") from error


def _cuts(entries: Mapping[str, Mapping[str, Any]], places: _Places, path: str) -> dict[str, ParameterCut]:
    _check_files((place for slices in places.values() for held in slices.values() for place in held), path)
    cuts = {}
    for name, entry in entries.items():
        if not name.startswith(ACCUMULATED_GRADIENT_PREFIX):
            try:
                cuts[name] = _cut(name, entry, places.get(name, {}), path)
            except _JUNK as error:
                if isinstance(error, (FormatError, StrategyError)):
                    raise
                raise FormatError(f"{path!r}: parameter {name!r}: {type(error).__name__}: {error}") from error
    for name in places:
        if name not in entries and not name.startswith(ACCUMULATED_GRADIENT_PREFIX):
            raise FormatError(f"{path!r} says in which files parameter {name!r} lies, but not how it is cut; {_OTHER}")
    return cuts


def _places(storage: Mapping[str, Any]) -> _Places:
    found: _Places = {}
    for key, held in storage.items():
        name, offset = _slice_named(key)
        slices = found.setdefault(name, {})
        number = _number(offset)
        if number in slices:
            raise ValueError(f"{key[:_SHOWN]} occurs twice")
        slices[number] = tuple(dict.fromkeys(_place(key, entry) for entry in held))
    return found


def _slice_named(key: str) -> tuple[str, Any]:
    """The parameter and the number of its slice, from the text of a tuple of both."""
    from ast import literal_eval  # imported here, for few folders are MindFormers'

    try:
        name, offset = literal_eval(key) if len(key) <= _LONGEST_KEY else (None, None)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # their texts hold addresses
        name, offset = None, None
    if not isinstance(name, str):
        raise ValueError(f"{key[:_SHOWN]!r} names no slice of a parameter, such as \"('w', (0,))\"")
    return name, offset


def _place(key: str, entry: Mapping[str, Any]) -> _Place:
    file, saved_by = entry["file_name"], entry.get("storage_rank")
    if not isinstance(file, str) or os.path.basename(file) != file or not file:
        raise FormatError(
            f"slice {key[:_SHOWN]} lies in {file!r:.200}, which is not the name of a file beside the metadata"
        )
    ranks = _ints(entry.get("rank_group") or ())
    return _Place(file, None if saved_by is None else _ints([saved_by])[0], ranks)


def _number(offset: Any) -> int:
    """The number of a slice; a whole parameter's may be given per axis, all 0."""
    numbers = _ints(offset)
    if len(numbers) > 1 and not any(numbers):
        return 0
    (number,) = numbers
    return number


def _ints(values: Any) -> tuple[int, ...]:
    """Whole numbers of at least 0. Raises TypeError or ValueError: JSON's true and 1.5 are none."""
    found = tuple(values)
    if not all(type(value) is int for value in found):
        raise TypeError(f"{values!r} should be whole numbers")
    if any(value < 0 for value in found):
        raise ValueError(f"{values!r} should not be negative")
    return found


def _check_files(places: Iterable[_Place], path: str) -> None:
    """A file is saved by one rank, and files are numbered in the order of ranks: all, or those that save anything."""
    saved_by: dict[str, int] = {}
    for place in places:
        if place.saved_by is not None and saved_by.setdefault(place.file, place.saved_by) != place.saved_by:
            both = name_ranks(sorted((saved_by[place.file], place.saved_by)))
            raise FormatError(
                f"{path!r} says that {place.file!r} was saved by {both}, and a file is one rank's; {_OTHER}"
            )
    rank_of: dict[str, dict[int, int]] = {}
    totals: dict[str, set[int]] = {}
    for file, rank in saved_by.items():
        told = file_name(file)
        if told is not None:
            rank_of.setdefault(told.kind, {})[told.number] = rank
            totals.setdefault(told.kind, set()).add(told.total)
    for kind, ranks in rank_of.items():
        numbers, in_order = sorted(ranks), [ranks[number] for number in sorted(ranks)]
        all_numbers = len(numbers) == max(totals[kind]) and numbers == list(range(len(numbers)))
        as_named = max(numbers) < max(totals[kind]) and numbers == in_order
        if len(totals[kind]) > 1 or not (as_named or (all_numbers and in_order == sorted(set(in_order)))):
            raise FormatError(
                f"{path!r} says that the {kind} files {numbers} of {sorted(totals[kind])} were saved by ranks "
                f"{in_order}, which contradicts their names; {_OTHER}"
            )


def _cut(name: str, entry: Mapping[str, Any], places: Mapping[int, tuple[_Place, ...]], path: str) -> ParameterCut:
    def wrong(what: str) -> FormatError:
        return FormatError(f"{path!r}: parameter {name!r} {what}; {_OTHER}")

    shape = _ints(entry["global_shape"] or ())
    layout = whole(len(shape)) if entry["layout"] is None else layout_of(name, entry["layout"], path)
    if len(layout.parts) != len(shape):
        raise wrong(f"has shape {list(shape)} and a layout of {len(layout.parts)} axes")
    if _ints(entry.get("axis_fragmentations") or layout.parts) != layout.parts:
        raise wrong(
            f"is cut {list(layout.parts)} by its layout, and {entry['axis_fragmentations']} by its fragmentations"
        )
    listed = _listed(entry["chunk"], shape, layout, wrong)
    count = math.prod(layout.parts)
    beyond = sorted(number for number in (*listed, *places) if number >= count)
    if beyond:
        raise wrong(f"has a slice {beyond[0]}, but its layout cuts it into {count}, numbered from 0")
    _check_places({number: places.get(number, ()) for number in listed}, layout, wrong)
    files = {number: tuple(place.file for place in places.get(number, ())) for number in listed}
    stage = None if entry["layout"] is None else entry["layout"]["rank_list"][0] // layout.devices
    return ParameterCut(shape, layout, {digits(number, layout.parts): held for number, held in files.items()}, stage)


def _listed(chunks: Iterable[Mapping[str, Any]], shape: Shape, layout: Layout, wrong: _Wrong) -> list[int]:
    """The numbers of the slices that exist; raises where a shape is not what the layout makes."""
    slice_shape, numbers = layout.slice_shape(shape), []
    for chunk in chunks:
        number, local = _number(chunk["global_offset"]), _ints(chunk["local_shape"] or ())
        if local != slice_shape:
            raise wrong(
                f"has a slice {number} of shape {list(local)}, but its layout cuts {list(shape)} into slices of "
                f"{list(slice_shape)}"
            )
        numbers.append(number)
    return numbers


def _check_places(places: Mapping[int, tuple[_Place, ...]], layout: Layout, wrong: _Wrong) -> None:
    """A file holds one slice; its ranks are those whose cell that is, and the rank that saved it is one of them."""
    first: dict[str, int] = {}
    for number, held in places.items():
        for file, saved_by, ranks in held:
            if first.setdefault(file, number) != number:
                both = f"{first[file]} and {number}"
                raise wrong(f"has its slices {both} in {file!r}, and a file holds one tensor of a name")
            told = ranks if saved_by is None else (*ranks, saved_by)
            odd = [rank for rank in told if _of_rank(rank, layout) != digits(number, layout.parts)]
            if odd:
                raise wrong(f"has its slice {number} on rank {odd[0]} ({file!r}), whose slice is another by the layout")
            if ranks and saved_by is not None and saved_by not in ranks:
                raise wrong(f"has its slice {number} on {name_ranks(ranks)}, and rank {saved_by} saved it in {file!r}")


def _of_rank(rank: int, layout: Layout) -> Cell:
    """The cell of a rank of any pipeline stage: stages are cut alike."""
    return layout.cells[rank % layout.devices]


def layout_of(name: str, raw: Mapping[str, Any], origin: str) -> Layout:
    """A layout from what `mindspore.Layout.to_dict` returns.

    Raises:
        StrategyError: an interleaved layout, ranks that are no pipeline stage in order, or numbers that contradict each
            other.
    """
    if raw.get("interleaved_parallel"):
        raise StrategyError(
            f"{origin}: parameter {name!r} has an interleaved_parallel layout, which is not cut into boxes; "
            "save without interleaving, or load it with MindFormers' own loader"
        )
    ranks = list(_ints(raw["rank_list"]))
    if not ranks or ranks != list(range(ranks[0], ranks[0] + len(ranks))) or ranks[0] % len(ranks):
        raise StrategyError(
            f"{origin}: parameter {name!r} lies on ranks {ranks[:8]}, which are no pipeline stage in order; "
            "load it with MindFormers' own loader"
        )
    groups = ((value,) if isinstance(value, int) else tuple(value) for value in raw["tensor_map"])
    try:
        layout = Layout(
            _ints(raw["device_matrix"]), tuple(_ints(axis for axis in group if axis != -1) for group in groups)
        )
    except StrategyError as error:
        raise StrategyError(f"{origin}: parameter {name!r}: {error}") from error
    if layout.devices != len(ranks):
        raise StrategyError(f"{origin}: parameter {name!r}: {layout.devices} devices, but {len(ranks)} ranks")
    return layout

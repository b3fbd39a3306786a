"""What is in a checkpoint or a strategy, as its headers say.

Of contents, only training scalars are read, and samples of what else lies outside the strategy: do ranks differ in it?
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ms_ckpt_ext.api.arguments import PathLike, any_mode, as_strategy, checked_words, path_of
from ms_ckpt_ext.api.inspection import FileInfo, GroupInfo, Inspection, ParameterInfo, Redundancy
from ms_ckpt_ext.api.source import Filter, Globs, Source, find_source
from ms_ckpt_ext.core.geometry.array import DType, Shape
from ms_ckpt_ext.core.geometry.describe import LayoutInfo, describe, describe_strategy
from ms_ckpt_ext.core.geometry.groups import GROUPS, SCALARS, group_of, natural
from ms_ckpt_ext.core.geometry.layout import Layout, slice_shape
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog, whole_tensor
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, of_rank
from ms_ckpt_ext.engine.source.values import TEXT, bytes_of, decode_text, to_python
from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats import crypto
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.discovery.whole_models import is_map
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import Access, read_indexes
from ms_ckpt_ext.formats.table import FORMATS, STRATEGY, STRATEGY_SUFFIXES, kind_of
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.crypto import KeyLike

_MOST_ELEMENTS = 64
"""A scalar's contents are shown up to this many elements."""


@few_collections()
def inspect(
    path: PathLike,
    *,
    strategy: Any = None,
    match: Globs = (),
    exclude: Globs = (),
    file_suffix: Optional[str] = None,
    format: Optional[str] = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
) -> Inspection:
    """Describe what a checkpoint or a strategy holds.

    Args:
        path: a checkpoint file, rank folders, a merged directory, a strategy file, or a directory of these.
        strategy: of the job that saved rank folders, which gives whole shapes and layouts.
        match, exclude: shell-style globs of parameter names.
        file_suffix: which file of a rank folder; None for the newest.
        format: "safetensors" or "ckpt", where there are both.
        dec_key, dec_mode: of encrypted files; by default the key in MS_CKPT_EXT_DEC_KEY, where needed.

    Returns:
        Files, parameters with dtype, shape, slice and copies, sizes in bytes by group, training scalars, and what ranks
        hold differently outside the strategy.

    Raises:
        DiscoveryError: nothing there that could be inspected.
        DecryptionError: an encrypted file and no key, or a wrong one.
        FormatError, StrategyError, LayoutMismatchError, StorageError: it cannot be read, or contradicts itself.
    """
    checked_words(inspect, locals())
    source, wanted = path_of(path, "path"), Filter(match, exclude)
    if _is_strategy(source):
        from ms_ckpt_ext.formats.strategies.file import load_strategy

        return _of_strategy(source, load_strategy(source), wanted)
    access = any_mode(dec_key, dec_mode)
    known = as_strategy(strategy, argument="strategy")
    if os.path.isdir(source) and known is None:
        loose = _loose_files(source, file_suffix, format)
        if loose:
            return _of_loose(source, loose, access, wanted)
    return _of_catalog(find_source(source, known, file_suffix, access, format), wanted)


def _is_strategy(path: str) -> bool:
    """Whether a path is a strategy file, or a directory with nothing but strategy files of stages."""
    if os.path.isdir(path):
        named = rank_folders.inside(Path(path), Path.is_file)
        files = [str(child) for child in named if child.suffix in STRATEGY_SUFFIXES]
        return bool(files) and not rank_folders.is_sharded(path) and all(map(_is_strategy, files))
    return path.endswith(STRATEGY_SUFFIXES) and kind_of(path) == STRATEGY


def _of_strategy(path: str, strategy: Strategy, wanted: Filter) -> Inspection:
    parameters = _ordered(
        ParameterInfo(name, "", group_of(name, strategy.layouts), None, 0, 0, (), *_expected(stages), _layouts(stages))
        for name, stages in strategy.layouts.items()
        if wanted(name) and not name.startswith(ACCUMULATED_GRADIENT_PREFIX)
    )
    return Inspection(path, "strategy", (), describe_strategy(strategy), parameters, _groups(parameters), {}, None)


def _ordered(parameters: Iterable[ParameterInfo]) -> tuple[ParameterInfo, ...]:
    return tuple(sorted(parameters, key=lambda p: (GROUPS.index(p.group), natural(p.name))))


def _expected(stages: Mapping[int, Any]) -> tuple[int, None, tuple[int, int]]:
    infos = _layouts(stages)
    copies = [info.copies for info in infos]
    return max(math.prod(info.parts) for info in infos), None, (min(copies), max(copies))


def _layouts(stages: Mapping[int, Layout]) -> tuple[LayoutInfo, ...]:
    return _described(tuple(sorted(stages.items(), key=itemgetter(0))))


@lru_cache(maxsize=1024)
def _described(stages: tuple[tuple[int, Layout], ...]) -> tuple[LayoutInfo, ...]:
    return tuple(describe(layout, stage) for stage, layout in stages)


def _loose_files(directory: str, file_suffix: Optional[str], format: Optional[str]) -> dict[str, str]:
    """Files whose slices nothing relates to each other: several rank folders, or several files without a map."""
    if rank_folders.is_sharded(directory):
        if os.path.isfile(os.path.join(directory, rank_folders.MAP_NAME)):
            return {}
        files = rank_folders.rank_files(directory, format, file_suffix)
        return {str(rank): path for rank, path in files.items()} if len(files) > 1 else {}
    if any(is_map(child.name) for child in rank_folders.inside(Path(directory), Path.is_file)):
        return {}
    kinds = FORMATS if format is None else (format,)
    suffixes = tuple(f".{kind}" for kind in kinds)
    paths = {child.name: str(child) for child in rank_folders.inside(Path(directory)) if child.suffix in suffixes}
    files_ = {n: p for n, p in paths.items() if os.path.isfile(p) and not _is_strategy(p)}
    return files_ if len(files_) > 1 else {}


def _of_loose(path: str, files: Mapping[str, str], access: Access, wanted: Filter) -> Inspection:
    indexes = read_indexes(files.values(), access)
    sharded = rank_folders.is_sharded(path)
    held: dict[str, list[FileIndex]] = {}
    for index in indexes:
        for name in filter(wanted, index.tensors):
            held.setdefault(name, []).append(index)
    parameters = _ordered(_loose(name, found, held) for name, found in held.items())
    scalars = [p.name for p in parameters if p.group == SCALARS]
    here = {name: indexes[0].tensors[name] for name in scalars if name in indexes[0].tensors}
    first = Catalog((indexes[0],), {n: whole_tensor(n, entry, [0]) for n, entry in here.items()}, {}, {}, access)
    return Inspection(
        path,
        "sharded" if sharded else "files",
        tuple(_file(i, int(key) if sharded else None) for key, i in zip(files, indexes)),
        None,
        parameters,
        _groups(parameters),
        {**dict.fromkeys(scalars), **_scalars(first, here)},
        None,
    )


def _loose(name: str, files: list[FileIndex], names: Mapping[str, Any]) -> ParameterInfo:
    entries = [index.tensors[name] for index in files]
    shapes = tuple(sorted({entry.shape for entry in entries}))
    stored = sum(entry.nbytes for entry in entries)
    group = SCALARS if math.prod(shapes[0]) == 1 or entries[0].dtype.name == "STR" else group_of(name, names)
    return ParameterInfo(name, entries[0].dtype.name, group, None, stored, stored, shapes, None, None, None)


def _of_catalog(source: Source, wanted: Filter) -> Inspection:
    catalog, strategy = source.open(), source.strategy
    if catalog.unproven:
        from ms_ckpt_ext.engine.unlisted.alike import Depth, compared

        catalog = compared(catalog, depth=Depth.SAMPLES)
    held = wanted.of(catalog.tensors)
    sharded = source.listing.sharded
    inside = _parameters(held, catalog, strategy)
    outside = _parameters(wanted.of(catalog.extras), catalog, None)
    own = [_own(held_, catalog) for held_ in wanted.of(catalog.own).values()]
    parameters = _ordered([*inside, *(_as_scalar(p) for p in (*outside, *own))])
    kind = "sharded" if sharded else "file" if os.path.isfile(source.path) else "merged"
    keys = list(source.listing.files)
    ranks = [int(key) if sharded else None for key in keys]
    return Inspection(
        source.path,
        kind,
        tuple(_file(index, rank) for index, rank in zip(catalog.files, ranks)),
        None if strategy is None else describe_strategy(strategy),
        parameters,
        _groups(parameters),
        _scalars(catalog, [p.name for p in parameters if p.group == SCALARS]),
        None if strategy is None else _redundancy(held.values()),
    )


def _as_scalar(parameter: ParameterInfo) -> ParameterInfo:
    """What lies outside the strategy counts as a training scalar unless it has axes as weights have."""
    few = all(len(shape) < 2 or math.prod(shape) == 1 for shape in parameter.slice_shapes)
    return parameter._replace(group=SCALARS) if few or parameter.dtype == TEXT else parameter


def _own(held: UnlistedTensor, catalog: Catalog) -> ParameterInfo:
    """A parameter that differs by rank: its whole shape and its copies are unknown."""
    entries = [held.entry(catalog.files, rank) for rank in held.files]
    stored = sum(entry.nbytes for entry in entries)
    dtypes = dict.fromkeys(entry.dtype.name for entry in entries)
    return ParameterInfo(
        held.name,
        " or ".join(dtypes),
        group_of(held.name, catalog.tensors),
        None,
        stored,
        stored,
        tuple(sorted({entry.shape for entry in entries})),
        None,
        None,
        None,
        differs=held.differences(),
    )


def _parameters(
    tensors: Mapping[str, SourceTensor], catalog: Catalog, strategy: Optional[Strategy]
) -> Iterator[ParameterInfo]:
    """Describe stored parameters; what those of one dtype, shape and placement share is computed once."""
    known: dict[tuple[int, DType, Shape], _Slices] = {}
    for name, tensor in tensors.items():
        (_, dtype, shape), _, placements, _ = tensor
        slices = known.get((id(placements), dtype, shape))
        if slices is None:
            slices = known[id(placements), dtype, shape] = _slices(tensor)
        lone = strategy is None and (dtype.name == TEXT or math.prod(shape) == 1)
        group = SCALARS if lone else group_of(name, catalog.tensors)
        yield ParameterInfo(
            name, dtype.name, group, *slices, () if strategy is None else _layouts(strategy.layouts[name])
        )


class _Slices(NamedTuple):
    """Fields of `ParameterInfo` that follow from dtype, shape and placement, in their order there."""

    shape: Shape
    nbytes: int
    stored_nbytes: int
    slice_shapes: tuple[Shape, ...]
    slices: int
    copies: tuple[int, int]
    copies_expected: tuple[int, int]


def _slices(tensor: SourceTensor) -> _Slices:
    (_, dtype, shape), placements = tensor.meta, tensor.placements
    held, expected, slices = _copies(tensor)
    stored = [(slice_shape(shape, p.parts), sum(map(len, p.holders.values()))) for p in placements]
    return _Slices(
        shape,
        dtype.nbytes(math.prod(shape)),
        sum(copies * dtype.nbytes(math.prod(each)) for each, copies in stored),
        tuple(sorted({each for each, copies in stored if copies})),
        slices,
        (min(held), max(held)),
        (min(expected), max(expected)),
    )


def _copies(tensor: SourceTensor) -> tuple[list[int], list[int], int]:
    """(files that hold each slice, ranks that should, number of slices); where stages cut alike, they count as one."""
    held = [len(p.holders.get(cell, ())) for p in tensor.placements for cell in p.expected]
    expected = [len(ranks) for p in tensor.placements for ranks in p.expected.values()]
    return held, expected, len(expected)


def _redundancy(tensors: Iterable[SourceTensor]) -> Redundancy:
    slices = stored = expected = missing = 0
    for tensor in tensors:
        held, wanted, count = _copies(tensor)
        slices, stored, expected = slices + count, stored + sum(held), expected + sum(wanted)
        missing += held.count(0)
    return Redundancy(slices, stored, expected, missing)


def _file(index: FileIndex, rank: Optional[int]) -> FileInfo:
    encryption = None
    if index.reader != "plain":
        with open(index.path, "rb") as file:
            encryption = crypto.sniff(file.read(crypto.SNIFF_BYTES))
    return FileInfo(index.path, index.size, rank, len(index.tensors), encryption)


def _groups(parameters: Iterable[ParameterInfo]) -> dict[str, GroupInfo]:
    found: dict[str, list[ParameterInfo]] = {}
    for parameter in parameters:
        found.setdefault(parameter.group, []).append(parameter)
    return {
        name: GroupInfo(len(held), sum(p.nbytes for p in held), sum(p.stored_nbytes for p in held))
        for name, held in found.items()
    }


def _scalars(catalog: Catalog, names: Iterable[str]) -> dict[str, Any]:
    """Contents of small tensors; None for those that are not small, or not readable."""
    found: dict[str, Any] = {}
    with catalog.readers() as readers:
        for name in names:
            held = catalog.own.get(name)
            if held is None:
                found[name] = _contents(catalog, readers, catalog.extras.get(name) or catalog.tensors[name])
            elif len(held.files) > _MOST_ELEMENTS:
                found[name] = None
            else:
                each = {rank: of_rank(held, catalog.files, rank) for rank in held.files}
                found[name] = {rank: _contents(catalog, readers, tensor) for rank, tensor in each.items()}
    return found


def _contents(catalog: Catalog, readers: ReaderPool, tensor: SourceTensor) -> Any:
    dtype, shape = tensor.meta.dtype, tensor.meta.shape
    size = math.prod(shape)
    if size > _MOST_ELEMENTS and dtype.name != TEXT:
        return None
    data = bytes_of(catalog, readers, tensor) if size else b""
    return _text(data) if dtype.name == TEXT else to_python(data, dtype, shape)


def _text(data: bytes) -> Optional[str]:
    """Text as `load` gives it; None for damaged text: the rest of the checkpoint can still be described."""
    try:
        return decode_text(data)
    except FormatError:
        return None

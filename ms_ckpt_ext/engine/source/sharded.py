"""The files of ranks as a source: which of them hold which slice of which parameter, as a strategy says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.layout import Cell, Layout
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, StrategyError, name_ranks
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry

_FEW_RANKS, _RANKS_PER_FILE = 16_384, 1024
"""A strategy of more ranks than both, for the files at hand, is refused: every one costs time for every parameter."""


class ShardedTensors(NamedTuple):
    """The parameters that a strategy lists: those that files hold, and where the others should be."""

    tensors: dict[str, SourceTensor]
    absent: dict[str, str]


def sharded_tensors(indexes: tuple[FileIndex, ...], by_rank: Mapping[int, int], strategy: Strategy) -> ShardedTensors:
    """Every parameter of a sharded checkpoint, from the headers of its files.

    Args:
        by_rank: rank -> number of its file.

    Raises:
        LayoutMismatchError: ranks disagree on a parameter's dtype, or a slice's shape contradicts the strategy.
        StrategyError: the strategy has no parameter in common with the files, or is for fewer stages.
        CoverageError: hardly any rank of a huge strategy has a file.
        DiscoveryError: the names of the files speak of different steps.
    """
    files_by_rank = {rank: indexes[number].path for rank, number in by_rank.items()}
    _check_world(files_by_rank, strategy)
    rank_folders.check_one_step(files_by_rank)
    tensors: dict[str, SourceTensor] = {}
    absent: dict[str, str] = {}
    present = {strategy.stage_of(rank) for rank in by_rank}
    for name, stages in strategy.layouts.items():
        if name.startswith(ACCUMULATED_GRADIENT_PREFIX):
            continue
        tensor = _sharded_tensor(name, stages, strategy, by_rank, indexes)
        if tensor is not None:
            tensors[name] = tensor
        elif present.isdisjoint(stages):
            ranks = [rank for stage in stages for rank in strategy.ranks_of(stage)]
            absent[name] = (
                f"the files of {name_ranks(ranks)}, and none of these is there (the first that is: "
                f"{indexes[0].path!r}): give the files of that pipeline stage as well"
            )
    if not tensors:
        raise StrategyError(
            f"{strategy.origin} and the checkpoint have no parameter in common: the strategy lists "
            f"{_some(strategy.layouts)}, the files hold {_some(n for i in indexes for n in i.tensors)}; "
            "check that the strategy belongs to this model"
        )
    return ShardedTensors(tensors, absent)


def _check_world(files_by_rank: Mapping[int, str], strategy: Strategy) -> None:
    """What a strategy does not know counts as whole on every rank, so one that knows too little would give nonsense."""
    if strategy.world > max(_FEW_RANKS, _RANKS_PER_FILE * len(files_by_rank)):
        raise CoverageError(
            f"{strategy.origin} is for {strategy.world} ranks, of which only {len(files_by_rank)} have files, such "
            f"as {next(iter(files_by_rank.values()))!r}; check that they belong together, and give every rank's file"
        )
    strategy.check_complete()


def _some(names: Iterable[str]) -> str:
    listed = sorted(set(names))
    return ", ".join(map(repr, listed[:3])) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _sharded_tensor(
    name: str,
    stages: Mapping[int, Layout],
    strategy: Strategy,
    by_rank: Mapping[int, int],
    indexes: tuple[FileIndex, ...],
) -> Optional[SourceTensor]:
    first: Optional[tuple[int, TensorEntry]] = None
    full: Optional[tuple[int, ...]] = None
    merged: dict[tuple[int, ...], tuple[dict[Cell, list[int]], dict[Cell, list[int]]]] = {}
    for stage, read in stages.items():
        base = stage * strategy.devices_per_stage
        layout = _over(read, name, range(base, base + read.devices), by_rank, indexes)
        holders, expected = merged.setdefault(layout.parts, ({}, {}))
        entry_here: Optional[TensorEntry] = None
        for local, cell in enumerate(layout.cells):
            expected.setdefault(cell, []).append(base + local)
            number = by_rank.get(base + local)
            entry = None if number is None else indexes[number].tensors.get(name)
            if entry is None or number is None:
                continue
            if first is None:
                first = (number, entry)
            if entry.dtype is not first[1].dtype or (entry_here and entry.shape != entry_here.shape):
                raise _contradiction(name, indexes, first, (number, entry))
            entry_here = entry
            holders.setdefault(cell, []).append(number)
        if entry_here is not None:
            full = _agreed_shape(name, layout, entry_here, full, strategy)
    if first is None or full is None:
        return None
    placements = tuple(
        Placement(parts, {c: tuple(f) for c, f in holders.items()}, {c: tuple(r) for c, r in expected.items()})
        for parts, (holders, expected) in merged.items()
    )
    return SourceTensor(TensorMeta(name, first[1].dtype, full), name, placements)


def _over(
    layout: Layout, name: str, ranks: range, by_rank: Mapping[int, int], indexes: tuple[FileIndex, ...]
) -> Layout:
    """The layout for as many axes as the slices have."""
    if len(layout.tensor_map) < 2:
        return layout
    entries = (indexes[by_rank[rank]].tensors.get(name) for rank in ranks if rank in by_rank)
    return next((layout.over(len(entry.shape)) for entry in entries if entry is not None), layout)


def _agreed_shape(
    name: str, layout: Layout, entry: TensorEntry, full: Optional[tuple[int, ...]], strategy: Strategy
) -> tuple[int, ...]:
    try:
        shape = layout.full_shape(entry.shape)
    except LayoutMismatchError as error:
        raise LayoutMismatchError(
            f"parameter {name!r}: {error}; check that {strategy.origin} belongs to this checkpoint"
        ) from error
    if full is not None and full != shape:
        raise LayoutMismatchError(
            f"parameter {name!r}: its slices make a shape of {list(full)} in one pipeline stage and {list(shape)} in "
            f"another; check that {strategy.origin} belongs to this checkpoint"
        )
    return shape


def _contradiction(
    name: str, indexes: tuple[FileIndex, ...], a: tuple[int, TensorEntry], b: tuple[int, TensorEntry]
) -> LayoutMismatchError:
    def told(at: tuple[int, TensorEntry]) -> str:
        return f"{at[1].dtype.name}{list(at[1].shape)} in {indexes[at[0]].path!r}"

    return LayoutMismatchError(
        f"parameter {name!r} is {told(a)} but {told(b)}; all slices of a parameter have one dtype and shape: "
        "check that the files come from one save and that the strategy belongs to them"
    )

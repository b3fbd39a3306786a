"""The files of ranks as a source: which hold which slice of what the strategy lists, and what they hold beside it.

Of what is not listed headers tell who holds it, and its dtype and shape in each file. Whether the contents are the same
takes reading, so a name is one of three, in a catalog of its own each:

- `extras`: whole and alike wherever it is, so one copy stands for all. Known when there is one holder only, or when
  the copies were compared (`engine.unlisted.alike`).
- `unproven`: several holders, of one dtype and shape, not compared yet.
- `own`: known to differ. Each rank has its own, and no rank's is another's: a frozen parameter that is cut though the
  strategy does not say so, the state of a random generator, a cursor in the data.

One copy never stands for all of what is unproven or own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Optional, TypeVar

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, StrategyError, name_ranks, some
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry

_FEW_RANKS, _RANKS_PER_FILE = 16_384, 1024
"""A strategy of more ranks than the first, and than the second for each file, is refused: every rank costs time for
every parameter."""
_SHOWN = 4


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
            f"{some(sorted(strategy.layouts), 3)}, the files hold "
            f"{some(sorted({name for index in indexes for name in index.tensors}), 3)}; "
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


class Group(NamedTuple):
    """Ranks whose copies are the same: what they hold, in words, and which they are."""

    holds: str
    ranks: tuple[int, ...]


class UnlistedTensor(NamedTuple):
    """One name outside the strategy, in the files of several ranks.

    Attributes:
        name: what it is called.
        stored_name: its name in the files.
        files: rank -> number of the file that holds it, ranks ascending.
        groups: of what differs, the copies that were looked at; () while nothing is known to differ.
        unseen: ranks whose files are not there, and would tell whether it differs.
    """

    name: str
    stored_name: str
    files: Mapping[int, int]
    groups: tuple[Group, ...] = ()
    unseen: tuple[int, ...] = ()

    def entry(self, files: Sequence[FileIndex], rank: int) -> TensorEntry:
        """The tensor in the file of a rank that holds it."""
        return files[self.files[rank]].tensors[self.stored_name]

    def nbytes(self, files: Sequence[FileIndex]) -> int:
        """Bytes of all copies."""
        return sum(self.entry(files, rank).nbytes for rank in self.files)

    def differences(self) -> str:
        """How it differs, in words.

        >>> UnlistedTensor("w", "w", {}, (Group("F32[4]", (0,)), Group("F32[2]", (1, 2)))).differences()
        'F32[4] on rank 0, F32[2] on ranks 1, 2'
        """
        shown = [f"{group.holds} on {name_ranks(group.ranks)}" for group in self.groups[:_SHOWN]]
        more = len(self.groups) - _SHOWN
        return ", ".join(shown) + (f" and {more} more that differ from these" if more > 0 else "")


_Named = TypeVar("_Named", SourceTensor, UnlistedTensor)


def called(tensor: _Named, name: str) -> _Named:
    """A parameter under a name; where it is stored stays."""
    if isinstance(tensor, UnlistedTensor):
        return tensor._replace(name=name)
    return tensor if tensor.meta.name == name else tensor._replace(meta=tensor.meta._replace(name=name))


class Outside(NamedTuple):
    """All names outside the strategy, as headers tell them apart; see the module's docstring."""

    extras: Mapping[str, SourceTensor]
    own: Mapping[str, UnlistedTensor]
    unproven: Mapping[str, UnlistedTensor]


def outside_of(files: Sequence[FileIndex], ranks: Mapping[int, int], known: AbstractSet[str]) -> Outside:
    """What lies outside the strategy, from headers.

    Args:
        ranks: rank -> number of its file.
        known: names that the strategy lists.
    """
    holders: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        for name in files[ranks[rank]].tensors.keys() - known:
            if not name.startswith(ACCUMULATED_GRADIENT_PREFIX):
                holders.setdefault(name, []).append(rank)
    shared: dict[tuple[int, ...], Mapping[int, int]] = {}
    extras: dict[str, SourceTensor] = {}
    own: dict[str, UnlistedTensor] = {}
    unproven: dict[str, UnlistedTensor] = {}
    for name in sorted(holders):
        which = tuple(holders[name])
        held = UnlistedTensor(name, name, shared.setdefault(which, {rank: ranks[rank] for rank in which}))
        groups = _by_kind(held, files)
        if len(groups) > 1:
            own[name] = held._replace(groups=groups)
        elif len(which) > 1:
            unproven[name] = held
        else:
            extras[name] = alike(held, files)
    return Outside(extras, own, unproven)


def _by_kind(held: UnlistedTensor, files: Sequence[FileIndex]) -> tuple[Group, ...]:
    """The ranks by dtype and shape of what they hold."""
    kinds: dict[tuple[str, Shape], list[int]] = {}
    for rank in held.files:
        entry = held.entry(files, rank)
        kinds.setdefault((entry.dtype.name, entry.shape), []).append(rank)
    return tuple(Group(f"{dtype}{list(shape)}", tuple(ranks)) for (dtype, shape), ranks in kinds.items())


def alike(held: UnlistedTensor, files: Sequence[FileIndex]) -> SourceTensor:
    """What every holder has alike, from the file of the first; the ranks that hold it are those that are `expected`."""
    first = next(iter(held.files))
    return _whole(held, files, first, tuple(held.files))


def ranks_of(tensor: SourceTensor) -> tuple[int, ...]:
    """The ranks that hold a tensor which is whole wherever it is."""
    return next(iter(tensor.placements[0].expected.values()))


def of_rank(held: UnlistedTensor, files: Sequence[FileIndex], rank: int) -> SourceTensor:
    """What one rank that holds it has of its own, whole."""
    return _whole(held, files, rank, (rank,))


def _whole(held: UnlistedTensor, files: Sequence[FileIndex], rank: int, ranks: tuple[int, ...]) -> SourceTensor:
    entry = held.entry(files, rank)
    cell = (0,) * len(entry.shape)
    placement = Placement((1,) * len(entry.shape), {cell: (held.files[rank],)}, {cell: ranks})
    return SourceTensor(TensorMeta(held.name, entry.dtype, entry.shape), held.stored_name, (placement,))


def side_by_side(
    held: UnlistedTensor, files: Sequence[FileIndex], world: int
) -> Iterator[tuple[SourceTensor, tuple[int, ...]]]:
    """What the ranks have of their own as if it were one parameter that is cut along axis 0 into `world` parts.

    Cell r is what rank r holds. A tensor without axes counts as one of shape [1]. Where dtype or shape differ, there is
    one such parameter for each; with it come the ranks that have a cell.
    """
    for _, ranks in _by_kind(held, files):
        entry = held.entry(files, ranks[0])
        shape = entry.shape or (1,)
        rest = (0,) * (len(shape) - 1)
        placement = Placement(
            (world, *(1 for _ in rest)),
            {(rank, *rest): (held.files[rank],) for rank in ranks},
            {(rank, *rest): (rank,) for rank in ranks},
        )
        meta = TensorMeta(held.name, entry.dtype, (world * shape[0], *shape[1:]))
        yield SourceTensor(meta, held.stored_name, (placement,)), ranks


def tell_accumulated(files: Iterable[FileIndex]) -> None:
    """Log which accumulated gradients no job takes along: they are zero between steps."""
    found = {
        name: entry.nbytes
        for index in files
        for name, entry in index.tensors.items()
        if name.startswith(ACCUMULATED_GRADIENT_PREFIX)
    }
    if found:
        told = len(found), sum(found.values()), some(sorted(found))
        log.info("left out: %d accumulated gradients of %d bytes in a rank's file, zero between steps: %s", *told)

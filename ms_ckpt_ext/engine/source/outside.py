"""What the ranks' files hold beside the parameters that the strategy lists: who holds it, and in which shape.

Headers tell who holds a name, and its dtype and shape in each file. Whether the contents are the same takes reading, so
a name is one of three, in a catalog of its own each:

- `extras`: whole and alike wherever it is, so one copy stands for all. Known when there is one holder only, or when
  the copies were compared (`engine.unlisted.alike`).
- `unproven`: several holders, of one dtype and shape, not compared yet.
- `own`: known to differ. Each rank has its own, and no rank's is another's: a frozen parameter that is cut though the
  strategy does not say so, the state of a random generator, a cursor in the data.

One copy never stands for all of what is unproven or own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from ms_ckpt_ext.core.geometry.region import Shape
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.errors import name_ranks
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry

_SHOWN = 4


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

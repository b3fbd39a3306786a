"""What the ranks of the target want, shared with all: names, the source's parameter for each, and the box of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union

from ms_ckpt_ext.core.exchange.demand import Demand, Grid
from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, layout_from_json
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.transfer.sources import Cells, Members, cells_of_members, joined_cells
from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.agree import LAYOUT, NATURAL, WHOLE, Maybe, parsed, share_alike
from ms_ckpt_ext.transport.base import SAME_VERSION, Transport

_BOX = ([NATURAL], [NATURAL])
"""The form of a box: see `transport.agree.JsonForm`."""


class WantedBox(NamedTuple):
    """One thing that a rank wants: a parameter of the source, and a box of it, or a layout for the rank's cell."""

    source: str
    where: Union[Layout, Region]

    def region(self, shape: Shape, place: int) -> Region:
        """The box, of a parameter of `shape`, for the rank at `place`."""
        return self.where if isinstance(self.where, Region) else self.where.region(place % self.where.devices, shape)


Wants = Mapping[str, WantedBox]


def share_wanted(transport: Transport[Any], mine: Wants) -> list[Wants]:
    """Every rank's wants, by rank. Ranks that want the same in the same layouts share one mapping. Collective."""
    return share_alike(transport, _encode(mine), _decode)


def _encode(wants: Wants) -> bytes:
    layouts = list(dict.fromkeys(each.where for each in wants.values() if isinstance(each.where, Layout)))
    number = {layout: n for n, layout in enumerate(layouts)}
    rows = [
        [name, w.source, number[w.where], None] if isinstance(w.where, Layout) else [name, w.source, -1, w.where]
        for name, w in wants.items()
    ]
    return json.dumps([layouts, rows]).encode()


def _decode(content: bytes) -> Wants:
    described, rows = parsed(content, ([LAYOUT], [(str, str, WHOLE, Maybe(_BOX))]))
    layouts = [layout_from_json(each) for each in described]
    return {
        name: WantedBox(source, layouts[number] if box is None else Region(*map(tuple, box)))
        for name, source, number, box in rows
    }


def demands_among(
    tensors: Mapping[str, SourceTensor], wants_by_rank: Sequence[Wants], places: Mapping[int, int]
) -> list[Demand]:
    """Demands for every wanted name, in the order of the tensors; parameters without elements are left out.

    Args:
        places: rank of the target -> its place in the layouts.
    """
    alike: dict[int, list[tuple[int, int]]] = {}
    for rank, place in places.items():
        alike.setdefault(id(wants_by_rank[rank]), []).append((rank, place))
    grids = _Grids()
    for members in alike.values():
        for name, want in wants_by_rank[members[0][0]].items():
            if want.source not in tensors:
                raise TransportError(
                    f"rank {members[0][0]} wants {want.source!r} for {name!r}, which no rank holds; {SAME_VERSION}"
                )
            shape = tensors[want.source].meta.shape
            if isinstance(want.where, Region) and all(shape) and not _lies_in(want.where, shape):
                raise TransportError(
                    f"rank {members[0][0]} wants {want.where} for {name!r}, which is no box of shape {list(shape)}; "
                    f"{SAME_VERSION}"
                )
            if all(shape):
                grids.add((want.source, name), want.where, shape, tuple(members))
    order = {name: number for number, name in enumerate(tensors)}
    keys = sorted(grids.cells, key=lambda key: (order[key[0]], key[1]))
    found = (Demand(name, tensors[source], grids.of(source, name)) for source, name in keys)
    return [each for demand in found for each in by_own_placement(demand)]


def _lies_in(box: Region, shape: Shape) -> bool:
    if not len(box.start) == len(box.stop) == len(shape):
        return False
    return all(0 <= low < high <= whole for low, high, whole in zip(box.start, box.stop, shape))


def by_own_placement(demand: Demand) -> Iterator[Demand]:
    """A demand for each way in which ranks hold the parameter: a rank that holds a slice prefers slices like it.

    Ranks of several pipeline stages may hold one parameter cut in several ways (tied embeddings). Each takes what it
    has itself, however another stage cuts it.
    """
    placements = demand.tensor.placements
    if len(placements) < 2:
        yield demand
        return
    own = {
        rank: number
        for number, placement in reversed(list(enumerate(placements)))
        for ranks in placement.holders.values()
        for rank in ranks
    }
    for number, placement in enumerate(placements):
        grids = []
        for grid in demand.grids:
            kept = {cell: tuple(r for r in ranks if own.get(r, 0) == number) for cell, ranks in grid.ranks.items()}
            kept = {cell: ranks for cell, ranks in kept.items() if ranks}
            grids += [grid._replace(ranks=kept)] if kept else []
        if grids:
            others = (other for other in placements if other is not placement)
            yield demand._replace(tensor=demand.tensor._replace(placements=(placement, *others)), grids=tuple(grids))


class _Grids:
    """What is wanted of every parameter, as grids of equal slices where possible.

    Mappings with equal contents are one object, which lets planning work each out once.
    """

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], dict[Shape, list[Cells]]] = {}
        self._uneven: dict[tuple[str, str], dict[Cell, tuple[int, ...]]] = {}
        self._known: dict[Any, Cells] = {}

    def add(self, key: tuple[str, str], where: Union[Layout, Region], shape: Shape, members: Members) -> None:
        """Add ranks, with their places, that want a box of a parameter of `shape`; of a layout, each its own cell."""
        mine = self.cells.setdefault(key, {})
        if isinstance(where, Layout):
            mine.setdefault(where.parts, []).append(cells_of_members(where, members))
            return
        ranks, extents = tuple(sorted(rank for rank, _ in members)), where.shape
        if all(not whole % n and not low % n for whole, low, n in zip(shape, where.start, extents)):
            parts = tuple(whole // n for whole, n in zip(shape, extents))
            mine.setdefault(parts, []).append({tuple(low // n for low, n in zip(where.start, extents)): ranks})
            return
        uneven, corners = self._uneven.setdefault(key, {}), (*where.start, *where.stop)
        uneven[corners] = (*uneven.get(corners, ()), *ranks)

    def of(self, source: str, name: str) -> tuple[Grid, ...]:
        """The grids of a parameter."""
        even = (Grid(parts, self._one(joined_cells(some))) for parts, some in self.cells[source, name].items())
        uneven = self._uneven.get((source, name))
        return (*even, *([Grid((), self._one(uneven), uneven=True)] if uneven else ()))

    def _one(self, cells: Cells) -> Cells:
        return self._known.setdefault(tuple(cells.items()), cells)

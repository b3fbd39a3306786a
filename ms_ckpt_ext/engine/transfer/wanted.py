"""What the ranks of the target want, known to all: names, what of the source they are, and which box of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union

from ms_ckpt_ext.core.exchange.demand import Demand, Grid
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, layout_from_json
from ms_ckpt_ext.core.geometry.region import Region, Shape
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.transport.agree import pack, unpack
from ms_ckpt_ext.transport.base import Transport


class WantedBox(NamedTuple):
    """One thing that a rank wants: a parameter of the source, and the box of it: of a layout the rank's cell."""

    source: str
    where: Union[Layout, Region]


Wants = Mapping[str, WantedBox]


def share_wanted(transport: Transport[Any], mine: Wants) -> list[Wants]:
    """Every rank's wants, by rank. Ranks that want the same in the same layouts share one mapping. Collective."""
    known: dict[bytes, Wants] = {}
    found = []
    for answer in transport.share(pack(_to_json(mine))):
        if answer not in known:
            known[answer] = _from_json(unpack(answer))
        found.append(known[answer])
    return found


def _to_json(wants: Wants) -> list[Any]:
    layouts = list(dict.fromkeys(each.where for each in wants.values() if isinstance(each.where, Layout)))
    number = {layout: n for n, layout in enumerate(layouts)}
    rows = [[name, w.source, number[w.where] if isinstance(w.where, Layout) else w.where] for name, w in wants.items()]
    return [layouts, rows]


def _from_json(raw: Any) -> Wants:
    described, rows = raw
    layouts = [layout_from_json(each) for each in described]

    def where(told: Any) -> Union[Layout, Region]:
        return layouts[told] if isinstance(told, int) else Region(*map(tuple, told))

    return {name: WantedBox(source, where(told)) for name, source, told in rows}


def demands_among(
    tensors: Mapping[str, SourceTensor], wants_by_rank: Sequence[Wants], places: Mapping[int, int]
) -> list[Demand]:
    """One demand per wanted name, in the order of the tensors; parameters without elements are left out.

    Args:
        places: rank of the target -> its place in the layouts.
    """
    boxes: dict[tuple[str, str], dict[Region, list[int]]] = {}
    for rank, wants in enumerate(wants_by_rank):
        for name, want in wants.items():
            shape = tensors[want.source].meta.shape
            if all(shape):
                box = _box(want.where, shape, places[rank])
                boxes.setdefault((want.source, name), {}).setdefault(box, []).append(rank)
    order = {name: number for number, name in enumerate(tensors)}
    grids = _Grids()
    return [
        Demand(name, tensors[source], grids.of(tensors[source].meta.shape, boxes[source, name]))
        for source, name in sorted(boxes, key=lambda key: (order[key[0]], key[1]))
    ]


def _box(where: Union[Layout, Region], shape: Shape, place: int) -> Region:
    return where if isinstance(where, Region) else where.region(place % where.devices, shape)


class _Grids:
    """Boxes as grids of equal slices where they are such; mappings with equal contents are one, which planning uses."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[Cell, tuple[int, ...]]] = {}

    def of(self, shape: Shape, boxes: Mapping[Region, Sequence[int]]) -> tuple[Grid, ...]:
        """Grids of some boxes and the ranks that want each."""
        even: dict[Shape, dict[Cell, tuple[int, ...]]] = {}
        uneven: dict[Cell, tuple[int, ...]] = {}
        for box, ranks in boxes.items():
            extents = box.shape
            if all(not whole % n and not low % n for whole, low, n in zip(shape, box.start, extents)):
                parts = tuple(whole // n for whole, n in zip(shape, extents))
                even.setdefault(parts, {})[tuple(low // n for low, n in zip(box.start, extents))] = tuple(ranks)
            else:
                uneven[(*box.start, *box.stop)] = tuple(ranks)
        found = [Grid(parts, self._one(cells)) for parts, cells in even.items()]
        return (*found, *([Grid((), self._one(uneven), uneven=True)] if uneven else ()))

    def _one(self, cells: dict[Cell, tuple[int, ...]]) -> dict[Cell, tuple[int, ...]]:
        return self._known.setdefault(tuple(cells.items()), cells)

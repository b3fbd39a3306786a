"""What all ranks want, known to all: every rank tells its wants, and all derive the same list of demands.

A rank's wants are names with layouts; its box follows from its rank. Ranks of one pipeline stage want the same, so a
description travels once per distinct content, from the lowest rank that has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ms_ckpt_ext.core.exchange.demand import Demand, Grid
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, layout_from_json
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.transport.agree import share_alike
from ms_ckpt_ext.transport.base import Transport


class Want(NamedTuple):
    """One thing a rank wants: a parameter of the catalog, cut by a layout; the box is that of the rank within it."""

    source: str
    layout: Layout


def share_wants(transport: Transport[Any], wants: Mapping[str, Want]) -> list[Mapping[str, Want]]:
    """Every rank's wants, by rank. Ranks with equal wants share one mapping."""
    return share_alike(transport, _encode(wants), _decode)


def _encode(wants: Mapping[str, Want]) -> bytes:
    layouts = list(dict.fromkeys(want.layout for want in wants.values()))
    number = {layout: n for n, layout in enumerate(layouts)}
    return json.dumps([layouts, [[name, w.source, number[w.layout]] for name, w in wants.items()]]).encode()


def _decode(content: bytes) -> Mapping[str, Want]:
    described, wants = json.loads(content)
    layouts = [layout_from_json(raw) for raw in described]
    return {name: Want(source, layouts[number]) for name, source, number in wants}


def demands_of(catalog: Catalog, wants_by_rank: Sequence[Mapping[str, Want]]) -> list[Demand]:
    """One demand per wanted name, in the catalog's order; parameters without elements are left out."""
    alike: dict[int, list[int]] = {}
    for rank, wants in enumerate(wants_by_rank):
        alike.setdefault(id(wants), []).append(rank)
    grids: dict[tuple[str, str], dict[Shape, dict[Cell, tuple[int, ...]]]] = {}
    for ranks in alike.values():
        for name, want in wants_by_rank[ranks[0]].items():
            by_parts = grids.setdefault((want.source, name), {}).setdefault(want.layout.parts, {})
            for cell, holders in _cells_of(want.layout, tuple(ranks)).items():
                by_parts[cell] = by_parts.get(cell, ()) + holders
    order = {name: number for number, name in enumerate((*catalog.tensors, *catalog.extras))}
    demands = []
    for source, name in sorted(grids, key=lambda key: (order[key[0]], key[1])):
        tensor = _tensor_of(catalog, source)
        if all(tensor.meta.shape):
            wanted = grids[source, name].items()
            demands.append(Demand(name, tensor, tuple(Grid(parts, cells) for parts, cells in wanted)))
    return demands


def _tensor_of(catalog: Catalog, source: str) -> SourceTensor:
    """A parameter of the catalog, by its name there."""
    return catalog.tensors[source] if source in catalog.tensors else catalog.extras[source]


@lru_cache(maxsize=4096)
def _cells_of(layout: Layout, ranks: tuple[int, ...]) -> dict[Cell, tuple[int, ...]]:
    found: dict[Cell, tuple[int, ...]] = {}
    for rank in ranks:
        cell = layout.cells[rank % layout.devices]
        found[cell] = found.get(cell, ()) + (rank,)
    return found

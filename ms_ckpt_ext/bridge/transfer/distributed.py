"""Distributed tensors of hyper-parallel, recognised by what they have: `layout` with a mesh, and `to_local`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import nested_tensor_map
from ms_ckpt_ext.errors import StrategyError, UsageError


def local_of(value: Any) -> Any:
    """This rank's part of a distributed tensor; anything else as it is."""
    return value.to_local() if hasattr(value, "to_local") and getattr(value, "layout", None) is not None else value


def own_boxes(named: Iterable[tuple[str, Any]], rank: int) -> dict[str, Box]:
    """The boxes that distributed tensors state themselves, by name. `rank`: of this process in the job."""
    found = {}
    for name, value in named:
        layout = getattr(value, "layout", None)
        if layout is not None and hasattr(value, "to_local"):
            found[name] = box_of(name, layout, tuple(value.to_local().shape), rank)
    return found


def box_of(name: str, layout: Any, shape: tuple[int, ...], rank: int) -> Box:
    """The box of a rank of the job under a distributed tensor's layout: a mesh, a tensor map, and the mesh's ranks.

    Raises:
        StrategyError: it is no such layout, or has partial sums.
        UsageError: the rank is not in its mesh.
    """
    try:
        told = layout.to_dict() if hasattr(layout, "to_dict") else vars(layout)
        matrix = tuple(told.get("mesh_shape") or told["device_matrix"])
        rows = [list(row) if isinstance(row, (tuple, list)) else [row] for row in told["tensor_map"]]
        ranks = [int(each) for each in told["rank_list"]]
        cut = Layout(matrix, nested_tensor_map(rows) if len(rows) > 1 else nested_tensor_map([*rows, []]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StrategyError(
            f"parameter {name!r}: its layout has no mesh_shape, tensor_map and rank_list as hyper-parallel's have "
            f"({type(error).__name__}: {error})"
        ) from error
    partial = getattr(layout, "partial", None)
    if partial and any(partial):
        raise StrategyError(f"parameter {name!r} holds partial sums ({partial}): reduce it first")
    if rank not in ranks:
        raise UsageError(f"parameter {name!r}: rank {rank} is not in the mesh of its layout, ranks {ranks}")
    cut = cut.over(len(shape))
    full = cut.full_shape(shape)
    cell = cut.cells[ranks.index(rank)]
    return Box(full, tuple(n * extent for n, extent in zip(cell, shape)), shape)

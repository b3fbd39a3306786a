"""Slices in memory, joined: one Parameter from those of all ranks; layouts as MindSpore's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import layout_item
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, MissingNameError, StrategyError, UsageError

Array = NDArray[Any]


def messages_of(items: Iterable[Any]) -> dict[str, Any]:
    """Entries of a strategy file by their names there, as MindSpore's messages: `ParallelLayouts`, byte for byte."""
    theirs = ms.train.node_strategy_pb2.ParallelLayouts
    return {item.param_name: theirs.FromString(item.parallel_layouts.SerializePartialToString()) for item in items}


def merge_slices(slices: Sequence[Any], strategy: Mapping[str, Any]) -> Any:
    """A Parameter with the first slice's name and flags, and its dtype; see `merge_sliced_parameter`."""
    arrays = _checked(slices)
    first = slices[0]
    if not strategy:
        whole = np.concatenate(arrays)
    elif first.name in strategy:
        whole = _arranged(arrays, first.name, strategy[first.name])
    else:
        raise MissingNameError(f"strategy has no layout of parameter {first.name!r}, but of {', '.join(strategy)}")
    return ms.Parameter(ms.Tensor.from_numpy(whole), first.name, first.requires_grad, first.layerwise_parallel)


def _checked(slices: Sequence[Any]) -> list[Array]:
    for number, held in enumerate(slices):
        if not isinstance(held, ms.Parameter):
            raise ArgumentTypeError(
                f"sliced_parameters must hold Parameters, got {type(held).__name__} at index {number}"
            )
        facts = (held.name, held.dtype, held.shape[1:])
        expected = (slices[0].name, slices[0].dtype, slices[0].shape[1:])
        if facts != expected or not held.shape:
            raise LayoutMismatchError(
                f"slice {number} of {slices[0].name!r} is {held.dtype}{list(held.shape)} of {held.name!r}, slice 0 is "
                f"{slices[0].dtype}{list(slices[0].shape)}: slices have one name and dtype, at least one axis, and the "
                "same extents but for the first axis"
            )
    return [held.asnumpy() for held in slices]


def _arranged(arrays: Sequence[Array], name: str, message: Any) -> Array:
    try:
        uneven = [extent for row in message.param_split_shape for extent in row.dim]
        layout = layout_item(
            name,
            0,
            [row.dim for row in message.dev_matrix],
            [row.dim for row in message.tensor_map],
            (message.opt_weight_shard_step, message.opt_weight_shard_size),
            uneven=False,
            origin="strategy",
        ).layout
    except (AttributeError, TypeError) as error:
        raise StrategyError(f"strategy: the value of {name!r} is not a ParallelLayouts message ({error})") from error
    if len(arrays) != layout.devices:
        raise UsageError(
            f"sliced_parameters has {len(arrays)} slices of {name!r}, which the strategy cuts over {layout.devices} "
            "devices: give the slice of every one, in the order of ranks"
        )
    if not uneven and len({array.shape for array in arrays}) > 1:
        raise LayoutMismatchError(f"the slices of {name!r} differ in extent, and the strategy cuts evenly")
    if not uneven and message.field > 0:
        return _of_fields(arrays, name, message.field)
    return _placed(arrays, name, layout.over(arrays[0].ndim), uneven)


def _placed(arrays: Sequence[Array], name: str, layout: Layout, uneven: Sequence[int]) -> Array:
    """Every slice at its place; `uneven` are extents along the first axis, of every cell in row-major order."""
    parts, last = layout.parts, layout.full_shape(arrays[0].shape)[1:]
    columns = prod(parts[1:])
    extents = uneven or [len(arrays[0])] * prod(parts)
    rows = extents[::columns]
    if len(extents) != prod(parts) or list(extents) != [extent for extent in rows for _ in range(columns)]:
        raise StrategyError(f"param_split_shape {extents} of {name!r} does not fit a grid of {list(parts)} slices")
    starts = [0, *accumulate(rows)]
    whole = np.empty((starts[-1], *last), arrays[0].dtype)
    for rank, (array, cell) in enumerate(zip(arrays, layout.cells)):
        if len(array) != rows[cell[0]]:
            raise LayoutMismatchError(
                f"slice {rank} of {name!r} has {len(array)} rows, the strategy gives it {rows[cell[0]]}"
            )
        box = (slice(at * n, (at + 1) * n) for at, n in zip(cell[1:], array.shape[1:]))
        whole[(slice(starts[cell[0]], starts[cell[0] + 1]), *box)] = array
    return whole


def _of_fields(arrays: Sequence[Array], name: str, fields: int) -> Array:
    """An embedding table of several fields, each cut over all devices: field by field, device by device."""
    rest = arrays[0].shape[1:]
    if len(arrays[0]) % fields:
        raise LayoutMismatchError(
            f"the slices of {name!r} have {len(arrays[0])} rows, not a multiple of {fields} fields"
        )
    by_field: Array = np.concatenate([array.reshape(fields, -1, *rest) for array in arrays], axis=1)
    return by_field.reshape(-1, *rest)

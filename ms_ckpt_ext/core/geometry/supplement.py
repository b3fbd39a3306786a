"""Layouts from several places put together: a strategy file that lists trainable parameters, and what it lacks.

1. Strategies, as files give them, say for every layout which pipeline stage it is of. They are joined.
2. A dictionary of layouts by name need not say so. A name may have the `"{stage}-"` of merged files before it; without
   it a layout is that of the name in every stage where a strategy lists it, or, where none does, in every stage.
3. What two places say of one name and stage must come to the same slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Union

from ms_ckpt_ext.core.geometry.layout import Layout, same_slices
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy, split_stage
from ms_ckpt_ext.errors import StrategyError

_NO_STAGE = -1


class ByName(NamedTuple):
    """Layouts by name, from one place; a name may have `"{stage}-"` before it."""

    layouts: Mapping[str, Layout]
    origin: str


StrategyPart = Union[Strategy, ByName]


class _Said(NamedTuple):
    item: LayoutItem
    origin: str


def put_together(parts: Sequence[StrategyPart], stage: int) -> Strategy:
    """One strategy out of several parts.

    Args:
        stage: which one names are of when no part knows of stages.

    Raises:
        StrategyError: two parts contradict each other in a parameter, or in the number of devices; or there are none.
    """
    said = [each for part in parts for each in _said(part)]
    staged = [each for each in said if each.item.stage != _NO_STAGE]
    found: dict[tuple[str, int], _Said] = {}
    for each in staged:
        _add(found, each)
    listed: dict[str, list[int]] = {}
    for name, where in found:
        listed.setdefault(name, []).append(where)
    everywhere: Iterable[int] = range(1 + max(where for _, where in found)) if found else (stage,)
    for each in said:
        if each.item.stage == _NO_STAGE:
            for where in listed.get(each.item.name, everywhere):
                _add(found, each._replace(item=each.item._replace(stage=where)))
    _check_devices(said)
    return Strategy.from_items((each.item for each in found.values()), " with ".join(part.origin for part in parts))


def _said(part: StrategyPart) -> list[_Said]:
    if isinstance(part, Strategy):
        items = [LayoutItem(n, stage, layout) for n, stages in part.layouts.items() for stage, layout in stages.items()]
    else:
        items = [LayoutItem(*split_stage(name, _NO_STAGE), layout) for name, layout in part.layouts.items()]
    return [_Said(item, part.origin) for item in items]


def _add(found: dict[tuple[str, int], _Said], each: _Said) -> None:
    before = found.setdefault((each.item.name, each.item.stage), each)
    if not same_slices(before.item.layout, each.item.layout):
        raise StrategyError(
            f"parameter {each.item.name!r} (pipeline stage {each.item.stage}) has {_told(before)}, but {_told(each)}: "
            "other slices; check which of them belongs to this job, and leave the other away"
        )


def _check_devices(said: Sequence[_Said]) -> None:
    for each in said:
        if each.item.layout.devices != said[0].item.layout.devices:
            raise StrategyError(
                f"parameter {each.item.name!r} has {_told(each)}, of {each.item.layout.devices} devices, but "
                f"{said[0].item.name!r} has {_told(said[0])}, of {said[0].item.layout.devices}; every pipeline stage "
                "has the same number, so they are of different jobs"
            )


def _told(each: _Said) -> str:
    layout = each.item.layout
    shard = f", optimizer shard {layout.opt_shard_size}" if layout.opt_sharded else ""
    return f"device matrix {list(layout.dev_matrix)}, tensor map {layout.tensor_map}{shard} in {each.origin}"

"""Which layout every parameter has on every pipeline stage: the contents of a strategy file, whatever its form.

MindSpore gives layouts in four forms: a strategy file (protobuf or JSON, one stage or several merged), the dict of
messages that `build_searched_strategy` returns, the dict of tuples in `Cell.parameter_layout_dict` and
`Model.infer_predict_layout()`, and `None` for one device. All become this one value. Ranks are global: rank r belongs
to stage r // devices_per_stage and has number r % devices_per_stage within it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, Callable, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.layout import MAX_RANKS, Layout
from ms_ckpt_ext.errors import StrategyError

_STAGE_PREFIX = re.compile(r"^(\d{1,9})-(.+)$", re.DOTALL)
ACCUMULATED_GRADIENT_PREFIX = "accu_grads."
"""Parameters below this prefix are zero between steps, and their layout in strategy files is wrong: never required."""

MOST_CELLS = 1 << 22
"""Most devices of all different layouts of a strategy together: every one of them has a cell, some 160 bytes.

Those of a real job have some dozens of layouts: 65,536 ranks could have 64.
"""


class LayoutItem(NamedTuple):
    """One entry of a strategy file: the parameter's plain name, its pipeline stage, its layout."""

    name: str
    stage: int
    layout: Layout


class Strategy(NamedTuple):
    """The layouts of one job.

    Attributes:
        layouts: name -> stage -> layout. A parameter may stand in several stages (tied embeddings).
        devices_per_stage: device count of every stage.
        stages: number of pipeline stages, as far as they are known here (a single-stage file of stage 3 says 4).
        origin: where this came from, for messages.
    """

    layouts: Mapping[str, Mapping[int, Layout]]
    devices_per_stage: int
    stages: int
    origin: str = "the strategy"

    @classmethod
    def from_items(cls, items: Iterable[LayoutItem], origin: str) -> Strategy:
        """Build from entries.

        Raises StrategyError when stages differ in device count, an entry stands twice, or it is more than memory holds.
        """
        layouts: dict[str, dict[int, Layout]] = {}
        first: Optional[LayoutItem] = None
        for item in items:
            first = first or item
            if item.layout is not first.layout and item.layout.devices != first.layout.devices:
                raise StrategyError(
                    f"{origin}: parameter {item.name!r} (stage {item.stage}) spans {item.layout.devices} devices, "
                    f"{first.name!r} (stage {first.stage}) spans {first.layout.devices}; "
                    "every pipeline stage must have the same number"
                )
            stages = layouts.setdefault(item.name, {})
            if stages.setdefault(item.stage, item.layout) != item.layout:
                raise StrategyError(f"{origin}: parameter {item.name!r} has two layouts in stage {item.stage}")
        if first is None:
            raise StrategyError(
                f"{origin} holds no parameter layouts; save it from a compiled network with "
                "`strategy_ckpt_config` or `AutoParallel.save_param_strategy_file`"
            )
        last_stage = max(map(max, layouts.values()))
        if (last_stage + 1) * first.layout.devices > MAX_RANKS:
            raise StrategyError(
                f"{origin} speaks of pipeline stage {last_stage}, with {first.layout.devices} devices a stage: more "
                f"than {MAX_RANKS} ranks: it is damaged; save it again from the training job"
            )
        by_id = {id(layout): layout for stages in layouts.values() for layout in stages.values()}
        different = len({*by_id.values()})
        if different * first.layout.devices > MOST_CELLS:
            raise StrategyError(
                f"{origin} has {different} different layouts of {first.layout.devices} devices each, which no job "
                "needs and no memory holds: it is damaged; save it again from the training job"
            )
        return cls(layouts, first.layout.devices, last_stage + 1, origin)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.devices_per_stage * self.stages

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of a global rank."""
        return rank // self.devices_per_stage

    def ranks_of(self, stage: int) -> range:
        """Global ranks of a pipeline stage."""
        return range(stage * self.devices_per_stage, (stage + 1) * self.devices_per_stage)

    def layout(self, name: str, rank: int) -> Optional[Layout]:
        """Layout of `name` on the stage of `rank`; None where that stage does not have it."""
        return self.layouts.get(name, {}).get(self.stage_of(rank))

    def cell(self, name: str, rank: int) -> Optional[tuple[int, ...]]:
        """Cell of `name` that a global rank holds; None where its stage does not have it."""
        layout = self.layout(name, rank)
        return None if layout is None else layout.cells[rank % self.devices_per_stage]

    def names_of(self, rank: int) -> list[str]:
        """Parameters of the stage of `rank`, in file order."""
        stage = self.stage_of(rank)
        return [name for name, stages in self.layouts.items() if stage in stages]

    def check_complete(self) -> None:
        """Raise StrategyError when a pipeline stage between the first and the last is missing."""
        present = {stage for stages in self.layouts.values() for stage in stages}
        missing = sorted(set(range(self.stages)) - present)
        if missing:
            raise StrategyError(
                f"{self.origin} lacks pipeline stage(s) {_first(missing)} of {self.stages}; "
                "give the merged file, or the directory with every stage's file"
            )


def _first(numbers: Sequence[int], most: int = 16) -> str:
    more = f" and {len(numbers) - most} more" if numbers[most:] else ""
    return f"{list(numbers[:most])}{more}"


def split_stage(name: str, default: int) -> tuple[str, int]:
    """Take the one `"{stage}-"` prefix off that `merge_pipeline_strategys` puts before a name.

    >>> split_stage("1-decoder.w-2", 0)
    ('decoder.w-2', 1)
    """
    match = _STAGE_PREFIX.match(name)
    return (match[2], int(match[1])) if match else (name, default)


def nested_tensor_map(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """MindSpore's tensor map in one form: a list of device axes for every tensor axis.

    One row of k numbers is one device axis for each of k tensor axes; several rows are one for each tensor axis.

    >>> nested_tensor_map([[0, -1]])
    ((0,), ())
    >>> nested_tensor_map([[-1], [1, 0]])
    ((), (1, 0))
    """
    filled = [row for row in rows if row]
    if len(rows) <= 1:
        filled = [[value] for row in rows for value in row]
    return tuple(tuple(value for value in row if value != -1) for row in filled)


def strategy_from_messages(messages: Mapping[str, Any], origin: str = "the strategy dict") -> Strategy:
    """Read the dict that `mindspore.parallel.build_searched_strategy` returns: name -> ParallelLayouts message."""
    return Strategy.from_items((_from_message(name, message, origin) for name, message in messages.items()), origin)


def _from_message(name: str, message: Any, origin: str) -> LayoutItem:
    plain, stage = split_stage(name, 0)
    try:
        return layout_item(
            plain,
            stage,
            [list(row.dim) for row in message.dev_matrix],
            [list(row.dim) for row in message.tensor_map],
            (int(message.opt_weight_shard_step), int(message.opt_weight_shard_size)),
            uneven=bool(message.field or any(row.dim for row in message.param_split_shape)),
            origin=origin,
        )
    except AttributeError as error:
        raise StrategyError(f"{origin}: value of {name!r} is not a ParallelLayouts message ({error})") from error


def layout_item(
    name: str,
    stage: int,
    dev_matrix: Sequence[Sequence[int]],
    tensor_map: Sequence[Sequence[int]],
    opt_shard: tuple[int, int],
    *,
    uneven: bool,
    origin: str,
) -> LayoutItem:
    """Build one entry from the raw numbers of a message. Raises StrategyError naming origin and parameter."""
    if uneven:
        raise StrategyError(
            f"{origin}: parameter {name!r} is split unevenly (field / param_split_shape is set), which MindSpore's "
            "own tools do not cut evenly either; re-save it from a network without uneven embedding split"
        )
    if len(dev_matrix) != 1 or not all(dev_matrix):
        raise StrategyError(
            f"{origin}: parameter {name!r} has no device matrix (a file of pure pipeline parallelism); "
            "re-save the strategy from a compiled network"
        )
    (devices,) = map(tuple, dev_matrix)
    try:
        return LayoutItem(name, stage, Layout(devices, nested_tensor_map(tensor_map), *opt_shard))
    except StrategyError as error:
        raise StrategyError(f"{origin}: parameter {name!r}: {error}") from error


def strategy_from_layout_dict(
    layouts: Mapping[str, Any],
    rank: int,
    group_size: Callable[[str], int],
    origin: str = "the layout dict",
) -> Strategy:
    """Read `Cell.parameter_layout_dict` or the result of `Model.infer_predict_layout()`.

    Args:
        layouts: name -> (dev_matrix, tensor_map, slice_shape, field_size, uniform_split, opt_shard_group, ...), of
            which the first two suffice; or a `Layout`.
        rank: global rank whose network this is; the dict speaks of that rank's stage only.
        group_size: size of a communication group by name, asked for optimizer-shard groups.

    Raises:
        StrategyError: a value is not such a tuple.
    """
    found = layouts_by_name(layouts, group_size, origin)
    items = (LayoutItem(name, rank // layout.devices, layout) for name, layout in found.items())
    return Strategy.from_items(items, origin)


def layouts_by_name(
    layouts: Mapping[str, Any], group_size: Callable[[str], int], origin: str = "the layout dict"
) -> dict[str, Layout]:
    """The values of such a dict, or of one of messages. Arguments and errors as of `strategy_from_layout_dict`."""
    return {name: _layout_of(name, value, group_size, origin) for name, value in layouts.items()}


def _layout_of(name: str, value: Any, group_size: Callable[[str], int], origin: str) -> Layout:
    if isinstance(value, Layout):
        return value
    if hasattr(value, "dev_matrix"):
        return _from_message(name, value, origin).layout
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise StrategyError(
            f"{origin}: value of {name!r} must be (dev_matrix, tensor_map, slice_shape, field_size, ...), of which the "
            f"first two suffice, got {value!r}"
        )
    group = value[5] if len(value) > 5 else ""
    shard = (1, group_size(group)) if group else (0, 0)
    try:
        nested = value[1] if any(isinstance(row, (list, tuple)) for row in value[1]) else [value[1]]
        rows = [list(map(index, row)) if isinstance(row, (list, tuple)) else [index(row)] for row in nested]
        matrix = list(map(index, value[0]))
    except TypeError as error:
        raise StrategyError(f"{origin}: value of {name!r} must hold numbers of devices and axes ({error})") from error
    uneven = len(value) > 3 and bool(value[3])
    return layout_item(name, 0, [matrix], rows, shard, uneven=uneven, origin=origin).layout

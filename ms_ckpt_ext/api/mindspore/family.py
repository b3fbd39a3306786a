"""The rest of MindSpore's checkpoint functions: layouts, ranks and slices in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from ms_ckpt_ext.api.arguments import PathLike, path_of
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.errors import ArgumentTypeError, StrategyError, UsageError
from ms_ckpt_ext.formats.strategies.file import load_strategy, read_map
from ms_ckpt_ext.formats.strategies.groups import restore_ranks

_NO_PARAMETERS = (ACCUMULATED_GRADIENT_PREFIX, "inputs")
"""Beginnings of names in strategies that say nothing about what a rank's checkpoint holds."""
_RANK_NAME = re.compile(r"rank_(\d+)")


def build_searched_strategy(strategy_filename: Optional[PathLike]) -> Optional[dict[str, Any]]:
    """The layouts of a strategy file, as MindSpore's messages. Drop-in for `mindspore.build_searched_strategy`.

    Args:
        strategy_filename: the file, of either form; None gives None.

    Returns:
        Name as the file has it (`"{stage}-{name}"` in a merged one) -> `ParallelLayouts`; {} where it has no layouts.

    Raises:
        ArgumentTypeError: it is no path.
        StrategyError: there is no such file, it is empty, or no strategy.
        MissingDependencyError: MindSpore cannot be imported.
    """
    if strategy_filename is None:
        return None
    content = read_map(path_of(strategy_filename, "strategy_filename"), empty=True)
    from ms_ckpt_ext.bridge.slices import messages_of

    return messages_of(content.parallel_layout_item)


def merge_sliced_parameter(sliced_parameters: Sequence[Any], strategy: Optional[Mapping[str, Any]] = None) -> Any:
    """Merge the slices of one Parameter. Drop-in for `mindspore.merge_sliced_parameter`.

    Unlike there, bfloat16 stays bfloat16, and the slices of an optimizer shard are put in their places.

    Args:
        sliced_parameters: Parameters of one name, in the order of ranks, of one pipeline stage.
        strategy: name -> `ParallelLayouts`, as `build_searched_strategy` gives it; None to put the slices one after
            another along the first axis.

    Returns:
        A Parameter of that name, with the first slice's `requires_grad` and `layerwise_parallel`.

    Raises:
        ArgumentTypeError: the slices are no list of Parameters, or the strategy is no dictionary.
        UsageError: there are none, or not as many as the strategy has devices.
        MissingNameError: the strategy does not list the parameter.
        LayoutMismatchError, StrategyError: slices and strategy contradict each other.
        MissingDependencyError: MindSpore cannot be imported.
    """
    if not isinstance(sliced_parameters, (list, tuple)):
        raise ArgumentTypeError(f"sliced_parameters must be a list, got {type(sliced_parameters).__name__}")
    if not sliced_parameters:
        raise UsageError("sliced_parameters is empty: give the slices in the order of ranks")
    if strategy and not isinstance(strategy, Mapping):
        raise ArgumentTypeError(f"strategy must be a dict of layouts or None, got {type(strategy).__name__}")
    from ms_ckpt_ext.bridge.slices import merge_slices

    return merge_slices(sliced_parameters, strategy or {})


def restore_group_info_list(group_info_file_name: PathLike) -> list[int]:
    """Ranks whose checkpoints hold what this one holds, from the file that GROUP_INFO_FILE named at the save.

    Drop-in for `mindspore.restore_group_info_list`.

    Args:
        group_info_file_name: path of that file.

    Returns:
        The ranks, as the file lists them.

    Raises:
        ArgumentTypeError: it is no path.
        FormatError: it is not such a file, or lists no ranks.
        StorageError: it cannot be read.
    """
    return restore_ranks(path_of(group_info_file_name, "group_info_file_name"))


def get_ckpt_path_with_strategy(cur_ckpt_path: PathLike, cur_strategy_path: PathLike) -> Optional[str]:
    """A checkpoint that holds what this rank's should hold: its own if it is there, else that of another rank.

    Drop-in for `mindspore.get_ckpt_path_with_strategy`; called when communication is initialised. Every `rank_N` in the
    path is replaced by other ranks that hold the same slice of every parameter in the strategy. Where these differ
    between parameters, MindSpore looks at no other rank; here those that agree in all of them count.

    Args:
        cur_ckpt_path: this rank's file.
        cur_strategy_path: the strategy of this rank's pipeline stage, or of all.

    Returns:
        The path of the first file there is, by rank; None when there is none.

    Raises:
        ArgumentTypeError, StrategyError: wrong arguments; or the strategy says nothing about this rank.
        MissingDependencyError: MindSpore cannot be imported.
    """
    path, strategy_path = path_of(cur_ckpt_path, "cur_ckpt_path"), path_of(cur_strategy_path, "cur_strategy_path")
    from ms_ckpt_ext.bridge.world import own_rank

    rank = own_rank()
    if str(rank) in _RANK_NAME.findall(path) and os.path.isfile(path):
        return path
    candidates = (_RANK_NAME.sub(f"rank_{other}", path) for other in _same(load_strategy(strategy_path), rank))
    return next(filter(os.path.isfile, candidates), None)


def _same(strategy: Strategy, rank: int) -> list[int]:
    """Ranks that hold the same slice of every parameter as `rank`, ascending."""
    local = rank % strategy.devices_per_stage
    stages = {stage for held in strategy.layouts.values() for stage in held}
    stage = stages.pop() if len(stages) == 1 else strategy.stage_of(rank)  # a stage's own file describes that stage
    layouts = [held[stage] for name, held in strategy.layouts.items() if stage in held and not _is_none(name)]
    if not layouts:
        raise StrategyError(
            f"{strategy.origin} lists no parameter of rank {rank}; give the strategy of its pipeline stage, or of all"
        )
    same = set.intersection(*(set(layout.holders[layout.cells[local]]) for layout in layouts))
    return sorted(rank - local + other for other in same)


def _is_none(name: str) -> bool:
    return name.startswith(_NO_PARAMETERS)

"""Strategy files: MindSpore's protobuf (no magic) and JSON forms, one stage or several merged."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy, layout_item, split_stage
from ms_ckpt_ext.core.parsing import from_json
from ms_ckpt_ext.errors import StrategyError, also, storage_error
from ms_ckpt_ext.formats.strategies import messages as proto
from ms_ckpt_ext.formats.strategies.messages import IntRows
from ms_ckpt_ext.formats.table import STRATEGY_SUFFIXES, pointer_fault
from ms_ckpt_ext.storage.linux import write_atomically

_FRESH, MERGED = 2, 1  # what MindSpore puts into current_stage, which is not a stage


def load_strategy(path: Union[str, Path]) -> Strategy:
    """Read a strategy file, or a directory with one file per stage (merged on the fly).

    Raises:
        StrategyError: no such file, empty, not a strategy file, or contradictory.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        return Strategy.from_items(_items(read_map(path), path), f"strategy file {path!r}")
    items: list[LayoutItem] = []
    for file in stage_files(path):
        items.extend(_items(read_map(file), file))
    strategy = Strategy.from_items(items, f"strategy directory {path!r}")
    strategy.check_complete()
    return strategy


def save_strategy(strategy: Strategy, target: Union[str, Path]) -> None:
    """Write a strategy file that MindSpore reads too: merged when it has several stages; JSON for a `.json` name.

    Raises:
        StrategyError: a parameter's name is no Unicode.
        StorageError: the file cannot be written.
    """
    merged = strategy.stages > 1
    content = proto.strategy_map()
    for stage in sorted({stage for held in strategy.layouts.values() for stage in held}):
        proto.add_operator(content, f"ms_ckpt_ext_stage_{stage}", stage)
    try:
        for name, held in strategy.layouts.items():
            for stage, layout in sorted(held.items()):
                _add_layout(content, f"{stage}-{name}" if merged else name, layout)
    except ValueError as error:
        raise StrategyError(f"{strategy.origin} cannot be written as a strategy file: {error}") from error
    current, text = MERGED if merged else _FRESH, os.fspath(target).endswith(".json")
    write(target, json.dumps(_to_json(content, current)).encode() if text else proto.encode(content, current))


def _add_layout(content: Any, name: str, layout: Layout) -> None:
    rows: IntRows = tuple(tuple(group) or (-1,) for group in layout.tensor_map)
    if all(len(row) == 1 for row in rows):
        rows = (tuple(row[0] for row in rows),)
    numbers = (0, layout.opt_shard_step, layout.opt_shard_size)
    proto.add_parameter(content, name, ((layout.dev_matrix,), rows, ((),), ((),)), numbers)


def write(target: Union[str, Path], data: bytes) -> None:
    """Put a strategy file in its place, whole or not at all. Raises StorageError."""
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise storage_error("write strategy file", str(path), error) from error


def stage_files(directory: str) -> list[str]:
    """The files of a directory with one for each stage, in the order of names. Raises StrategyError."""
    if not os.path.isdir(directory):
        raise also(StrategyError, NotADirectoryError)(
            f"{directory!r} is not a directory of strategy files; give one that exists"
        )
    found = {
        suffix: sorted(str(p) for p in Path(directory).glob(f"[!.]*{suffix}") if p.is_file())
        for suffix in STRATEGY_SUFFIXES
    }
    kinds = [files for files in found.values() if files]
    if len(kinds) != 1:
        held = "both .ckpt and .json files" if kinds else "no .ckpt or .json file"
        raise StrategyError(
            f"strategy directory {directory!r} holds {held}; expected one file per stage, all of one kind"
        )
    return kinds[0]


def read_map(path: str, empty: bool = False) -> Any:
    """Either form as a `ParallelStrategyMap`.

    Raises:
        StrategyError: it is neither, or holds no layouts and may not be `empty` of them.
    """
    data = read_bytes(path)
    content = _parse_json(path, data) if data.lstrip()[:1] == b"{" else _parse_protobuf(path, data)
    if not content.parallel_layout_item and not empty:
        raise StrategyError(
            f"strategy file {path!r} holds no parameter layouts (a checkpoint has the same .ckpt suffix, was that "
            "given?); save it from a compiled network with `strategy_ckpt_config` or "
            "`AutoParallel.save_param_strategy_file`"
        )
    return content


def read_bytes(path: str) -> bytes:
    """All of a strategy file. Raises StrategyError when there is none, or nothing in it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise also(StrategyError, type(error))(
            f"cannot read strategy file {path!r}: {os.strerror(error.errno or 0)}; check the path"
        ) from error
    fault = pointer_fault(path, data)
    if fault is not None:
        raise StrategyError(fault)
    if not data:
        raise StrategyError(f"strategy file {path!r} is empty; save it again from the training job")
    return data


def _parse_protobuf(path: str, data: bytes) -> Any:
    try:
        return proto.decode(data)
    except ValueError as error:
        raise also(StrategyError, TypeError)(
            f"{path!r} is not a strategy file: {len(data)} bytes starting with {data[:8]!r} are neither MindSpore's "
            f"protobuf nor its JSON form ({error}); a checkpoint has the same .ckpt suffix, was that meant?"
        ) from error


def _parse_json(path: str, data: bytes) -> Any:
    content = proto.strategy_map()
    try:
        said = from_json(data)
        for name, held in said.get("parallel_strategy_item", {}).items():
            proto.add_operator(content, name, int(held.get("stage", 0)), _cuts(held.get("parallel_strategy")))
        for name, held in said.get("parallel_layout_item", {}).items():
            rows = [_rows(held.get(field) or []) for field in proto.ROW_FIELDS]
            proto.add_parameter(content, name, rows, [int(held.get(field) or 0) for field in proto.NUMBER_FIELDS])
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise StrategyError(
            f"strategy file {path!r} is not valid JSON of MindSpore's form: {error}; "
            "save it again from the training job"
        ) from error
    return content


def _rows(value: list[Any]) -> IntRows:
    """One flat list is one row; a list of lists is several."""
    rows = value if any(isinstance(row, list) for row in value) else [value]
    return tuple(tuple(operator.index(number) for number in row) for row in rows)


def _cuts(value: Any) -> IntRows:
    """How an operator's inputs are cut, where that is lists of numbers: nothing here depends on it."""
    try:
        return _rows(value or [])
    except TypeError:
        return ()


def _to_json(content: Any, current_stage: int) -> dict[str, Any]:
    def flat(rows: IntRows) -> list[Any]:
        return list(map(list, rows)) if len(rows) > 1 else [value for row in rows for value in row]

    def said(layouts: Any) -> dict[str, Any]:
        rows = {field: flat(proto.rows_of(layouts, field)) for field in proto.ROW_FIELDS}
        return {**rows, **{field: getattr(layouts, field) for field in proto.NUMBER_FIELDS}}

    operators = content.parallel_strategy_item
    return {
        "current_stage": current_stage,
        "parallel_strategy_item": {held.node_name: {"stage": held.parallel_strategys.stage} for held in operators},
        "parallel_layout_item": {held.param_name: said(held.parallel_layouts) for held in content.parallel_layout_item},
    }


def _items(content: Any, path: str) -> Iterator[LayoutItem]:
    operators = content.parallel_strategy_item
    default = operators[0].parallel_strategys.stage if operators else 0
    for held in content.parallel_layout_item:
        plain, stage = split_stage(held.param_name, default)
        layouts = held.parallel_layouts
        yield layout_item(
            plain,
            stage,
            proto.rows_of(layouts, "dev_matrix"),
            proto.rows_of(layouts, "tensor_map"),
            (layouts.opt_weight_shard_step, layouts.opt_weight_shard_size),
            uneven=bool(layouts.field or any(proto.rows_of(layouts, "param_split_shape"))),
            origin=f"strategy file {path!r}",
        )

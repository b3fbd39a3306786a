"""The JSON form of strategy files."""

from __future__ import annotations

import json
import operator
from typing import Any

from ms_ckpt_ext.errors import StrategyError
from ms_ckpt_ext.formats.strategies.file import (
    NUMBER_FIELDS,
    ROW_FIELDS,
    IntRows,
    add_operator,
    add_parameter,
    rows_of,
    strategy_map,
)
from ms_ckpt_ext.storage.reader import from_json


def from_text(path: str, data: bytes) -> Any:
    """A `ParallelStrategyMap` from its JSON form. Raises StrategyError, which names the path, when it is not one."""
    content = strategy_map()
    try:
        said = from_json(data)
        for name, held in said.get("parallel_strategy_item", {}).items():
            add_operator(content, name, int(held.get("stage", 0)), _cuts(held.get("parallel_strategy")))
        for name, held in said.get("parallel_layout_item", {}).items():
            rows = [_rows(held.get(field) or []) for field in ROW_FIELDS]
            add_parameter(content, name, rows, [int(held.get(field) or 0) for field in NUMBER_FIELDS])
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
    """How an operator's inputs are cut, if those are lists of numbers, else (): nothing here depends on it."""
    try:
        return _rows(value or [])
    except TypeError:
        return ()


def to_text(content: Any, current_stage: int) -> bytes:
    """The JSON form of a `ParallelStrategyMap`."""

    def flat(rows: IntRows) -> list[Any]:
        return list(map(list, rows)) if len(rows) > 1 else [value for row in rows for value in row]

    def said(layouts: Any) -> dict[str, Any]:
        rows = {field: flat(rows_of(layouts, field)) for field in ROW_FIELDS}
        return {**rows, **{field: getattr(layouts, field) for field in NUMBER_FIELDS}}

    operators = content.parallel_strategy_item
    told = {
        "current_stage": current_stage,
        "parallel_strategy_item": {held.node_name: {"stage": held.parallel_strategys.stage} for held in operators},
        "parallel_layout_item": {held.param_name: said(held.parallel_layouts) for held in content.parallel_layout_item},
    }
    return json.dumps(told).encode()

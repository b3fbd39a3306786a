"""The strategy files of pipeline stages merged into one, as by MindSpore's `merge_pipeline_strategys`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Union

from ms_ckpt_ext.core.geometry.strategy import split_stage
from ms_ckpt_ext.errors import StrategyError, UsageError
from ms_ckpt_ext.formats.strategies.file import MERGED, encode, read_bytes, read_map, stage_files, strategy_map, write
from ms_ckpt_ext.storage.reader import from_json

_OPERATORS, _PARAMETERS = "parallel_strategy_item", "parallel_layout_item"


def merge_strategy_files(directory: Union[str, Path], target: Union[str, Path]) -> None:
    """Merge the per-stage strategy files of `directory` into one.

    Entries get the `"{stage}-"` prefix; files of one stage may repeat or complement each other. A directory of JSON
    files gives JSON. Files that are merged already, such as an earlier result among the stages, are left out.

    Raises:
        StrategyError: a file cannot be read or does not say its stage, two of one stage contradict each other, or the
            directory holds none, or both kinds, or only merged ones.
        UsageError: the target is the file of a stage.
    """
    files = stage_files(os.fspath(directory))
    maps = {file: content for file in files if not _is_merged(content := read_map(file))}
    for file in maps:
        if os.path.realpath(file) == os.path.realpath(target):
            raise UsageError(
                f"the merged strategy would replace {file!r}, the file of one of the stages that it is merged of; "
                "choose another name for it"
            )
    if not maps:
        raise StrategyError(
            f"strategy directory {os.fspath(directory)!r} holds merged strategies only, {files[0]!r} first; expected "
            "one file per stage, as training saves them. What is merged need not be merged again"
        )
    entries = _entries(maps)
    write(target, _as_json(maps, entries) if files[0].endswith(".json") else _as_protobuf(maps, entries))


class _Entry(NamedTuple):
    """A `ParallelLayoutItem`, and the first file that has it."""

    file: str
    item: Any


def _entries(maps: dict[str, Any]) -> dict[str, _Entry]:
    """Every parameter by its merged name."""
    found: dict[str, _Entry] = {}
    for file, content in maps.items():
        stage = _stage(file, content)
        for item in content.parallel_layout_item:
            first = found.setdefault(f"{stage}-{item.param_name}", _Entry(file, item))
            if first.item != item:
                raise StrategyError(
                    f"{first.file!r} and {file!r} are both of stage {stage}, and give parameter {item.param_name!r} "
                    "different layouts; move the one that does not belong to the job away"
                )
    return found


def _as_protobuf(maps: dict[str, Any], entries: dict[str, _Entry]) -> bytes:
    merged = strategy_map()
    for file in _used(entries):
        merged.parallel_strategy_item.extend(maps[file].parallel_strategy_item)
    for name, entry in entries.items():
        merged.parallel_layout_item.add(param_name=name).parallel_layouts.CopyFrom(entry.item.parallel_layouts)
    return encode(merged, MERGED)


def _used(entries: dict[str, _Entry]) -> Iterable[str]:
    return dict.fromkeys(entry.file for entry in entries.values())


def _as_json(maps: dict[str, Any], entries: dict[str, _Entry]) -> bytes:
    """What the files say about operators and parameters, unchanged."""
    said = {file: _parsed(file) for file in maps}
    operators: dict[str, Any] = {}
    for file in _used(entries):
        operators.update(said[file][_OPERATORS])
    parameters = {name: said[entry.file][_PARAMETERS][entry.item.param_name] for name, entry in entries.items()}
    return json.dumps({"current_stage": MERGED, _OPERATORS: operators, _PARAMETERS: parameters}).encode()


def _parsed(file: str) -> dict[str, Any]:
    data = read_bytes(file)
    if data.lstrip()[:1] != b"{":
        raise StrategyError(f"strategy file {file!r} is not JSON, as its name says; name it .ckpt, with the others")
    parsed: dict[str, Any] = from_json(data)
    return parsed


def _stage(file: str, content: Any) -> int:
    operators = content.parallel_strategy_item
    if not operators:
        raise StrategyError(
            f"strategy file {file!r} lists no operator, so nothing says which pipeline stage it is of; save it again "
            "from the training job"
        )
    return int(operators[0].parallel_strategys.stage)


def _is_merged(content: Any) -> bool:
    """Whether every name has a stage's prefix, which only a merge gives."""
    return all(split_stage(held.param_name, -1)[1] >= 0 for held in content.parallel_layout_item)

"""The strategy files of pipeline stages as one, as MindSpore's `merge_pipeline_strategys` makes it."""

from __future__ import annotations

import json
import os
from typing import Any

from ms_ckpt_ext.core.strategy import split_stage
from ms_ckpt_ext.errors import StrategyError, UsageError
from ms_ckpt_ext.formats.strategy_file import MERGED, PathLike, read_bytes, read_map, stage_files, write
from ms_ckpt_ext.formats.strategy_wire import Entry, StrategyMap

_OPERATORS, _PARAMETERS = "parallel_strategy_item", "parallel_layout_item"


def merge_strategy_files(directory: PathLike, target: PathLike) -> None:
    """Merge the per-stage strategy files of `directory` into one.

    Entries get the `"{stage}-"` prefix; files of one stage say the same, or add to each other. A JSON directory gives
    JSON. Files that are merged already are left out, such as an earlier run's result among the stages.

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


def _entries(maps: dict[str, StrategyMap]) -> dict[str, tuple[str, Entry]]:
    """Merged name -> the file that has it first, and its entry there."""
    found: dict[str, tuple[str, Entry]] = {}
    for file, content in maps.items():
        stage = _stage(file, content)
        for entry in content.entries:
            name = f"{stage}-{entry.name}"
            first, before = found.setdefault(name, (file, entry))
            if before.layouts != entry.layouts:
                raise StrategyError(
                    f"{first!r} and {file!r} are both of stage {stage}, and give parameter {entry.name!r} different "
                    "layouts; move the one that does not belong to the job away"
                )
    return found


def _as_protobuf(maps: dict[str, StrategyMap], entries: dict[str, tuple[str, Entry]]) -> bytes:
    used = dict.fromkeys(file for file, _ in entries.values())
    nodes = tuple(node for file in used for node in maps[file].nodes)
    return StrategyMap(nodes, tuple(entry._replace(name=name) for name, (_, entry) in entries.items())).encode(MERGED)


def _as_json(maps: dict[str, StrategyMap], entries: dict[str, tuple[str, Entry]]) -> bytes:
    """What the files say of operators and parameters, word for word."""
    said = {file: _parsed(file) for file in maps}
    operators: dict[str, Any] = {}
    for file in dict.fromkeys(file for file, _ in entries.values()):
        operators.update(said[file][_OPERATORS])
    parameters = {name: said[file][_PARAMETERS][entry.name] for name, (file, entry) in entries.items()}
    return json.dumps({"current_stage": MERGED, _OPERATORS: operators, _PARAMETERS: parameters}).encode()


def _parsed(file: str) -> dict[str, Any]:
    data = read_bytes(file)
    if data.lstrip()[:1] != b"{":
        raise StrategyError(f"strategy file {file!r} is not JSON, as its name says; name it .ckpt, with the others")
    parsed: dict[str, Any] = json.loads(data)
    return parsed


def _stage(file: str, content: StrategyMap) -> int:
    if not content.nodes:
        raise StrategyError(
            f"strategy file {file!r} lists no operator, so nothing says which pipeline stage it is of; save it again "
            "from the training job"
        )
    return content.nodes[0].stage


def _is_merged(content: StrategyMap) -> bool:
    """Whether every name has a stage's prefix, which only a merge gives."""
    return all(split_stage(held.name, -1)[1] >= 0 for held in content.entries)

"""Strategy files: MindSpore's protobuf (no magic) and JSON forms, one stage or several merged.

The message types are described here at run time, in a descriptor pool of our own: generated code would be bound to
one major version of protobuf, and a second definition in the default pool collides with MindSpore's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

from ms_ckpt_ext.core.strategy import LayoutItem, Strategy, layout_item, split_stage
from ms_ckpt_ext.errors import StrategyError, UsageError, storage_error
from ms_ckpt_ext.storage.durable import write_atomically

PathLike = Union[str, "os.PathLike[str]"]
_FRESH, _MERGED = 2, 1  # what MindSpore puts into current_stage, which is not a stage

# message -> (field, number, type, repeated); the types are a scalar's or another message's name.
_MESSAGES: Mapping[str, tuple[tuple[str, int, str, bool], ...]] = {
    "DimU": (("dim", 1, "uint32", True),),
    "DimI": (("dim", 1, "int32", True),),
    "DimL": (("dim", 1, "int64", True),),
    "Strategys": (("stage", 1, "uint32", False), ("parallel_strategy", 2, "DimU", True)),
    "StrategyItem": (("node_name", 1, "string", False), ("parallel_strategys", 2, "Strategys", False)),
    "Layouts": (
        ("dev_matrix", 1, "DimU", True),
        ("tensor_map", 2, "DimI", True),
        ("param_split_shape", 3, "DimL", True),
        ("indices_offset", 4, "DimL", True),
        ("field", 5, "int32", False),
        ("opt_weight_shard_step", 6, "int32", False),
        ("opt_weight_shard_size", 7, "int32", False),
    ),
    "LayoutItem": (("param_name", 1, "string", False), ("parallel_layouts", 2, "Layouts", False)),
    "StrategyMap": (
        ("current_stage", 1, "uint32", False),
        ("parallel_strategy_item", 2, "StrategyItem", True),
        ("parallel_layout_item", 3, "LayoutItem", True),
    ),
}


@lru_cache(maxsize=1)
def _message_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="ms_ckpt_ext_strategy.proto", package="ms_ckpt_ext", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            if kind in _MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".ms_ckpt_ext.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    descriptor = pool.FindMessageTypeByName("ms_ckpt_ext.StrategyMap")
    make = getattr(message_factory, "GetMessageClass", None)  # protobuf 4.22 and later
    return make(descriptor) if make else message_factory.MessageFactory(pool).GetPrototype(descriptor)  # type: ignore[attr-defined]


def load_strategy(path: PathLike) -> Strategy:
    """Read a strategy file, or a directory with one file per stage (merged on the fly).

    Raises:
        StrategyError: no such file, empty, not a strategy file, or contradictory.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        return Strategy.from_items(_items(_read(path), path), f"strategy file {path!r}")
    items: list[LayoutItem] = []
    for file in _stage_files(path):
        items.extend(_items(_read(file), file))
    strategy = Strategy.from_items(items, f"strategy directory {path!r}")
    strategy.check_complete()
    return strategy


def merge_strategy_files(directory: PathLike, target: PathLike) -> None:
    """Merge the per-stage strategy files of `directory` into one, as `merge_pipeline_strategys` does.

    Entries get the `"{stage}-"` prefix; of several files of one stage the first counts. A JSON directory gives JSON.
    Files that are merged already are left out, such as an earlier run's result among the stages.

    Raises:
        StrategyError: a file cannot be read, or the directory holds none, or both kinds, or only merged ones.
        UsageError: the target is the file of a stage.
    """
    merged = _message_class()(current_stage=_MERGED)
    done: set[int] = set()
    files = _stage_files(os.fspath(directory))
    for file in files:
        message = _read(file)
        if _is_merged(message):
            continue
        if os.path.realpath(file) == os.path.realpath(target):
            raise UsageError(
                f"the merged strategy would replace {file!r}, the file of one of the stages that it is merged of; "
                "choose another name for it"
            )
        stage = _stage(message)
        if stage in done:
            continue
        done.add(stage)
        for item in message.parallel_layout_item:
            item.param_name = f"{stage}-{item.param_name}"
        merged.parallel_strategy_item.extend(message.parallel_strategy_item)
        merged.parallel_layout_item.extend(message.parallel_layout_item)
    if not done:
        raise StrategyError(
            f"strategy directory {os.fspath(directory)!r} holds merged strategies only, {files[0]!r} first; expected "
            "one file per stage, as training saves them. What is merged need not be merged again"
        )
    is_json = files[0].endswith(".json")
    _write(target, json.dumps(_to_json(merged)).encode() if is_json else merged.SerializeToString())


def save_strategy(strategy: Strategy, target: PathLike) -> None:
    """Write a strategy file that MindSpore reads too: merged when it has several stages; JSON for a `.json` name."""
    merged = strategy.stages > 1
    message = _message_class()(current_stage=_MERGED if merged else _FRESH)
    for stage in sorted({stage for stages in strategy.layouts.values() for stage in stages}):
        message.parallel_strategy_item.add(node_name=f"ms_ckpt_ext_stage_{stage}").parallel_strategys.stage = stage
    for name, stages in strategy.layouts.items():
        for stage, layout in sorted(stages.items()):
            item = message.parallel_layout_item.add(param_name=f"{stage}-{name}" if merged else name)
            layouts = item.parallel_layouts
            layouts.dev_matrix.add(dim=layout.dev_matrix)
            rows = [list(group) or [-1] for group in layout.tensor_map]
            if all(len(row) == 1 for row in rows):
                rows = [[row[0] for row in rows]]
            for row in rows:
                layouts.tensor_map.add(dim=row)
            layouts.param_split_shape.add()
            layouts.indices_offset.add()
            layouts.field = 0
            layouts.opt_weight_shard_step = layout.opt_shard_step
            layouts.opt_weight_shard_size = layout.opt_shard_size
    text = os.fspath(target).endswith(".json")
    _write(target, json.dumps(_to_json(message)).encode() if text else message.SerializeToString())


def _write(target: PathLike, data: bytes) -> None:
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise storage_error("write strategy file", str(path), error) from error


def _stage_files(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        raise StrategyError(f"{directory!r} is not a directory of strategy files; give one that exists")
    found = {
        suffix: sorted(str(p) for p in Path(directory).glob(f"[!.]*{suffix}") if p.is_file())
        for suffix in (".ckpt", ".json")
    }
    kinds = [files for files in found.values() if files]
    if len(kinds) != 1:
        held = "both .ckpt and .json files" if kinds else "no .ckpt or .json file"
        raise StrategyError(
            f"strategy directory {directory!r} holds {held}; expected one file per stage, all of one kind"
        )
    return kinds[0]


def _read(path: str) -> Any:
    """Parse either form into a StrategyMap message."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StrategyError(
            f"cannot read strategy file {path!r}: {os.strerror(error.errno or 0)}; check the path"
        ) from error
    if not data:
        raise StrategyError(f"strategy file {path!r} is empty; save it again from the training job")
    message = _parse_json(path, data) if data.lstrip()[:1] == b"{" else _parse_protobuf(path, data)
    if not message.parallel_layout_item:
        raise StrategyError(
            f"strategy file {path!r} holds no parameter layouts (a checkpoint has the same .ckpt suffix, was that "
            "given?); save it from a compiled network with `strategy_ckpt_config` or "
            "`AutoParallel.save_param_strategy_file`"
        )
    return message


def _parse_protobuf(path: str, data: bytes) -> Any:
    from google.protobuf.message import DecodeError

    message = _message_class()()
    try:
        message.ParseFromString(data)
    except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
        raise StrategyError(
            f"{path!r} is not a strategy file: {len(data)} bytes starting with {data[:8]!r} are neither MindSpore's "
            "protobuf nor its JSON form; a checkpoint has the same .ckpt suffix, was that meant?"
        ) from error
    return message


def _parse_json(path: str, data: bytes) -> Any:
    message = _message_class()()
    try:
        content = json.loads(data)
        for node, entry in content.get("parallel_strategy_item", {}).items():
            message.parallel_strategy_item.add(node_name=node).parallel_strategys.stage = int(entry.get("stage", 0))
        for name, entry in content.get("parallel_layout_item", {}).items():
            layouts = message.parallel_layout_item.add(param_name=name).parallel_layouts
            for field in ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset"):
                for row in _rows(entry.get(field) or []):
                    getattr(layouts, field).add(dim=row)
            for field in ("field", "opt_weight_shard_step", "opt_weight_shard_size"):
                setattr(layouts, field, int(entry.get(field) or 0))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise StrategyError(f"strategy file {path!r} is not valid JSON of MindSpore's form: {error}") from error
    return message


def _rows(value: list[Any]) -> list[list[int]]:
    """One flat list is one row; a list of lists is several."""
    return [list(row) for row in value] if any(isinstance(row, list) for row in value) else [value]


def _to_json(message: Any) -> dict[str, Any]:
    def flat(rows: Any) -> list[Any]:
        lists = [list(row.dim) for row in rows]
        return lists if len(lists) > 1 else [value for row in lists for value in row]

    layouts = {
        item.param_name: {
            "dev_matrix": flat(item.parallel_layouts.dev_matrix),
            "tensor_map": flat(item.parallel_layouts.tensor_map),
            "param_split_shape": flat(item.parallel_layouts.param_split_shape),
            "indices_offset": flat(item.parallel_layouts.indices_offset),
            "field": item.parallel_layouts.field,
            "opt_weight_shard_step": item.parallel_layouts.opt_weight_shard_step,
            "opt_weight_shard_size": item.parallel_layouts.opt_weight_shard_size,
        }
        for item in message.parallel_layout_item
    }
    nodes = {item.node_name: {"stage": item.parallel_strategys.stage} for item in message.parallel_strategy_item}
    return {
        "current_stage": message.current_stage,
        "parallel_strategy_item": nodes,
        "parallel_layout_item": layouts,
    }


def _stage(message: Any) -> int:
    items = message.parallel_strategy_item
    return int(items[0].parallel_strategys.stage) if items else 0


def _is_merged(message: Any) -> bool:
    """Whether every name has a stage's prefix, which only a merge gives."""
    return all(split_stage(str(item.param_name), -1)[1] >= 0 for item in message.parallel_layout_item)


def _items(message: Any, path: str) -> Iterator[LayoutItem]:
    default = _stage(message)
    for item in message.parallel_layout_item:
        if not isinstance(item.param_name, str):  # protobuf hands bytes out when they are not UTF-8
            raise StrategyError(
                f"strategy file {path!r} names a parameter {item.param_name!r}, not UTF-8: it is damaged"
            )
        name, stage = split_stage(item.param_name, default)
        layouts = item.parallel_layouts
        yield layout_item(
            name,
            stage,
            [list(row.dim) for row in layouts.dev_matrix],
            [list(row.dim) for row in layouts.tensor_map],
            (layouts.opt_weight_shard_step, layouts.opt_weight_shard_size),
            uneven=bool(layouts.field or any(row.dim for row in layouts.param_split_shape)),
            origin=f"strategy file {path!r}",
        )

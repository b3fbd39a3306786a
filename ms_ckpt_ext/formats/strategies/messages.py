"""MindSpore's `node_strategy.proto`, built at run time in a pool of its own: strategy files, and files of groups.

MindSpore's generated code holds the same messages in protobuf's default pool, where a second definition under the same
full names collides; and generated code of ours would be bound to one major version of protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

IntRows = tuple[tuple[int, ...], ...]

MESSAGES = {
    "ParallelStrategyMap": (
        "required uint32               current_stage          1",
        "repeated ParallelStrategyItem parallel_strategy_item 2",
        "repeated ParallelLayoutItem   parallel_layout_item   3",
    ),
    "ParallelStrategyItem": (
        "required string             node_name          1",
        "required ParallelStrategys  parallel_strategys 2",
    ),
    "ParallelStrategys": (
        "required uint32           stage             1",
        "repeated ParallelStrategy parallel_strategy 2",
    ),
    "ParallelStrategy": ("repeated uint32 dim 1",),
    "ParallelLayoutItem": (
        "required string          param_name       1",
        "required ParallelLayouts parallel_layouts 2",
    ),
    "ParallelLayouts": (
        "repeated DevMatrix       dev_matrix            1",
        "repeated TensorMap       tensor_map            2",
        "repeated ParamSplitShape param_split_shape     3",
        "repeated IndicesOffset   indices_offset        4",
        "required int32           field                 5",
        "required int32           opt_weight_shard_step 6",
        "required int32           opt_weight_shard_size 7",
    ),
    "DevMatrix": ("repeated uint32 dim 1",),
    "TensorMap": ("repeated int32 dim 1",),
    "ParamSplitShape": ("repeated int64 dim 1",),
    "IndicesOffset": ("repeated int64 dim 1",),
    "ParallelGroupMap": (
        "repeated ParallelGroupItem  parallel_group_item    1",
        "required ParallelGroupRanks ckpt_restore_rank_list 2",
    ),
    "ParallelGroupItem": (
        "required string             group_name           1",
        "required ParallelGroupRanks parallel_group_ranks 2",
    ),
    "ParallelGroupRanks": ("repeated uint32 dim 1",),
}
"""Name of a message -> its fields: rule, type, name and number. Required ones are written; a reader does without."""
ROW_FIELDS = ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset")
NUMBER_FIELDS = ("field", "opt_weight_shard_step", "opt_weight_shard_size")
_PACKAGE = "ms_ckpt_ext"


def strategy_map() -> Any:
    """An empty `ParallelStrategyMap`."""
    return _classes()["ParallelStrategyMap"]()


@cache
def _classes() -> dict[str, Any]:
    """Name -> class of every message."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="node_strategy.proto", package=_PACKAGE, syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in MESSAGES.items():
        into = file.message_type.add(name=message)
        for rule, kind, name, number in map(str.split, fields):
            field = into.field.add(name=name, number=int(number))
            field.label = kinds.LABEL_REPEATED if rule == "repeated" else kinds.LABEL_OPTIONAL
            if kind in MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    get = message_factory.GetMessageClass
    return {name: get(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in MESSAGES}


def decode(data: bytes) -> Any:
    """The `ParallelStrategyMap` in a file's bytes.

    Raises:
        ValueError: they are none, or the name of a parameter is not UTF-8.
    """
    content = _parsed("ParallelStrategyMap", data)
    for held in content.parallel_layout_item:
        if isinstance(held.param_name, bytes):  # what is no text is handed out as it is
            raise ValueError(f"the name {held.param_name!r} is not UTF-8")
    return content


def decode_groups(data: bytes) -> Any:
    """The `ParallelGroupMap` in the bytes of a file of groups. Raises ValueError when they are none."""
    return _parsed("ParallelGroupMap", data)


def _parsed(name: str, data: bytes) -> Any:
    from google.protobuf.message import DecodeError

    content = _classes()[name]()
    try:
        content.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return content


def encode(content: Any, current_stage: int) -> bytes:
    """The file of a `ParallelStrategyMap`."""
    content.current_stage = current_stage
    data: bytes = content.SerializeToString()
    return data


def add_operator(content: Any, name: str, stage: int, cuts: IntRows = ()) -> None:
    """Append an operator: its stage, and how its inputs are cut. Raises as `add_parameter`."""
    held = content.parallel_strategy_item.add(node_name=name).parallel_strategys
    held.stage = stage
    for row in cuts:
        held.parallel_strategy.add(dim=row)


def add_parameter(content: Any, name: str, rows: Sequence[IntRows], numbers: Sequence[int]) -> None:
    """Append a parameter's layouts, which come in the order of `ROW_FIELDS` and `NUMBER_FIELDS`.

    Raises:
        ValueError: a number does not fit its field, or the name is no Unicode.
        TypeError: what should be a number is none.
    """
    layouts = content.parallel_layout_item.add(param_name=name).parallel_layouts
    for field, held in zip(ROW_FIELDS, rows):
        for row in held:
            getattr(layouts, field).add(dim=row)
    for field, number in zip(NUMBER_FIELDS, numbers):
        setattr(layouts, field, number)


def rows_of(layouts: Any, field: str) -> IntRows:
    """One of the fields that hold rows of numbers."""
    return tuple(tuple(row.dim) for row in getattr(layouts, field))

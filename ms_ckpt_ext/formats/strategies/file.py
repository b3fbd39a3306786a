"""Strategy files: MindSpore's `node_strategy.proto`, and the strategies in such files, one stage or several merged.

The messages are built at run time in a pool of their own. MindSpore's generated code holds the same ones in protobuf's
default pool, where a second definition under the same full names collides; and generated code in this package would
be bound to one major version of protobuf. The messages of files of groups are declared here as well; the JSON form of
a strategy is in `json_form`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Union

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy, layout_item, split_stage
from ms_ckpt_ext.errors import StrategyError, also, storage_error
from ms_ckpt_ext.formats.table import STRATEGY_SUFFIXES, pointer_fault
from ms_ckpt_ext.storage.linux import read_small, write_atomically

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
"""Name of a message -> its fields: rule, type, name and number. Required ones are always written, not demanded."""
ROW_FIELDS = ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset")
NUMBER_FIELDS = ("field", "opt_weight_shard_step", "opt_weight_shard_size")
_PACKAGE = "ms_ckpt_ext"
_FRESH, MERGED = 2, 1  # what MindSpore writes as current_stage, which is not a stage


def load_strategy(path: Union[str, Path]) -> Strategy:
    """Read a strategy file, or a directory with one file per stage (merged on the fly).

    Raises:
        StrategyError: there is no such file, or it is empty, not a strategy file, or contradicts itself.
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
        StrategyError: a parameter's name is not valid Unicode.
        StorageError: the file cannot be written.
    """
    merged = strategy.stages > 1
    content = strategy_map()
    for stage in sorted({stage for held in strategy.layouts.values() for stage in held}):
        add_operator(content, f"ms_ckpt_ext_stage_{stage}", stage)
    try:
        for name, held in strategy.layouts.items():
            for stage, layout in sorted(held.items()):
                _add_layout(content, f"{stage}-{name}" if merged else name, layout)
    except ValueError as error:
        raise StrategyError(f"{strategy.origin} cannot be written as a strategy file: {error}") from error
    current = MERGED if merged else _FRESH
    if os.fspath(target).endswith(".json"):
        from ms_ckpt_ext.formats.strategies.json_form import to_text

        write(target, to_text(content, current))
    else:
        write(target, encode(content, current))


def _add_layout(content: Any, name: str, layout: Layout) -> None:
    rows: IntRows = tuple(tuple(group) or (-1,) for group in layout.tensor_map)
    if all(len(row) == 1 for row in rows):
        rows = (tuple(row[0] for row in rows),)
    numbers = (0, layout.opt_shard_step, layout.opt_shard_size)
    add_parameter(content, name, ((layout.dev_matrix,), rows, ((),), ((),)), numbers)


def write(target: Union[str, Path], data: bytes) -> None:
    """Write a strategy file, whole or not at all. Raises StorageError."""
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise storage_error("write strategy file", str(path), error) from error


def stage_files(directory: str) -> list[str]:
    """The files of a directory that has one per stage, in the order of names. Raises StrategyError."""
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
    """Read a strategy file of either form, as a `ParallelStrategyMap`.

    Raises:
        StrategyError: it is neither, or has no layouts and `empty` does not allow that.
    """
    data = read_bytes(path)
    if data.lstrip()[:1] == b"{":
        from ms_ckpt_ext.formats.strategies.json_form import from_text

        content = from_text(path, data)
    else:
        content = _parse_protobuf(path, data)
    if not content.parallel_layout_item and not empty:
        raise StrategyError(
            f"strategy file {path!r} holds no parameter layouts (a checkpoint has the same .ckpt suffix, was that "
            "given?); save it from a compiled network with `strategy_ckpt_config` or "
            "`AutoParallel.save_param_strategy_file`"
        )
    return content


def read_bytes(path: str) -> bytes:
    """All of a strategy file. Raises StrategyError when it does not exist or is empty."""
    try:
        data = read_small(path, pipe=True)
    except OSError as error:
        raise also(StrategyError, type(error))(
            f"cannot read strategy file {path!r}: {error.strerror or error}; check the path"
        ) from error
    fault = pointer_fault(path, data)
    if fault is not None:
        raise StrategyError(fault)
    if not data:
        raise StrategyError(f"strategy file {path!r} is empty; save it again from the training job")
    return data


def _parse_protobuf(path: str, data: bytes) -> Any:
    try:
        return decode(data)
    except ValueError as error:
        raise also(StrategyError, TypeError)(
            f"{path!r} is not a strategy file: {len(data)} bytes starting with {data[:8]!r} are neither MindSpore's "
            f"protobuf nor its JSON form ({error}); a checkpoint has the same .ckpt suffix, was that meant?"
        ) from error


def _items(content: Any, path: str) -> Iterator[LayoutItem]:
    operators = content.parallel_strategy_item
    default = operators[0].parallel_strategys.stage if operators else 0
    known: dict[bytes, Layout] = {}  # most parameters of a model have the same layout
    for held in content.parallel_layout_item:
        plain, stage = split_stage(held.param_name, default)
        layouts = held.parallel_layouts
        raw = layouts.SerializeToString()
        if raw not in known:
            known[raw] = layout_item(
                plain,
                stage,
                rows_of(layouts, "dev_matrix"),
                rows_of(layouts, "tensor_map"),
                (layouts.opt_weight_shard_step, layouts.opt_weight_shard_size),
                uneven=bool(layouts.field or any(rows_of(layouts, "param_split_shape"))),
                origin=f"strategy file {path!r}",
            ).layout
        yield LayoutItem(plain, stage, known[raw])


def strategy_map() -> Any:
    """An empty `ParallelStrategyMap`."""
    return _classes()["ParallelStrategyMap"]()


_OLD = re.compile(rb"__version__ = '2\.[789]\.")
"""What MindSpore's version file says in releases whose code was generated by protoc before 3.19."""


def _choose_implementation() -> None:
    """Make sure that MindSpore can be imported after protobuf.

    The generated code of 2.7 to 2.9 fails in every implementation of protobuf but the one in Python, which these
    releases select themselves when they are imported first.
    """
    variable = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
    if variable in os.environ or "google.protobuf" in sys.modules:
        return
    spec = PathFinder.find_spec("mindspore")
    told = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if told and told.is_file() and _OLD.search(told.read_bytes()):
        os.environ[variable] = "python"


@cache
def _classes() -> dict[str, Any]:
    """Name -> class of every message."""
    _choose_implementation()
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
        ValueError: they are not one, or the name of a parameter is not UTF-8.
    """
    content = _parsed("ParallelStrategyMap", data)
    for held in content.parallel_layout_item:
        if isinstance(held.param_name, bytes):  # protobuf returns what is not UTF-8 as bytes
            raise ValueError(f"the name {held.param_name!r} is not UTF-8")
    return content


def decode_groups(data: bytes) -> Any:
    """The `ParallelGroupMap` in the bytes of a file of groups. Raises ValueError when they are not one."""
    return _parsed("ParallelGroupMap", data)


def _parsed(name: str, data: bytes) -> Any:
    content = _classes()[name]()
    from google.protobuf.message import DecodeError

    try:
        content.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return content


def encode(content: Any, current_stage: int) -> bytes:
    """The bytes of a `ParallelStrategyMap`'s file."""
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
    """Append a parameter's layouts, in the order of `ROW_FIELDS` and `NUMBER_FIELDS`.

    Raises:
        ValueError: a number does not fit its field, or the name is not valid Unicode.
        TypeError: what should be a number is not one.
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

"""Our reader and writer of strategies against the protobuf library, which describes the same messages here."""

from __future__ import annotations

import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.strategy_wire import Layouts, StrategyMap, decode, entry, node
from ms_ckpt_ext.formats.wire import encode_varint
from tests.jobs.support import CASES

ROWS = Layouts._fields[:4]
MESSAGES = {
    "DimU": [("dim", 1, "uint32", True)],
    "DimI": [("dim", 1, "int32", True)],
    "DimL": [("dim", 1, "int64", True)],
    "Strategys": [("stage", 1, "uint32", False), ("parallel_strategy", 2, "DimU", True)],
    "StrategyItem": [("node_name", 1, "string", False), ("parallel_strategys", 2, "Strategys", False)],
    "Layouts": [
        *zip(ROWS, range(1, 5), ("DimU", "DimI", "DimL", "DimL"), [True] * 4),
        *((name, number, "int32", False) for number, name in enumerate(Layouts._fields[4:], 5)),
    ],
    "LayoutItem": [("param_name", 1, "string", False), ("parallel_layouts", 2, "Layouts", False)],
    "StrategyMap": [
        ("current_stage", 1, "uint32", False),
        ("parallel_strategy_item", 2, "StrategyItem", True),
        ("parallel_layout_item", 3, "LayoutItem", True),
    ],
}


@cache
def message_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="strategy.proto", package="tests", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, described in MESSAGES.items():
        into = file.message_type.add(name=message)
        for name, number, kind, repeated in described:
            field = into.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".tests.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tests.StrategyMap"))


def parsed(data: bytes) -> Any:
    message = message_class()()
    message.ParseFromString(data)
    return message


def assert_equal(ours: StrategyMap, theirs: Any) -> None:
    assert [(held.name, held.stage) for held in ours.nodes] == [
        (held.node_name, held.parallel_strategys.stage) for held in theirs.parallel_strategy_item
    ]
    assert [held.name for held in ours.entries] == [held.param_name for held in theirs.parallel_layout_item]
    for mine, held in zip(ours.entries, theirs.parallel_layout_item):
        for name, value in mine.layouts._asdict().items():
            wanted = getattr(held.parallel_layouts, name)
            assert value == (tuple(tuple(row.dim) for row in wanted) if name in ROWS else wanted), name


@pytest.mark.parametrize("case", CASES)
def test_mindspores_files(case: str, golden: Path) -> None:
    for path in [golden / case / "strategy.ckpt", *(golden / case / "strategy_stages").glob("*.ckpt")]:
        data = path.read_bytes()
        held, theirs = decode(data, "s"), parsed(data)
        assert len(held.entries) > 10
        assert_equal(held, theirs)
        assert held.encode(theirs.current_stage) == data


unsigned, small, wide = st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)


def rows(number: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    row = st.lists(number, max_size=4).map(tuple)
    return st.lists(row, max_size=3).map(tuple)


layouts = st.builds(Layouts, rows(unsigned), rows(small), rows(wide), rows(wide), small, small, small)
maps = st.builds(
    lambda nodes, entries: StrategyMap(tuple(node(*held) for held in nodes), tuple(entry(*held) for held in entries)),
    st.lists(st.tuples(st.text(max_size=9), unsigned), max_size=3),
    st.lists(st.tuples(st.text(max_size=9), layouts), max_size=4),
)


@given(maps, unsigned)
def test_what_we_write_is_what_protobuf_writes(content: StrategyMap, stage: int) -> None:
    data = content.encode(stage)
    theirs = parsed(data)
    assert theirs.current_stage == stage
    assert_equal(content, theirs)
    assert theirs.SerializeToString() == data
    assert decode(data, "s") == content


@settings(max_examples=300)
@given(
    maps,
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["cut", "set", "drop"])), max_size=3
    ),
)
def test_damage_is_read_as_protobuf_reads_it_or_told(content: StrategyMap, damage: list[tuple[int, int, str]]) -> None:
    """Numbers too large for their type, which protobuf cuts off, are left to who looks at them."""
    data = bytearray(content.encode(2))
    for place, byte, kind in damage:
        at = place % max(1, len(data))
        data = data[:at] if kind == "cut" else data[:at] + bytes([byte] * (kind == "set")) + data[at + 1 :]
    try:
        ours = decode(bytes(data), "s")
    except FormatError:
        return
    try:
        theirs = parsed(bytes(data))
        names = [held.param_name for held in theirs.parallel_layout_item]
    except Exception:
        return
    assert [held.name for held in ours.entries] == names
    for mine, held in zip(ours.entries, theirs.parallel_layout_item):
        found = tuple(tuple(row.dim) for row in held.parallel_layouts.dev_matrix)
        assert tuple(tuple(n & 2**32 - 1 for n in row) for row in mine.layouts.dev_matrix) == found


def test_packed_numbers_repeated_messages_and_what_is_unknown() -> None:
    """A message that stands twice is merged: rows add up, of single numbers the last counts."""
    first, second = Layouts(((2, 4),), field=1, opt_weight_shard_step=3), Layouts(((8,),), ((-1, 0),), field=0)
    inner = b"".join(bytes([0x12, len(held.encode())]) + held.encode() for held in (first, second))
    packed = b"\x12\x06\x0a\x04\x0a\x02\x05\x06"  # parallel_layouts { dev_matrix { dim: [5, 6] } }
    held = b"\x0a\x01w" + inner + packed + b"\x98\x06\x07" + b"\x0d1234"  # field 99; param_name as four bytes
    data = b"\x1a" + bytes([len(held)]) + held
    (found,) = decode(data, "s").entries
    assert (found.name, found.layouts) == ("w", Layouts(((2, 4), (8,), (5, 6)), ((-1, 0),)))
    assert_equal(decode(data, "s"), parsed(data))


def test_names_that_are_no_text() -> None:
    with pytest.raises(FormatError, match=r"'s': the name b'\\xff' at byte 4 is not UTF-8"):
        decode(b"\x1a\x03\x0a\x01\xff", "s")
    assert decode(b"\x12\x03\x0a\x01\xff", "s").nodes[0].name == "\ufffd"  # of an operator only the stage counts


def test_what_stands_many_times_is_read_once() -> None:
    """Memory and time grow as the file does, not as its square."""
    held = b"\x0a\x01w" + b"\x12\x02\x38\x01" * 50_000  # parallel_layouts { opt_weight_shard_size: 1 }, over and over
    data = b"\x1a" + encode_varint(len(held)) + held
    tracemalloc.start()
    (found,) = decode(data, "s").entries
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.layouts == Layouts(opt_weight_shard_size=1)
    assert peak < 100 * len(data)


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("\ud800", Layouts()),
        ("w", Layouts(dev_matrix=((-1,),))),
        ("w", Layouts(dev_matrix=((2**32,),))),
        ("w", Layouts(tensor_map=((2**31,),))),
        ("w", Layouts(param_split_shape=((2**63,),))),
        ("w", Layouts(opt_weight_shard_step=2**64)),
    ],
)
def test_what_a_file_cannot_hold_is_not_written(name: str, layouts: Layouts) -> None:
    with pytest.raises(ValueError, match=r"surrogates not allowed|expected at least -?\d+ and less than \d+"):
        entry(name, layouts)
    with pytest.raises(ValueError, match="stage of -1"):
        node("op", -1)

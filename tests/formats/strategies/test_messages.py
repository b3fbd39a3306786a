"""The messages of strategy files: MindSpore's own definition, its files, and what a file cannot hold."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.formats.strategies import file as proto
from ms_ckpt_ext.formats.strategies.file import MESSAGES, IntRows
from tests.support.checkpoints import CASES

UNSIGNED, SMALL, WIDE = (0, 2**32 - 1), (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)


@pytest.mark.stock
def test_the_declaration_is_mindspores() -> None:
    """Every message, and every field's rule, type and number, against the generated code of the installed release."""
    from mindspore.train import node_strategy_pb2 as theirs  # first, for 2.9 and older

    from google.protobuf.descriptor_pb2 import DescriptorProto  # isort: skip

    rules = {1: "optional", 2: "required", 3: "repeated"}
    kinds = {3: "int64", 5: "int32", 9: "string", 13: "uint32"}
    found = {}

    def walk(message: Any) -> None:
        described = DescriptorProto()
        message.CopyToProto(described)
        found[message.name] = [
            (rules[field.label], field.type_name.split(".")[-1] or kinds[field.type], field.name, str(field.number))
            for field in described.field
        ]
        for inner in filter(None, (field.message_type for field in message.fields)):
            walk(inner)

    walk(theirs.ParallelStrategyMap.DESCRIPTOR)
    walk(theirs.ParallelGroupMap.DESCRIPTOR)
    assert {name: [tuple(field.split()) for field in fields] for name, fields in MESSAGES.items()} == found


@pytest.mark.parametrize("case", CASES)
def test_mindspores_files(case: str, golden: Path) -> None:
    for path in [golden / case / "strategy.ckpt", *(golden / case / "strategy_stages").glob("*.ckpt")]:
        data = path.read_bytes()
        content = proto.decode(data)
        assert len(content.parallel_layout_item) > 10
        assert proto.encode(content, content.current_stage) == data


def rows(limits: tuple[int, int]) -> st.SearchStrategy[IntRows]:
    row = st.lists(st.integers(*limits), max_size=4).map(tuple)
    return st.lists(row, max_size=3).map(tuple)


fields = st.tuples(rows(UNSIGNED), rows(SMALL), rows(WIDE), rows(WIDE))
numbers = st.tuples(*[st.integers(*SMALL)] * 3)


@given(
    st.lists(st.tuples(st.text(max_size=9), st.integers(*UNSIGNED), rows(UNSIGNED)), max_size=3),
    st.lists(st.tuples(st.text(max_size=9), fields, numbers), max_size=4),
    st.integers(*UNSIGNED),
)
def test_what_is_written_is_read(
    operators: list[tuple[str, int, IntRows]],
    parameters: list[tuple[str, tuple[IntRows, ...], tuple[int, ...]]],
    stage: int,
) -> None:
    content = proto.strategy_map()
    for operator in operators:
        proto.add_operator(content, *operator)
    for parameter in parameters:
        proto.add_parameter(content, *parameter)
    again = proto.decode(proto.encode(content, stage))
    assert again.current_stage == stage
    for name, cut_stage, cuts in operators:
        held = again.parallel_strategy_item.pop(0)
        assert (held.node_name, held.parallel_strategys.stage) == (name, cut_stage)
        assert tuple(tuple(row.dim) for row in held.parallel_strategys.parallel_strategy) == cuts
    for name, wanted, whole in parameters:
        item = again.parallel_layout_item.pop(0)
        assert item.param_name == name
        assert tuple(proto.rows_of(item.parallel_layouts, field) for field in proto.ROW_FIELDS) == wanted
        assert tuple(getattr(item.parallel_layouts, field) for field in proto.NUMBER_FIELDS) == whole


def test_packed_numbers_and_repeated_messages() -> None:
    """A message that stands twice is merged: rows add up, of single numbers the last counts."""
    first, second = b"\x0a\x04\x08\x02\x08\x04\x28\x01\x30\x03", b"\x0a\x02\x08\x08\x28\x00"
    packed = b"\x0a\x04\x0a\x02\x05\x06"  # dev_matrix { dim: [5, 6] }
    parts = b"".join(b"\x12" + bytes([len(part)]) + part for part in (first, second, packed))
    held = b"\x0a\x01w" + parts + b"\x98\x06\x07"  # and field 99
    (item,) = proto.decode(b"\x1a" + bytes([len(held)]) + held).parallel_layout_item
    assert item.param_name == "w"
    assert proto.rows_of(item.parallel_layouts, "dev_matrix") == ((2, 4), (8,), (5, 6))
    assert (item.parallel_layouts.field, item.parallel_layouts.opt_weight_shard_step) == (0, 3)


@pytest.mark.parametrize(
    ("data", "told"), [(b"\x08\x02\x1a\x03\x0a\x01\xff", "UTF-8|utf-8"), (b"\x1a\x7f", "pars|Truncated")]
)
def test_what_is_no_strategy(data: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        proto.decode(data)


@pytest.mark.parametrize(
    ("name", "rows", "numbers"),
    [
        ("\ud800", (), ()),
        ("w", (((-1,),),), ()),
        ("w", (((2**32,),),), ()),
        ("w", ((), ((2**31,),)), ()),
        ("w", ((), (), ((2**63,),)), ()),
        ("w", (), (0, 2**64)),
    ],
)
def test_what_a_file_cannot_hold_is_not_taken(name: str, rows: tuple[IntRows, ...], numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"surrogates not allowed|unicode|out of range"):
        proto.add_parameter(proto.strategy_map(), name, rows, numbers)
    with pytest.raises(ValueError, match="out of range"):
        proto.add_operator(proto.strategy_map(), "op", -1)


AFTER = "import sys; from ms_ckpt_ext.formats.strategies.file import load_strategy; load_strategy(sys.argv[1]); "


def after_a_strategy(statement: str, strategy: Path, path: str) -> str:
    """What a new process prints that reads a strategy file before it runs the statement."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("PROTOCOL_BUFFERS")}
    around["PYTHONPATH"] = os.pathsep.join([path, str(Path(__file__).resolve().parents[3])])
    command = [sys.executable, "-c", AFTER + statement, str(strategy)]
    run = subprocess.run(command, env=around, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.stock
def test_mindspore_can_be_imported_after_a_strategy_was_read(golden: Path) -> None:
    """2.7 to 2.9 end the process when protobuf has been imported in another implementation than theirs."""
    statement = "import mindspore; from mindspore.train import node_strategy_pb2; print(mindspore.__version__)"
    told = after_a_strategy(statement, golden / "tp4/strategy.ckpt", "")
    assert told.endswith(importlib.metadata.version("mindspore"))


@pytest.mark.parametrize(("version", "python"), [("2.7.2", True), ("2.9.0", True), ("2.10.0", False), (None, False)])
def test_the_implementation_is_what_mindspore_needs(
    version: Optional[str], python: bool, golden: Path, tmp_path: Path
) -> None:
    """Determined without importing it."""
    (tmp_path / "mindspore").mkdir()
    (tmp_path / "mindspore/__init__.py").write_text("raise AssertionError")
    if version is not None:
        (tmp_path / "mindspore/version.py").write_text(f"__version__ = '{version}'\n")
    statement = "from google.protobuf.internal.api_implementation import Type; print(Type() == 'python')"
    assert after_a_strategy(statement, golden / "tp4/strategy.ckpt", str(tmp_path)) == str(python)

"""Protobuf's wire format: literal byte strings, and agreement with the protobuf library's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.errors import FormatError, TruncatedFileError
from ms_ckpt_ext.formats.wire import (
    Cursor,
    Field,
    encode_bytes,
    encode_number,
    encode_varint,
    fields,
    signed,
)
from tests.support.memory import MemoryReader


def walk(data: bytes, window: int = 4096) -> list[Field]:
    return list(fields(Cursor(MemoryReader(data), window=window), len(data)))


@pytest.mark.parametrize(
    ("number", "encoded"),
    [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**64 - 1, "ff" * 9 + "01")],
)
def test_varints(number: int, encoded: str) -> None:
    assert encode_varint(number).hex() == encoded
    assert Cursor(MemoryReader(bytes.fromhex(encoded))).varint(10) == number


@pytest.mark.parametrize(("raw", "number"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**64 - 1, -1), (2**63, -(2**63))])
def test_signed(raw: int, number: int) -> None:
    assert signed(raw) == number


def test_fields_of_every_wire_type() -> None:
    data = bytes.fromhex("08031202686f19" + "11" * 8 + "25" + "22" * 4)
    assert walk(data) == [
        Field(1, 0, 0, 3, 2),
        Field(2, 2, 2, 4, 6),
        Field(3, 1, 6, 7, 15),
        Field(4, 5, 15, 16, 20),
    ]


@pytest.mark.parametrize(
    ("encoded", "kind", "words"),
    [
        ("80", TruncatedFileError, "ends at byte 1"),
        ("0a05aa", TruncatedFileError, "ends at byte 3"),
        ("19aaaa", TruncatedFileError, "8 bytes are expected at byte 1"),
        ("0b", FormatError, "wire type 3 at byte 0"),
        ("08" + "ff" * 10 + "01", FormatError, "exceeds 64 bits"),
        ("08" + "ff" * 9 + "02", FormatError, "exceeds 64 bits"),
    ],
)
def test_damage_is_told_with_its_offset(encoded: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        walk(bytes.fromhex(encoded))


def test_a_length_may_not_leave_its_message() -> None:
    cursor = Cursor(MemoryReader(bytes.fromhex("0a05aabbccddee")))
    with pytest.raises(FormatError, match="run past byte 4"):
        list(fields(cursor, 4))


def test_memory_reader_refuses_ranges_beyond_its_end() -> None:
    with pytest.raises(TruncatedFileError):
        MemoryReader(b"abc").read_into(2, memoryview(bytearray(2)))


@given(st.lists(st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=40)), max_size=20), st.integers(1, 64))
def test_what_is_encoded_is_found_through_any_window(values: list[object], window: int) -> None:
    data = b"".join(encode_number(1, v) if isinstance(v, int) else encode_bytes(2, bytes(v)) for v in values)  # type: ignore[call-overload]
    found = [f.value if f.wire == 0 else data[f.value : f.stop] for f in walk(data, window)]
    assert found == values

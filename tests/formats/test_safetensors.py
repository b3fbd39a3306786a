"""safetensors headers: everything a header can get wrong, and byte identity with the library."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors as library
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ms_ckpt_ext.core.dtype import DTYPES
from ms_ckpt_ext.errors import CheckpointError, FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import FileIndex, TensorSpec
from tests.formats.damage import memory_limit, time_limit
from tests.formats.memory import MemoryReader


def index(raw: bytes) -> FileIndex:
    return safetensors.read_index(MemoryReader(raw, "a.safetensors"))


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD = {
    "empty": (b"", TruncatedFileError, "holds 0 bytes"),
    "header cut": (file_of({"a": entry()}, bytes(8))[:20], TruncatedFileError, "the header needs"),
    "header too large": (b"\xff" * 16, FormatError, "more than the format's limit"),
    "not JSON": (file_of(b"\x89PNG\r\n"), FormatError, "are not a JSON header"),
    "not UTF-8": (file_of(b"\xff\xfe{}"), FormatError, "are not a JSON header"),
    "deep JSON": (file_of(b"[" * 100_000), FormatError, "are not a JSON header"),
    "dense JSON": (file_of(b"[" * 4_000_000), FormatError, "would take some 331 MiB of memory"),
    "no object": (file_of([1]), FormatError, "a JSON list"),
    "name twice": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        FormatError,
        "names 'a' twice",
    ),
    "overlap": (
        file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        FormatError,
        "'b' at data offset 4 overlaps 'a'",
    ),
    "gap": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), FormatError, "gap of 4 bytes after 'a'"),
    "gap at the start": (
        file_of({"a": entry(offsets=(4, 12))}, bytes(12)),
        FormatError,
        "gap of 4 bytes after 'the header'",
    ),
    "wrong size": (
        file_of({"a": entry(offsets=(0, 7))}, bytes(7)),
        FormatError,
        "needs 8 bytes, its offsets [0, 7] give 7",
    ),
    "backwards": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), FormatError, "needs 8 bytes"),
    "data cut": (file_of({"a": entry()}, bytes(7)), TruncatedFileError, "the tensors end at byte"),
    "bytes after the end": (file_of({"a": entry()}, bytes(9)), FormatError, "1 bytes after the last tensor"),
    "unknown dtype": (
        file_of({"a": entry(dtype="F31")}, bytes(8)),
        FormatError,
        "dtype 'F31', which safetensors does not",
    ),
    "dtype of .ckpt only": (file_of({"a": entry(dtype="STR")}, bytes(8)), FormatError, "dtype 'STR'"),
    "negative shape": (file_of({"a": entry(shape=(-2,))}, bytes(8)), FormatError, "whole numbers of at least 0"),
    "float shape": (file_of({"a": entry(shape=(2.0,))}, bytes(8)), FormatError, "whole numbers"),
    "bool shape": (file_of({"a": entry(shape=(True, 2))}, bytes(8)), FormatError, "whole numbers"),
    "huge shape": (file_of({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)), FormatError, "bytes, its offsets"),
    "three offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, bytes(8)), FormatError, "must have dtype, shape and"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), FormatError, "must have dtype"),
    "entry is a number": (file_of({"a": 3}), FormatError, "must have dtype"),
    "metadata not text": (file_of({"__metadata__": {"n": 1}}), FormatError, "must map strings to strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_header(name: str) -> None:
    raw, kind, message = BAD[name]
    with pytest.raises(kind) as caught:
        index(raw)
    assert message in str(caught.value)
    assert "a.safetensors" in str(caught.value)


def test_a_good_header() -> None:
    found = index(file_of({"__metadata__": {"format": "ms"}, "b": entry("BF16", [], [8, 10]), "a": entry()}, bytes(10)))
    assert found.metadata == {"format": "ms"}
    assert {name: (e.dtype.name, e.shape, e.nbytes) for name, e in found.tensors.items()} == {
        "b": ("BF16", (), 2),
        "a": ("F32", (2,), 8),
    }
    base = found.size - 10
    assert found.tensors["b"].extents == ((base + 8, 2),)
    assert index(file_of({})).tensors == {}


LIBRARY = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "int16": "I16",
    "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32",
    "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
}  # fmt: skip
"""The library's name for a dtype it writes -> the format's."""


def test_the_library_writes_every_dtype_as_we_do() -> None:
    if not hasattr(library, "TensorSpec"):
        pytest.skip("the installed safetensors (before 0.8) writes dtypes of numpy only")
    memory = ctypes.create_string_buffer(bytes(range(128)))
    specs, ours = {}, []
    for number, (name, dtype) in enumerate(LIBRARY.items()):
        nbytes = 8 * DTYPES[dtype].bits // 8
        specs[f"w{number}"] = library.TensorSpec(
            dtype=name, shape=[2, 4], data_ptr=ctypes.addressof(memory), data_len=nbytes
        )
        ours.append(TensorSpec(f"w{number}", DTYPES[dtype], (2, 4)))
    raw = bytes(library.serialize(specs, {"format": "ms"}))
    laid = safetensors.layout(ours, {"format": "ms"})
    assert raw.startswith(laid.literals[0][1])
    assert index(raw).tensors == laid.tensors


def test_numpy_dtypes_and_order_are_the_librarys(tmp_path: Path) -> None:
    arrays = {
        f"{kind}.{np.dtype(dtype).name}": np.arange(6).reshape(2, 3).astype(dtype)
        for kind in ("b", "a", "ü")
        for dtype in ("?", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "c8", "f8", "i8", "u8")
    }
    save_file(arrays, tmp_path / "x.safetensors", {"format": "ms"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    found = index(raw)
    for name, e in found.tensors.items():
        assert raw[e.extents[0].offset :][: e.nbytes] == arrays[name].tobytes()
    specs = [TensorSpec(name, e.dtype, e.shape) for name, e in reversed(found.tensors.items())]
    laid = safetensors.layout(specs, {"format": "ms"})
    ((offset, literal),) = laid.literals
    assert (offset, literal) == (0, raw[: len(literal)])
    assert laid.size == len(raw)
    assert laid.tensors == found.tensors


@pytest.mark.parametrize("name", [n for n in DTYPES if n not in ("C128", "STR")])
def test_every_dtype_of_the_format(name: str) -> None:
    bits = DTYPES[name].bits
    laid = safetensors.layout([TensorSpec("w", DTYPES[name], (2, 8))], {})
    raw = laid.literals[0][1] + bytes(2 * bits)
    assert laid.size == len(raw)
    assert index(raw).tensors["w"].dtype is DTYPES[name]


def test_layout_reproduces_golden_headers(golden: Path) -> None:
    files = sorted(golden.glob("*/shards/rank_*/net.safetensors"))
    assert len(files) > 80
    for file in files:
        raw = file.read_bytes()
        found = index(raw)
        laid = safetensors.layout([TensorSpec(n, e.dtype, e.shape) for n, e in found.tensors.items()], found.metadata)
        assert raw.startswith(laid.literals[0][1])
        assert laid.tensors == found.tensors


def test_what_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="'w' is Complex128, which safetensors cannot hold"):
        safetensors.layout([TensorSpec("w", DTYPES["C128"], (2,))], {})
    with pytest.raises(UsageError, match="two tensors named 'w'"):
        safetensors.layout([TensorSpec("w", DTYPES["U8"], (2,))] * 2, {})
    with pytest.raises(UsageError, match="__metadata__"):
        safetensors.layout([TensorSpec("__metadata__", DTYPES["U8"], (2,))], {})


GOOD = file_of({"__metadata__": {"format": "ms"}, "a": entry(), "bb": entry("I8", [3], [8, 11])}, bytes(range(11)))


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(GOOD)),
)
def test_mutations_give_the_right_data_or_our_error(changes: list[tuple[int, int]], keep: int) -> None:
    raw = bytearray(GOOD)
    for at, value in changes:
        raw[at] = value
    try:
        found = index(bytes(raw[: keep if changes[0][1] % 2 else len(raw)]))
    except CheckpointError:
        return
    assert sum(e.nbytes for e in found.tensors.values()) == found.size - 8 - int.from_bytes(raw[:8], "little")


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def items(piece: str) -> str:
    return f'{{"x":[{",".join([piece] * (120_000 // (len(piece) + 1)))}]}}'


def keys(value: str) -> str:
    return "{" + ",".join(f'"{n:x}":{value}' for n in range(12_000)) + "}"


DENSE = {piece: items(piece) for piece in ("999", "1e9", "true", "[]", "{}", "[[]]", "[999]", '{"":[]}', '{"a":1}')}
DENSE |= {
    piece: items(piece) for piece in ('"ab"', '"\u4e2d"', '"\U0001f600"', '{"a":{"b":{"c":{}}}}', '{"a":1,"b":2}')
}
DENSE |= {f"{{{value},…}}": keys(value) for value in ("9", "999", '"ab"', "[]", "{}")}
DENSE |= {
    "notes": f'{{"__metadata__":{keys(chr(34) + "ab" + chr(34))}}}',
    "wide text": f'{{"x":"{"a" * 120_000}\U0001f600"}}',
    "no end": '{"' + '\\"[[' * 30_000,
}


@pytest.mark.parametrize("header", DENSE.values(), ids=DENSE)
def test_a_header_becomes_no_more_than_the_file_justifies(header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the table says that it is too much, which is then not parsed, or parsing takes no more than it says."""
    data = framed(header.encode())
    assert dense(data, monkeypatch, 1 << 40) is False, "the guard is never right"
    low, high = 0, 100 * len(data)
    while high - low > len(data) // 10:  # the least budget with which it is parsed
        middle = (low + high) // 2
        low, high = (middle, high) if dense(data, monkeypatch, middle) else (low, middle)
    monkeypatch.setattr(safetensors, "BUDGET", high)
    with time_limit(), memory_limit(len(data) + high + (64 << 10)):
        assert not dense(data, monkeypatch, high)


def dense(data: bytes, monkeypatch: pytest.MonkeyPatch, budget: int) -> bool:
    """Whether a file is refused for its density; other errors do not count."""
    monkeypatch.setattr(safetensors, "BUDGET", budget)
    try:
        safetensors.read_index(MemoryReader(data))
    except FormatError as error:
        return "no table of tensors is so dense" in str(error)
    return False


@pytest.mark.parametrize(
    "shape, words",
    [
        ([0] * 33, "at most 32 axes"),
        ([0, 2**64 - 1], "no array has the shape"),
        ([2**32, 0, 2**29], "no array has the shape"),
    ],
)
def test_shapes_that_no_array_has(shape: list[int], words: str) -> None:
    for legal in ([0] * 32, [0, 2**60]):
        found = index(framed(json.dumps({"w": {"dtype": "F32", "shape": legal, "data_offsets": [0, 0]}}).encode()))
        assert np.empty(0, np.float32).reshape(found.tensors["w"].shape).shape == tuple(legal)
    with pytest.raises(FormatError, match=words):
        index(framed(json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()))


def test_marks_in_names_and_notes_are_text() -> None:
    notes = {"config": json.dumps([[[]]] * 1000), "quote": '\\"[[[[' * 1000}
    entry = {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}
    data = framed(json.dumps({"__metadata__": notes, "[" * 1000: entry}).encode()) + b"7"
    found = safetensors.read_index(MemoryReader(data))
    assert list(found.tensors) == ["[" * 1000] and found.metadata == notes


def test_the_densest_legal_header_is_read() -> None:
    entries = {hex(n)[2:]: {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for n in range(40_000)}
    data = framed(json.dumps(entries, separators=(",", ":")).encode())
    assert len(safetensors.read_index(MemoryReader(data)).tensors) == 40_000

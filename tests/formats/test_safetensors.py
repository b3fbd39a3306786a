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

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.errors import CheckpointError, FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import TensorSpec
from tests.formats.test_safetensors_memory import DENSE, items, keys
from tests.support.memory import MemoryReader
from tests.support.safetensors_file import file_of, index


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD = {
    "empty": (b"", TruncatedFileError, "holds 0 bytes"),
    "header cut": (file_of({"a": entry()}, bytes(8))[:20], TruncatedFileError, "the header needs"),
    "header too large": (b"\xff" * 16, FormatError, "more than the format's limit"),
    "not JSON": (file_of(b"\x89PNG\r\n"), FormatError, "no JSON header of a safetensors file, which has an object"),
    "not UTF-8": (file_of(b"\xff\xfe{}"), FormatError, "an object at byte 8"),
    "a name that is not UTF-8": (
        file_of(json.dumps({"a": entry()}).encode().replace(b"a", b"\xff", 1), bytes(8)),
        FormatError,
        "a text in UTF-8 (invalid start byte) at byte 9",
    ),
    "lists": (file_of(b"[" * 100_000), FormatError, "an object at byte 8"),
    "deep JSON": (file_of(b'{"a":' * 100_000), FormatError, "an entry that ends within 65536 bytes at byte 13"),
    "deep lists": (file_of(b'{"a":{"shape":' + b"[" * 9000 + b"]" * 9000 + b"}}"), FormatError, "must have dtype"),
    "no object": (file_of([1]), FormatError, "an object at byte 8"),
    "no end": (file_of(json.dumps({"a": entry()}).encode()[:-1], bytes(8)), FormatError, "a comma or the end"),
    "a comma too many": (
        file_of(b'{"a":%b,}' % json.dumps(entry()).encode(), bytes(8)),
        FormatError,
        "a name in quotes",
    ),
    "text behind": (file_of(json.dumps({"a": entry()}).encode() + b"x", bytes(8)), FormatError, "nothing but blanks"),
    "a name without end": (file_of(b'{"a'), FormatError, "a text that ends with a quote at byte 9"),
    "a name of two lines": (file_of(b'{"a\nb":1}'), FormatError, "Invalid control character"),
    "half a character": (file_of(b'{"\\ud800":{}}'), FormatError, "no text (surrogates not allowed)"),
    "leading zeros": (
        file_of(json.dumps({"a": entry()}).encode().replace(b"[2", b"[02"), bytes(8)),
        FormatError,
        "whole",
    ),
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
    "negative offset": (file_of({"a": entry(offsets=(-8, 0))}, bytes(8)), FormatError, "its offsets [-8, 0] give 8"),
    "huge offset": (file_of({"a": entry(offsets=(10**19, 10**19 + 8))}, bytes(8)), FormatError, "gap of 1000000000"),
    "a key twice": (file_of(b'{"a":{"shape":[],"shape":[]}}'), FormatError, "a key occurs twice"),
    "float shape": (file_of({"a": entry(shape=(2.0,))}, bytes(8)), FormatError, "whole numbers"),
    "bool shape": (file_of({"a": entry(shape=(True, 2))}, bytes(8)), FormatError, "whole numbers"),
    "huge shape": (file_of({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)), FormatError, "no array has the shape"),
    "three offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, bytes(8)), FormatError, "must have dtype, shape and"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), FormatError, "must have dtype"),
    "entry is a number": (file_of({"a": 3}), FormatError, "must have dtype"),
    "metadata not text": (file_of({"__metadata__": {"n": 1}}), FormatError, "must map strings to strings"),
    "metadata no object": (file_of({"__metadata__": ["n"]}), FormatError, "must map strings to strings"),
    "metadata of a tensor": (file_of({"__metadata__": entry()}, bytes(8)), FormatError, "must map strings to strings"),
    "metadata twice": (file_of(b'{"__metadata__":null,"__metadata__":{}}'), FormatError, "names '__metadata__' twice"),
    "a note twice": (file_of(b'{"__metadata__":{"a":"b","a":"b"}}'), FormatError, "__metadata__ names 'a' twice"),
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


DENSE |= {
    piece: items(piece) for piece in ('"ab"', '"\u4e2d"', '"\U0001f600"', '{"a":{"b":{"c":{}}}}', '{"a":1,"b":2}')
}
DENSE |= {f"{{{value},…}}": keys(value) for value in ("9", "999", '"ab"', "[]", "{}")}
DENSE |= {
    "tensors": keys('{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'),
    "tensors of another order": keys('{"shape":[0],"dtype":"I8","data_offsets":[0,0]}'),
    "notes": f'{{"__metadata__":{keys(chr(34) + "ab" + chr(34))}}}',
    "texts": f'{{"__metadata__":{{"ms_ckpt_ext.text":"[{",".join(["[]"] * 50_000)}]"}}}}',
    "wide text": f'{{"x":"{"a" * 120_000}\U0001f600"}}',
    "wide name": f'{{"{"a" * 120_000}\U0001f600":9}}',
    "escapes": '{"' + '\\"[[' * 30_000,
    "blanks": "{" + " " * 500_000,
    "braces": '{"x":' + "{" * 500_000,
    "many axes": f'{{"x":{{"dtype":"I8","shape":[{",".join(["1"] * 500_000)}],"data_offsets":[0,0]}}}}',
    "a long number": f'{{"x":{{"dtype":"I8","shape":[{"9" * 500_000}],"data_offsets":[0,0]}}}}',
}


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
        found = index(file_of(json.dumps({"w": {"dtype": "F32", "shape": legal, "data_offsets": [0, 0]}}).encode()))
        assert np.empty(0, np.float32).reshape(found.tensors["w"].shape).shape == tuple(legal)
    with pytest.raises(FormatError, match=words):
        index(file_of(json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()))


def test_marks_in_names_and_notes_are_text() -> None:
    notes = {"config": json.dumps([[[]]] * 1000), "quote": '\\"[[[[' * 1000}
    entry = {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}
    data = file_of(json.dumps({"__metadata__": notes, "[" * 1000: entry}).encode()) + b"7"
    found = safetensors.read_index(MemoryReader(data))
    assert list(found.tensors) == ["[" * 1000] and found.metadata == notes


def test_members_in_any_form_that_json_has() -> None:
    """Blanks, another order, more keys, escapes: what the library reads, though its own writers never make it."""
    text = b"""{ "a" : {"data_offsets":[0 ,8],\t"shape": [ 2 ] , "dtype":"F32"},
        "\\u0062\\"" : {"dtype":"F32","shape":[],"data_offsets":[8,12],"more":{"x":["]}",null]}},
        "__metadata__" : { "\\u0066" : "\\n" , "g":"" } ,
        "\xc3\xbc":{"dtype" :"F32", "shape":[0 , 3],"data_offsets":[12,12]}} """
    found = index(file_of(text) + bytes(12))
    assert [(n, e.dtype.name, e.shape) for n, e in found.tensors.items()] == [
        ("a", "F32", (2,)),
        ('b"', "F32", ()),
        ("ü", "F32", (0, 3)),
    ]
    assert found.metadata == {"f": "\n", "g": ""}
    loaded = library.deserialize(file_of(text) + bytes(12))
    assert [(name, tuple(each["shape"])) for name, each in sorted(loaded)] == [("a", (2,)), ('b"', ()), ("ü", (0, 3))]


@pytest.mark.parametrize(
    "text", [b'{"__metadata__":null,"w":%b}', b'{"w":%b, "__metadata__" : null }', b'{"w":%b,"__metadata__":{}}']
)
def test_null_metadata_are_none(text: bytes, tmp_path: Path) -> None:
    data = file_of(text % json.dumps(entry()).encode()) + bytes(8)
    assert (index(data).metadata, list(index(data).tensors)) == ({}, ["w"])
    (tmp_path / "n.safetensors").write_bytes(data)
    with library.safe_open(tmp_path / "n.safetensors", "np") as file:
        assert list(file.keys()) == ["w"]
    assert index(file_of(b'{"__metadata__":null}')).tensors == {}

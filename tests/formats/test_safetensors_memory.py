"""safetensors headers made to be dense: what reading them takes in memory and time follows from the file's size."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors as library

from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats import safetensors, safetensors_header
from ms_ckpt_ext.formats.registry import read_index
from tests.support.damage import memory_limit, time_limit
from tests.support.memory import MemoryReader
from tests.support.safetensors_file import file_of, index


def items(piece: str) -> str:
    """An entry that is as long as one may be."""
    return f'{{"x":{{"shape":[{",".join([piece] * (safetensors_header.MAX_MEMBER // (len(piece) + 1) - 9))}]}}}}'


def keys(value: str) -> str:
    return "{" + ",".join(f'"{n:x}":{value}' for n in range(12_000)) + "}"


DENSE = {piece: items(piece) for piece in ("999", "1e9", "true", "[]", "{}", "[[]]", "[999]", '{"":[]}', '{"a":1}')}


@pytest.mark.parametrize("text", DENSE.values(), ids=DENSE)
def test_a_header_becomes_no_more_than_the_file_justifies(text: str) -> None:
    """Ten times its text, and for one member, which is parsed alone, what JSON of its length may become."""
    data = file_of(text.encode())
    with time_limit(), memory_limit(10 * len(data) + 40 * safetensors_header.MAX_MEMBER), suppress(FormatError):
        safetensors.read_index(MemoryReader(data))


def test_notes_are_no_more_than_tensors_could_be() -> None:
    for count in (10, 11):
        text = bytearray(json.dumps({"__metadata__": {str(n): "Int4" for n in range(count)}}).encode())
        if count == 10:
            assert len(safetensors_header.read_header(text, pytest.fail, most=10)) == count
        else:
            with pytest.raises(safetensors_header.HeaderError, match="more than 10 entries"):
                safetensors_header.read_header(text, pytest.fail, most=10)


def many(count: int) -> bytes:
    piece = b'"l.%d.w":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    return file_of(b"{" + b",".join(piece % (n, 4 * n, 4 * n + 4) for n in range(count)) + b"}") + bytes(4 * count)


@pytest.mark.parametrize("count", [1, 40_000])
def test_objects_take_six_times_the_text(count: int) -> None:
    """Half of what the library takes."""
    data = many(count)
    with memory_limit(6 * len(data) + (1 << 16)):
        assert len(index(data).tensors) == count


def test_a_table_of_very_many_tensors(tmp_path: Path) -> None:
    path, count = tmp_path / "many.safetensors", 210_000
    path.write_bytes(many(count))
    found = read_index(str(path))
    last = found.tensors[f"l.{count - 1}.w"]
    assert (len(found.tensors), last.shape, last.extents) == (count, (1,), ((found.size - 4, 4),))
    with library.safe_open(path, "np") as file:
        assert len(file.keys()) == count

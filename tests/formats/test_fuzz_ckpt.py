"""Damaged files of every kind: the right data or one of our errors; nothing else, no hang, no giant allocation."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats import ckpt
from ms_ckpt_ext.formats.checksum import verify_stored
from ms_ckpt_ext.formats.ckpt_writer import crc_tail
from ms_ckpt_ext.formats.crypto import decrypting_reader
from ms_ckpt_ext.formats.wire import encode_bytes, encode_number
from tests.support.damage import edits, lies, mutate, survives
from tests.support.encrypted import in_blocks, in_chunks
from tests.support.memory import MemoryReader
from tests.support.wire import value

KEY = b"0123456789ABCDEF"


BODY = (
    value(b"layer.0.weight", [4, 3], b"Float32", bytes(range(48)))
    + value(b"layer.0.bias", [5], b"BFloat16", bytes(10))
    + value(b"step", [], b"Int64", bytes(8))
    + value(b"cut", [4], b"Int8", b"ab")
    + value(b"cut", [4], b"Int8", b"cd")
    + value(b"note", [0], b"str", b"a\0\0\0")
)
PLAIN = BODY + crc_tail(zlib.crc32(BODY))


SEEDS = {mode: in_blocks(PLAIN, KEY, mode, block=64) for mode in ("AES-GCM", "AES-CBC", "SM4-CBC")}
SEEDS |= {"chunked": in_chunks(PLAIN, KEY, chunk=64), "plain": PLAIN}


class Digest(NamedTuple):
    """Everything that a file says, and whether a checksum stands behind it."""

    tensors: dict[str, tuple[object, ...]]
    checked: bool


def digest(data: bytes, encrypted: bool) -> Digest:
    """Read a file as jobs do, checksum verified."""
    reader = MemoryReader(data)
    source = decrypting_reader(reader, KEY) if encrypted else reader
    index = ckpt.read_index(source)
    checked = verify_stored(source, ckpt.stored_checksum(index))
    found = {}
    for name, entry in index.tensors.items():
        parts = []
        for extent in entry.extents:
            part = bytearray(extent.length)
            source.read_into(extent.offset, memoryview(part))
            parts.append(bytes(part))
        found[name] = (entry.dtype.name, entry.shape, b"".join(parts))
    return Digest(found, checked)


TRUTH = digest(PLAIN, False)


@pytest.mark.parametrize("kind", list(SEEDS))
@settings(max_examples=400)
@given(changes=edits)
def test_mutated_files(kind: str, changes: list[Any]) -> None:
    found = survives(lambda data: digest(data, kind != "plain"), mutate(SEEDS[kind], changes), CheckpointError)
    if found is None:
        return
    if kind in ("AES-GCM", "chunked"):  # authenticated: what is accepted is true
        assert all(TRUTH.tensors.get(name) == entry for name, entry in found.tensors.items())
    if kind == "chunked" or found.checked:  # no silent wrong data where a checksum exists
        assert found.tensors == TRUTH.tensors


@pytest.mark.parametrize("kind", list(SEEDS))
def test_huge_numbers_everywhere(kind: str) -> None:
    for data in lies(SEEDS[kind]):
        found = survives(lambda raw: digest(raw, kind != "plain"), data, CheckpointError)
        if found is not None and found.checked:
            assert found.tensors == TRUTH.tensors


@settings(max_examples=500)
@given(
    st.binary(max_size=200), st.sampled_from(["", "0a", "0a20", "0a200a01", "d85e3a7f", "d95e3a7f", "894d53580d0a1a01"])
)
def test_random_bytes(data: bytes, head: str) -> None:
    for encrypted in (False, True):
        survives(lambda raw: digest(raw, encrypted), bytes.fromhex(head) + data, CheckpointError)  # noqa: B023


numbers = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]))


@settings(max_examples=500)
@given(
    st.recursive(
        st.one_of(st.tuples(st.integers(0, 5), numbers), st.tuples(st.integers(1, 3), st.binary(max_size=20))),
        lambda inner: st.tuples(st.integers(1, 3), st.lists(inner, max_size=4)),
        max_leaves=12,
    )
)
def test_random_messages(tree: object) -> None:
    """Well-formed protobuf of arbitrary fields."""
    survives(lambda raw: digest(raw, False), encode(tree), CheckpointError)


def encode(tree: object) -> bytes:
    assert isinstance(tree, tuple)
    number, what = tree
    if isinstance(what, int):
        return encode_number(number, what)
    return encode_bytes(number, what if isinstance(what, bytes) else b"".join(map(encode, what)))


@pytest.mark.parametrize(
    "data",
    [
        value(b"w", [2**62], b"Float32", b"")[:-1] + b"\xff\xff\xff\xff\x0f",
        b"\n\xff\xff\xff\xff\x7f" + b"\n\xff\xff\xff\xff\x0f",
        value(b"w", [1 << 20] * 3, b"Float32", b"abcd"),
        bytes.fromhex("d85e3a7f") + bytes(16) + b"\x18\x00\x00\x04\x10\x00\x00\x00" + bytes(16) + b"\x00\x00\x00\x04",
        SEEDS["chunked"][:12] + b"\x00\x00\x00\x04" + SEEDS["chunked"][16:],
    ],
    ids=["a value", "two fields", "a shape", "a block", "a chunk"],  # a seed has other bytes in every process
)
def test_lies_about_length_allocate_nothing(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            digest(data, data[:1] != b"\n")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()

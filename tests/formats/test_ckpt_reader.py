"""Reading `.ckpt`: files made by hand, and how little is read."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import ChecksumError, DecryptionError, FormatError, TruncatedFileError
from ms_ckpt_ext.formats import ckpt
from ms_ckpt_ext.formats.checksum import verify_stored
from ms_ckpt_ext.formats.ckpt_writer import crc_tail
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.wire import encode_bytes, encode_number
from ms_ckpt_ext.storage.reader import Traits
from tests.support.damage import memory_limit
from tests.support.memory import MemoryReader, contents
from tests.support.wire import value

ONE = b"\x00\x00\x80\x3f"


def index_of(data: bytes) -> FileIndex:
    return ckpt.read_index(MemoryReader(data, "a.ckpt"), mtime_ns=7)


class Counting:
    """A reader that counts what is asked of it."""

    traits = Traits()

    def __init__(self, base: Any) -> None:
        self.path, self.size, self.disk_size, self.mtime_ns = base.path, base.size, base.disk_size, base.mtime_ns
        self.fd = None
        self.base = base
        self.reads = self.bytes = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.bytes += len(buffer)
        self.base.read_into(offset, buffer)

    def close(self) -> None:
        self.base.close()


class Sparse:
    """A file of huge size of which only some stretches are not zero."""

    traits = Traits()

    def __init__(self, size: int, stretches: dict[int, bytes]) -> None:
        self.path, self.size, self.disk_size, self.mtime_ns, self.fd = "huge.ckpt", size, size, 0, None
        self.stretches = stretches

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))
        for start, data in self.stretches.items():
            low, high = max(start, offset), min(start + len(data), offset + len(buffer))
            if low < high:
                buffer[low - offset : high - offset] = data[low - start : high - start]

    def close(self) -> None:
        pass


# The very bytes that mindspore.save_checkpoint wrote for a float scalar, an int vector, a bf16 matrix and a text.
SAVED = (
    b"\n\x14\n\x01s\x12\x0f\x12\x07Float32\x1a\x04\x00\x00`@"
    b"\n\x1c\n\x01v\x12\x17\x08\x03\x12\x05Int32\x1a\x0c\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"
    b"\n\x1e\n\x02bf\x12\x18\x08\x02\x08\x02\x12\x08BFloat16\x1a\x08\x80?\x80?\x80?\x80?"
    b"\n$\n\x03txt\x12\x1d\x08\x00\x12\x03str\x1a\x14h\x00\x00\x00\xe9\x00\x00\x00l\x00\x00\x00l\x00\x00\x00o\x00\x00\x00"
)


def test_a_file_of_mindspore_byte_by_byte() -> None:
    index = index_of(SAVED)
    assert index.tensors == {
        "s": TensorEntry(DTYPES["F32"], (), (Extent(18, 4),)),
        "v": TensorEntry(DTYPES["I32"], (3,), (Extent(40, 12),)),
        "bf": TensorEntry(DTYPES["BF16"], (2, 2), (Extent(76, 8),)),
        "txt": TensorEntry(DTYPES["STR"], (5,), (Extent(102, 20),)),
    }
    assert (index.path, index.size, index.mtime_ns, index.reader) == ("a.ckpt", len(SAVED), 7, "plain")
    assert index.metadata == {}
    text = contents(MemoryReader(SAVED), index.tensors["txt"])
    assert text.decode("utf-32-le") == "héllo"


@pytest.mark.parametrize(
    ("dims", "kind", "length", "shape"),
    [
        ([], b"Float32", 4, ()),
        ([0], b"Float32", 4, ()),
        ([0], b"Float32", 0, (0,)),
        ([1], b"Float32", 4, (1,)),
        ([0, 3], b"Float32", 0, (0, 3)),
        ([2, 3], b"Bool", 6, (2, 3)),
        ([0], b"str", 0, (0,)),
        ([2], b"Float8E4M3FN", 2, (2,)),
        ([2], b"Complex128", 32, (2,)),
    ],
)
def test_shapes(dims: list[int], kind: bytes, length: int, shape: tuple[int, ...]) -> None:
    entry = index_of(value(b"a", dims, kind, bytes(length))).tensors["a"]
    assert (entry.shape, entry.nbytes) == (shape, length)


def test_packed_dims_and_any_field_order() -> None:
    inner = encode_bytes(3, ONE * 6) + encode_bytes(1, b"\x02\x03") + encode_bytes(2, b"Float32")
    data = encode_bytes(1, encode_bytes(2, inner) + encode_bytes(1, b"w"))
    assert index_of(data).tensors["w"].shape == (2, 3)


def test_pieces_with_one_name_are_one_tensor() -> None:
    data = value(b"w", [3], b"Float32", ONE * 2) + value(b"w", [3], b"Float32", ONE * 1)
    entry = index_of(data).tensors["w"]
    assert entry.shape == (3,) and [extent.length for extent in entry.extents] == [8, 4]
    assert contents(MemoryReader(data), entry) == ONE * 3


def test_int4_is_int8_with_a_note() -> None:
    index = index_of(value(b"q", [2, 4], b"Int4", bytes(8)))
    assert index.tensors["q"].dtype is DTYPES["I8"] and index.metadata == {"q": "Int4"}


def test_checksum_tail() -> None:
    data = SAVED + crc_tail(zlib.crc32(SAVED))
    index = index_of(data)
    assert index.metadata == {"crc_num": str(zlib.crc32(SAVED)), "crc_offset": str(len(SAVED))}
    assert verify_stored(MemoryReader(data), ckpt.stored_checksum(index)) is True
    damaged = data[:20] + b"\xff" + data[21:]
    with pytest.raises(ChecksumError, match="bytes 0 to 122"):
        verify_stored(MemoryReader(damaged), ckpt.stored_checksum(index))


def test_no_checksum_is_no_error() -> None:
    assert verify_stored(MemoryReader(SAVED), ckpt.stored_checksum(index_of(SAVED))) is False


def test_contents_that_look_like_a_tail_are_contents() -> None:
    """Stock MindSpore looks at the last 17 bytes alone, and would cut this tensor short."""
    data = value(b"w", [17], b"UInt8", crc_tail(0))
    assert index_of(data).tensors["w"].nbytes == 17


def test_only_a_checksum_is_an_empty_checkpoint() -> None:
    assert index_of(crc_tail(0)).tensors == {}


MAP = encode_bytes(1, encode_bytes(1, b"table") + encode_bytes(3, b""))


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", TruncatedFileError, "empty"),
        (SAVED[:-1], TruncatedFileError, "ends at byte 121"),
        (SAVED[:20], FormatError, "a value without a tensor|ends at byte"),
        (b"\x08\x02\x12\x00", FormatError, "strategy file"),
        (b"PK\x03\x04aaaaaaaa", FormatError, "first byte is 0x50"),
        (bytes.fromhex("d95e3a7f") + bytes(40), DecryptionError, r"encrypted \(AES-CBC\).*dec_key"),
        (MAP, FormatError, "'table'.*MapParameter"),
        (value(b"w", [1], b"HiFloat8", b"a"), FormatError, "'w' at byte 0 has the unknown tensor_type 'HiFloat8'"),
        (value(b"w", [2], b"Float32", ONE), FormatError, r"'w', Float32 \(2,\), has 4 bytes in 1 value"),
        (value(b"w", [0], b"Float32", ONE * 2), FormatError, "has 8 bytes"),
        (value(b"w", [], b"Float32", ONE) * 2, FormatError, "has 8 bytes in 2 value"),
        (value(b"w", [2**64 - 1], b"Float32", ONE), FormatError, "negative dimension -1"),
        (value(b"w", [1] * 33, b"Float32", ONE), FormatError, "more than 32 axes"),
        (value(b"w", [0, 2**61], b"Float32", b""), FormatError, "'w' has the shape .*, which no array has"),
        (value(b"w", [0, 2**32, 2**29], b"Float32", b""), FormatError, "which no array has"),
        (value(b"crc_num", [2], b"Int4", b"ab"), FormatError, "'crc_num' at byte 0 is packed int4, and the note"),
        (value(b"crc_offset", [2], b"Int4", b"ab"), FormatError, "save it under another name"),
        (value(b"\xff\xfe", [1], b"Float32", ONE), FormatError, "not UTF-8"),
        (value(b"w" * 70000, [1], b"Float32", ONE), FormatError, "70000 bytes, above"),
        (value(b"s", [0], b"str", b"abc"), FormatError, "'s', str"),
        (value(b"w", [1], b"Float32", ONE) + b"\x12\x00", FormatError, r"at byte 24: field 2 .* Checkpoint"),
        (encode_bytes(1, encode_bytes(2, b"\x12\x00\x1a\x00")), FormatError, "without a name"),
        (encode_bytes(1, encode_bytes(1, b"w")), FormatError, "without a tensor"),
        (encode_bytes(1, encode_bytes(1, b"w") + encode_bytes(2, b"\x12\x00")), FormatError, "without tensor_content"),
        (encode_bytes(1, encode_bytes(1, b"w") * 2), FormatError, "field 1 .*repeated in a Value"),
        (value(b"w", [2], b"Int8", b"a") + value(b"w", [2], b"UInt8", b"a"), FormatError, r"goes on as UInt8 \(2,\)"),
        (
            value(b"a", [1], b"Int8", b"a") + value(b"b", [1], b"Int8", b"a") + value(b"a", [1], b"Int8", b"a"),
            FormatError,
            "'a' appears a second time",
        ),
    ],
)
def test_damage_is_told(data: bytes, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        index_of(data)
    assert "a.ckpt" in str(caught.value)


def test_three_thousand_bytes_of_header_for_a_terabyte() -> None:
    """Walking a file costs one page per tensor, whatever the tensors' size; nothing is allocated for contents."""
    stretches, offset = {}, 0
    for number in range(600):
        length = 1700 << 20
        frame = value(b"layer.%d.weight" % number, [length], b"UInt8", b"")
        inner = encode_number(1, length) + encode_bytes(2, b"UInt8") + b"\x1a" + _varint(length)
        tag = encode_bytes(1, b"layer.%d.weight" % number)
        tensor = b"\x12" + _varint(len(inner) + length) + inner
        frame = b"\n" + _varint(len(tag) + len(tensor) + length) + tag + tensor
        stretches[offset] = frame
        offset += len(frame) + length
    reader = Counting(Sparse(offset, stretches))
    index = ckpt.read_index(reader, mtime_ns=0)
    assert len(index.tensors) == 600 and index.size > 10**12
    assert reader.reads <= 601 and reader.bytes <= 601 * 4096


def _varint(number: int) -> bytes:
    from ms_ckpt_ext.formats.wire import encode_varint

    return encode_varint(number)


def test_small_tensors_share_reads() -> None:
    data = b"".join(value(b"layer.%d.bias" % n, [16], b"Float32", bytes(64)) for n in range(600))
    reader = Counting(MemoryReader(data))
    began = time.perf_counter()
    index = ckpt.read_index(reader, mtime_ns=0)
    took = time.perf_counter() - began
    assert len(index.tensors) == 600
    assert reader.reads <= 2 * len(data) // 4096 and reader.bytes <= 2 * len(data)
    assert took < 1


DENSE = {
    "names": lambda n: value(b"%x" % n, [], b"Int8", b"x"),
    "axes": lambda n: value(b"%x" % n, [0] + [300] * 7, b"Float32", b""),
    "names of wide characters": lambda n: value(f"\U0001f600{n:x}".encode(), [], b"Int8", b"x"),
    "pieces": lambda n: value(b"w", [1000], b"Int8", b"x"),
    "empty pieces": lambda n: value(b"w", [0], b"Bool", b""),
}


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_an_index_takes_no_more_than_the_file_justifies(make: Callable[[int], bytes]) -> None:
    data = b"".join(map(make, range(2000)))
    with (
        memory_limit(len(data) + (1 << 20)),
        pytest.raises(FormatError, match="takes 1 MiB of memory, and a file of .* bytes may take 1 MiB"),
    ):
        ckpt.read_index(MemoryReader(data), budget=1 << 20)


@pytest.mark.parametrize("axes", [0, 1, 8])
def test_what_a_value_counts_for_is_what_it_becomes(axes: int) -> None:
    """And not much less: a guard that counts too much refuses what could be read."""
    dims = [300] * axes
    data = b"".join(value(b"%x" % n, dims and [0, *dims[1:]], b"Int8", b"" if dims else b"x") for n in range(2000))
    counted = 2000 * (ckpt._PER_VALUE + ckpt._PER_AXIS * axes + 2 * 60)
    with memory_limit(counted):
        assert len(index_of(data).tensors) == 2000
    with pytest.raises(AssertionError, match="bytes were allocated"), memory_limit(counted // 3):
        index_of(data)


def test_very_many_small_tensors_are_read() -> None:
    data = b"".join(value(b"%x" % n, [1], b"Int8", b"x") for n in range(210_000))
    assert len(index_of(data).tensors) == 210_000


def test_a_parameter_may_be_called_like_the_checksum() -> None:
    data = value(b"crc_num", [2], b"Int8", b"ab")
    found = index_of(data + crc_tail(zlib.crc32(data)))
    assert list(found.tensors) == ["crc_num"] and verify_stored(MemoryReader(data), ckpt.stored_checksum(found))


def test_a_tensor_without_bytes_has_one_value() -> None:
    one = value(b"w", [0], b"Float32", b"")
    assert index_of(one).tensors["w"].shape == (0,)
    with pytest.raises(FormatError, match=rf"at byte {len(one)}: parameter 'w', which has no bytes, has 2 values"):
        index_of(2 * one)


def test_checksums_take_bounded_memory() -> None:
    tail = 40 << 20
    reader = Counting(Sparse(tail + 17, {tail: crc_tail(zlib.crc32(bytes(tail)))}))
    index = FileIndex(
        "huge.ckpt", reader.size, 0, {}, {"crc_num": str(zlib.crc32(bytes(tail))), "crc_offset": str(tail)}
    )
    assert verify_stored(reader, ckpt.stored_checksum(index))
    assert reader.reads == 10

"""The encrypted container: any range equals the plaintext, and nothing altered, moved or missing goes unnoticed."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.errors import CheckpointError, DecryptionError, FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats.crypto import (
    ChunkedReader,
    Sealer,
    container_writer,
    decrypting_reader,
)
from tests.support.encrypted import in_chunks
from tests.support.memory import MemoryReader, read

KEY = b"0123456789ABCDEF0123456789ABCDEF"
PLAIN = random.Random(2).randbytes(10_000)
HEADER, TAG = 96, 16


def sealed(plain: bytes, chunk: int = 1024, key: bytes = KEY) -> bytes:
    return in_chunks(plain, key, chunk=chunk)


def opened(data: bytes, key: bytes = KEY, **options: int) -> ChunkedReader:
    return ChunkedReader(MemoryReader(data, "a.safetensors"), key, **options)


def streamed(reader: ChunkedReader, offset: int, length: int) -> bytes:
    out = bytearray()
    reader.stream(offset, length, lambda _, piece: out.extend(piece))
    return bytes(out)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 700),
    st.sampled_from([64, 100, 256, 1 << 20]),
    st.sampled_from([16, 24, 32]),
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=8),
    st.integers(1, 1000),
)
def test_any_range_equals_the_plaintext(
    size: int, chunk: int, key: int, ranges: list[tuple[int, int]], cache: int
) -> None:
    plain = PLAIN[:size]
    data = sealed(plain, chunk, KEY[:key])
    with opened(data, KEY[:key], cache_bytes=cache) as reader:
        assert (reader.size, reader.disk_size, reader.fd) == (size, len(data), None)
        for low, high in [*ranges, (0, size)]:
            low, high = min(low, size), min(high, size)
            assert read(reader, low, max(0, high - low)) == plain[low:high]
            assert streamed(reader, low, max(0, high - low)) == plain[low:high]


def test_the_format_by_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/encryption.md followed by hand, with the one-shot primitives of `cryptography` and nothing of ours."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    salt = bytes(range(32))
    monkeypatch.setattr(container_writer.os, "urandom", lambda count: salt[:count])
    bound = b"\x89MSX\r\n\x1a\x01" + struct.pack("<HHIQ", 1, 32, 64, 150) + salt + bytes(8)
    keys = HKDF(SHA256(), 64, salt, b"ms_ckpt_ext chunked container v1" + bound).derive(KEY)
    expected = bound + keys[32:]
    for index in range(3):
        nonce, associated = index.to_bytes(12, "big"), bound + struct.pack("<QB", index, index == 2)
        expected += AESGCM(keys[:32]).encrypt(nonce, PLAIN[:150][index * 64 : index * 64 + 64], associated)
    assert sealed(PLAIN[:150], 64) == expected


def test_every_altered_byte_is_told() -> None:
    data = sealed(PLAIN[:150], 64)
    for at in range(len(data)):
        with pytest.raises(CheckpointError):
            read(opened(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]), 0, 150)


def test_every_truncation_and_addition_is_told() -> None:
    data = sealed(PLAIN[:150], 64)
    for length in range(len(data)):
        with pytest.raises(TruncatedFileError):
            opened(data[:length])
    with pytest.raises(FormatError, match="something was appended"):
        opened(data + b"x")


def chunks(data: bytes, chunk: int = 64) -> list[bytes]:
    return [data[at : at + chunk + TAG] for at in range(HEADER, len(data), chunk + TAG)]


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [0, 0, 2, 3], [0, 2, 2, 3], [0, 1, 3, 2]])
def test_reordered_and_doubled_chunks_are_told(order: list[int]) -> None:
    data = sealed(PLAIN[:256], 64)
    parts = chunks(data)
    with pytest.raises(DecryptionError, match="chunk . at byte .* was altered, moved"):
        read(opened(data[:HEADER] + b"".join(parts[at] for at in order)), 0, 256)


def test_chunks_of_another_file_are_told() -> None:
    one, other = sealed(PLAIN[:256], 64), sealed(PLAIN[:256], 64)
    with pytest.raises(DecryptionError):
        read(opened(one[: HEADER + 80] + other[HEADER + 80 :]), 64, 64)
    with pytest.raises(DecryptionError):
        read(opened(other[:HEADER] + one[HEADER:]), 0, 64)


def test_a_file_cut_to_fewer_chunks_with_a_forged_length_is_told() -> None:
    data = bytearray(sealed(PLAIN[:256], 64)[: HEADER + 2 * 80])
    struct.pack_into("<Q", data, 16, 128)
    with pytest.raises(DecryptionError, match="key is wrong, or the header"):
        opened(bytes(data))


def test_wrong_keys_are_told_at_once() -> None:
    data = sealed(PLAIN)
    with pytest.raises(DecryptionError, match="a.safetensors.*key is wrong"):
        opened(data, b"x" * 32)
    with pytest.raises(DecryptionError, match="a key of 32 bytes, but one of 16"):
        opened(data, b"x" * 16)


@pytest.mark.parametrize(
    ("at", "fmt", "number", "words"),
    [
        (0, "<B", 0, "not an encrypted container: it begins with"),
        (8, "<H", 2, "version 2; this package reads 1"),
        (10, "<H", 20, "key of 20 bytes"),
        (12, "<I", 0, "chunks of 0 bytes"),
        (12, "<I", 1 << 31, "chunks of 2147483648 bytes"),
        (16, "<Q", 1 << 63, "bytes of plaintext"),
        (56, "<B", 1, "reserved"),
    ],
)
def test_nonsense_headers_are_told_before_anything_is_allocated(at: int, fmt: str, number: int, words: str) -> None:
    data = bytearray(sealed(PLAIN))
    struct.pack_into(fmt, data, at, number)
    with pytest.raises(FormatError, match=words):
        opened(bytes(data))


def test_salts_differ() -> None:
    assert len({sealed(b"a")[24:56] for _ in range(50)}) == 50


class Counting(MemoryReader):
    """Remembers what is read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ranges: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.ranges.append((offset, len(buffer)))
        super().read_into(offset, buffer)


def test_a_slice_touches_its_chunks_only() -> None:
    base = Counting(sealed(PLAIN, 1000))
    reader = ChunkedReader(base, KEY)
    assert base.ranges == [(0, HEADER)]
    base.ranges.clear()
    assert read(reader, 2500, 3000) == PLAIN[2500:5500]
    assert base.ranges == [(HEADER + n * 1016, 1016 * c) for n, c in ((2, 1), (3, 2), (5, 1))]
    base.ranges.clear()
    assert read(reader, 2600, 100) == PLAIN[2600:2700]
    assert base.ranges == []


def test_many_chunks_come_in_one_read() -> None:
    plain = bytes(9 << 20)
    base = Counting(sealed(plain, 1 << 16))
    reader = ChunkedReader(base, KEY)
    base.ranges.clear()
    assert read(reader, 0, len(plain)) == plain
    assert len(base.ranges) == 3 and max(length for _, length in base.ranges) <= 4 << 20


def test_chunks_may_be_sealed_in_any_order_but_once() -> None:
    sealer = Sealer(KEY, 250, chunk=100)
    out = bytearray(sealer.geometry.stored_size)
    out[:HEADER] = sealer.header
    for index in (2, 0, 1):
        low, high = sealer.geometry.span(index)
        at = sealer.geometry.offset(index)
        assert sealer.seal(index, memoryview(PLAIN)[low:high], memoryview(out)[at:]) == high - low + TAG
    assert read(opened(bytes(out)), 0, 250) == PLAIN[:250]
    with pytest.raises(UsageError, match="chunk 0 was sealed already"):
        sealer.seal(0, memoryview(bytes(100)), memoryview(out))
    for index, length in ((3, 100), (-1, 100), (1, 99)):
        with pytest.raises(UsageError, match="there are 3 chunks of 100 bytes"):
            sealer.seal(index, memoryview(bytes(length)), memoryview(out))


@pytest.mark.parametrize("chunk", [0, 63, 65 << 20])
def test_chunks_have_a_length_between_bounds(chunk: int) -> None:
    with pytest.raises(UsageError, match="cannot encrypt"):
        Sealer(KEY, 3, chunk=chunk)


def test_the_container_is_found_by_its_first_bytes() -> None:
    data = in_chunks(PLAIN, KEY)
    reader = decrypting_reader(MemoryReader(data), KEY)
    assert isinstance(reader, ChunkedReader) and read(reader, 0, len(PLAIN)) == PLAIN
    with pytest.raises(DecryptionError, match="chunked container, not AES-GCM"):
        decrypting_reader(MemoryReader(data), KEY, "AES-GCM")

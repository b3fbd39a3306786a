"""MindSpore's encrypted blocks: any range equals the plaintext, wrong keys and damage are reported."""

from __future__ import annotations

import random
import struct
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.errors import DecryptionError, FormatError, StorageError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats.crypto import BlockSealer, DecryptingReader, decrypting_reader, units
from tests.support.ciphers import decrypted_units
from tests.support.damage import memory_limit
from tests.support.encrypted import in_blocks
from tests.support.memory import MemoryReader, read

MODES = ["AES-GCM", "AES-CBC", "SM4-CBC"]
KEY = b"0123456789ABCDEF"
PLAIN = b"\n" + random.Random(1).randbytes(9999)


def sealed(plain: bytes, mode: str, block: int = 4096, key: bytes = KEY) -> bytes:
    return in_blocks(plain, key, mode, block=block)


def opened(data: bytes, mode: str = "AES-GCM", key: bytes = KEY, **options: int) -> DecryptingReader:
    return DecryptingReader(MemoryReader(data, "a.ckpt"), key, mode, **options)  # type: ignore[arg-type]


def streamed(reader: Any, offset: int, length: int) -> bytes:
    """A range as `stream` hands it over; that pieces come in order, and neither overlap nor leave a gap, is checked."""
    out = bytearray()

    def take(at: int, piece: memoryview) -> None:
        assert at == offset + len(out)
        out.extend(piece)

    reader.stream(offset, length, take)
    return bytes(out)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(MODES),
    st.integers(1, 700),
    st.sampled_from([16, 64, 256]),
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=8),
    st.integers(1, 1000),
)
def test_any_range_equals_the_plaintext(
    mode: str, size: int, block: int, ranges: list[tuple[int, int]], cache: int
) -> None:
    """Whatever the ranges that are read, and the size of the cache."""
    plain = PLAIN[:size]
    data = sealed(plain, mode, block)
    with opened(data, mode, cache_bytes=cache) as reader:
        assert (reader.size, reader.disk_size, reader.fd) == (size, len(data), None)
        for low, high in [*ranges, (0, size)]:
            low, high = min(low, size), min(high, size)
            assert read(reader, low, max(0, high - low)) == plain[low:high]
            if mode == "AES-GCM":
                assert streamed(reader, low, max(0, high - low)) == plain[low:high]


@pytest.mark.parametrize("mode", MODES)
def test_literal_layout_of_a_block(mode: str) -> None:
    data = sealed(b"\nabc", mode)
    tag = 16 if mode == "AES-GCM" else 0
    length = 4 if tag else 16
    magic, (whole, iv) = struct.unpack_from("<I", data)[0], struct.unpack_from("<II", data, 4 + tag)
    assert magic == 0x7F3A5ED8 + MODES.index(mode) and (whole, iv) == (8 + 16 + length, 16)
    assert struct.unpack_from("<I", data, 28 + tag)[0] == length and len(data) == 32 + tag + length


def test_ivs_are_never_repeated() -> None:
    data = [sealed(b"\nabc", "AES-GCM")[28:44] for _ in range(50)]
    assert len(set(data)) == 50


@pytest.mark.parametrize("mode", MODES)
def test_wrong_keys_are_told(mode: str) -> None:
    data = sealed(PLAIN, mode)
    for number in range(100):
        with pytest.raises(DecryptionError, match="key is wrong") as caught:
            read(opened(data, mode, bytes([number]) * 16), 0, 10)
        assert "a.ckpt" in str(caught.value)


def test_wrong_modes_and_plain_files_are_told() -> None:
    with pytest.raises(DecryptionError, match="encrypted with AES-CBC, not AES-GCM; pass dec_mode='AES-CBC'"):
        opened(sealed(PLAIN, "AES-CBC"), "AES-GCM")
    with pytest.raises(DecryptionError, match="not encrypted by MindSpore.*without a key"):
        opened(PLAIN)
    with pytest.raises(UsageError, match="no such mode"):
        opened(PLAIN, "AES-XTS")
    with pytest.raises(TruncatedFileError, match="too few"):
        opened(b"\xd8")
    with pytest.raises(UsageError, match="no such mode"):
        BlockSealer(KEY, "DES", 1)
    with pytest.raises(UsageError, match="a key of 32 bytes; this cipher takes 16"):
        BlockSealer(KEY * 2, "SM4-CBC", 1)


def test_the_mode_is_found_where_none_is_given() -> None:
    for mode in MODES:
        reader = decrypting_reader(MemoryReader(sealed(PLAIN, mode)), KEY)
        assert isinstance(reader, DecryptingReader) and reader.mode == mode


def test_every_altered_byte_of_gcm_is_told() -> None:
    """Except the last four bytes of each IV, which MindSpore stores and does not use."""
    data = sealed(PLAIN[:100], "AES-GCM", block=64)
    unused = {40, 41, 42, 43, 112 + 40, 112 + 41, 112 + 42, 112 + 43}
    for at in range(len(data)):
        altered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if at in unused:
            assert read(opened(altered), 0, 100) == PLAIN[:100]
            continue
        with pytest.raises((FormatError, DecryptionError)):
            reader = opened(altered)
            read(reader, 0, reader.size)


@pytest.mark.parametrize("mode", MODES)
def test_truncation_is_told(mode: str) -> None:
    data = sealed(PLAIN[:100], mode, block=64)
    first = len(sealed(PLAIN[:64], mode))
    for length in range(len(data)):
        if length in (0, first):
            continue  # a whole number of blocks: this format cannot tell, the reader of the plaintext must
        with pytest.raises((TruncatedFileError, DecryptionError)):
            opened(data[:length], mode)


@pytest.mark.parametrize("mode", MODES)
def test_lengths_that_lie_are_told_before_anything_is_allocated(mode: str) -> None:
    tag = 16 if mode == "AES-GCM" else 0
    data = bytearray(sealed(PLAIN[:100], mode))
    struct.pack_into("<I", data, 28 + tag, 0xFFFFFFF0)
    struct.pack_into("<I", data, 4 + tag, (0xFFFFFFF0 + 24) & 0xFFFFFFFF)
    with pytest.raises(FormatError, match="block length"):
        opened(bytes(data), mode)


class Counting(MemoryReader):
    """Counts what is read of it."""

    reads = taken = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.taken += len(buffer)
        super().read_into(offset, buffer)


def test_a_slice_of_cbc_costs_a_slice() -> None:
    base = Counting(sealed(PLAIN, "AES-CBC"))
    reader = DecryptingReader(base, KEY)
    base.reads = base.taken = 0
    assert read(reader, 5003, 100) == PLAIN[5003:5103]
    assert base.reads == 1 and base.taken <= 100 + 48


def test_a_block_of_gcm_is_decrypted_once_for_many_small_reads() -> None:
    base = Counting(sealed(PLAIN, "AES-GCM"))
    reader = DecryptingReader(base, KEY)
    base.reads = base.taken = 0
    for offset in range(5000, 6000, 10):
        assert read(reader, offset, 10) == PLAIN[offset : offset + 10]
    assert base.reads == 1 and base.taken == 4096


def test_whole_blocks_are_streamed_without_room_for_them() -> None:
    """In pieces; only the block at either end of a range, which it does not cover, is decrypted into memory."""
    base = Counting(sealed(PLAIN, "AES-GCM", block=2048))
    reader = DecryptingReader(base, KEY, cache_bytes=1, piece_bytes=1000)
    base.reads = base.taken = 0
    assert streamed(reader, 0, 6144) == PLAIN[:6144]
    assert (base.reads, base.taken, len(reader._inner._slots)) == (9, 6144, 0)  # type: ignore[union-attr]
    assert streamed(reader, 100, 6100) == PLAIN[100:6200]
    assert (base.taken, len(reader._inner._slots)) == (6144 + 8192, 1)  # type: ignore[union-attr]


def test_a_streamed_block_that_was_altered_is_told_at_its_end() -> None:
    data = bytearray(sealed(PLAIN, "AES-GCM", block=2048))
    data[-200] ^= 1  # in the last block
    reader, told = opened(bytes(data), piece_bytes=1000), []
    with pytest.raises(DecryptionError, match="AES-GCM block at byte 8432 does not decrypt"):
        reader.stream(0, len(PLAIN), lambda at, piece: told.append((at, len(piece))))
    assert told[-2:] == [(8192, 1000), (9192, 808)]


def test_blocks_are_streamed_by_several_threads_at_once() -> None:
    """Each thread waits inside a block until the other is in one, too."""
    reader, meet = opened(sealed(PLAIN, "AES-GCM"), cache_bytes=1), threading.Barrier(2, timeout=30)
    found: dict[int, bytes] = {}

    def work(first: int) -> None:
        reader.stream(first, 4096, lambda at, piece: (meet.wait(), found.update({at: bytes(piece)})))

    other = threading.Thread(target=work, args=(4096,))
    other.start()
    work(0)
    other.join()
    assert found == {0: PLAIN[:4096], 4096: PLAIN[4096:8192]}


def test_who_is_interrupted_while_waiting_holds_nobody_up() -> None:
    """Ctrl-C reaches the main thread wherever it is; those behind it go on."""
    turn, order = units._Turn(), []
    wait = turn._changed.wait

    def interrupted(timeout: Any = None) -> bool:
        if threading.current_thread().name == "b":
            raise KeyboardInterrupt
        return wait(timeout)

    turn._changed.wait = interrupted  # type: ignore[method-assign]

    def work(name: str) -> None:
        try:
            with turn:
                order.append(name)
        except KeyboardInterrupt:
            order.append(f"{name} left")

    with turn:
        threads = [threading.Thread(target=work, args=(name,), name=name, daemon=True) for name in "abc"]
        for number, thread in enumerate(threads, 2):
            thread.start()
            while turn._tickets < number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=30)
    assert order == ["b left", "a", "c"]


def test_many_threads_decrypt_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = decrypted_units(monkeypatch)
    reader, wrong = opened(sealed(PLAIN, "AES-GCM")), []
    calls.clear()

    def work(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(200):
            low = source.randrange(len(PLAIN) - 50)
            if read(reader, low, 50) != PLAIN[low : low + 50]:
                wrong.append(low)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(calls) == 3


def test_ranges_and_closed_readers_are_refused() -> None:
    for mode in MODES:
        reader = opened(sealed(PLAIN, mode), mode)
        for offset, length in ((-1, 1), (0, len(PLAIN) + 1), (len(PLAIN), 1)):
            with pytest.raises(TruncatedFileError, match="10000 bytes of plaintext"):
                read(reader, offset, length)
        reader.close()
        with pytest.raises(StorageError, match="closed"):
            read(reader, 0, 1)


@pytest.mark.parametrize("mode", MODES)
def test_the_table_of_blocks_takes_no_more_than_the_file_justifies(mode: str) -> None:
    data = 3000 * sealed(b"\n", mode)
    opened(data, mode).close()
    with memory_limit(len(data) + (1 << 20)), pytest.raises(FormatError, match="far more than a file of"):
        opened(data, mode, budget=1 << 20)

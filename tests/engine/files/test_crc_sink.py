"""Checksums of what is written, in whatever order: those that a file has when it is read from end to end."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext import convert, decrypt, encrypt
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.engine.files.crc_sink import SummingSink
from ms_ckpt_ext.formats import ckpt_writer, safetensors
from ms_ckpt_ext.formats.checksum import crc_of
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.storage.reader import PlainReader
from ms_ckpt_ext.storage.sink import FileSink
from tests.support.formats import KEY
from tests.support.machine import watch_reads

SPECS = [
    TensorSpec("w", DTYPES["F32"], (5, 7)),
    TensorSpec("none", DTYPES["F32"], (0, 3)),
    TensorSpec("step", DTYPES["I32"], ()),
    TensorSpec("b", DTYPES["BF16"], (9,)),
]
LAYOUTS = {
    "ckpt": ckpt_writer.layout(SPECS, crc=True, piece=64),
    "safetensors": safetensors.layout(SPECS, {"format": "ms"}, crc=True),
}


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(LAYOUTS)),
    cuts=st.sets(st.integers(1, 200)),
    order=st.randoms(use_true_random=False),
)
def test_any_order(form: str, cuts: set[int], order: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    layout = LAYOUTS[form]
    assert layout.checksum is not None
    pieces = list(layout.literals)
    for entry in layout.tensors.values():
        for offset, length in entry.extents:
            # A scalar is written at once: MindSpore's checksum of safetensors sums it as a number.
            inside = {cut for cut in cuts if cut < length} if entry.shape else set()
            bounds = [0, *sorted(inside), length]
            pieces += [(offset + low, order.randbytes(high - low)) for low, high in zip(bounds, bounds[1:])]
    pieces = [(at, b"\x03\0\0\0" if layout.tensors["step"].extents[0] == (at, 4) else data) for at, data in pieces]
    order.shuffle(pieces)
    path = tmp_path_factory.mktemp("any") / "f"
    sink = SummingSink(FileSink(str(path), layout.size), layout)
    for offset, data in pieces:
        sink.write(offset, memoryview(data))
    sink.finish()
    with PlainReader(str(path)) as reader:
        found = crc_of(reader, layout.checksum.parts)
    tail = layout.checksum.render(found)
    assert path.read_bytes()[layout.checksum.offset :][: len(tail)] == tail


def test_nothing_that_was_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the digests of a decrypted file, where its tensors are known when it is there."""
    laid = ckpt_writer.layout([TensorSpec(f"{n}", DTYPES["F32"], (1 << 18,)) for n in range(4)], crc=True)
    raw = bytearray(laid.size)
    for offset, literal in laid.literals:
        raw[offset : offset + len(literal)] = literal
    raw[-17:] = ckpt_writer.crc_tail(zlib.crc32(raw[:-17]))
    (tmp_path / "net.ckpt").write_bytes(raw)
    encrypt(tmp_path / "net.ckpt", tmp_path / "sealed", enc_key=KEY)
    reads = watch_reads(monkeypatch)

    def read_again() -> int:
        return sum(read.nbytes for read in reads if ".ms_ckpt_ext" in read.path)

    convert(tmp_path / "net.ckpt", tmp_path / "out", to="safetensors", crc=True)
    decrypt(tmp_path / "sealed", tmp_path / "plain", dec_key=KEY, digests=False)
    assert reads and read_again() == 0
    decrypt(tmp_path / "sealed", tmp_path / "again", dec_key=KEY)
    assert laid.size <= read_again() < laid.size + (64 << 10)
    assert (tmp_path / "plain" / "net.ckpt").read_bytes() == raw
    convert(tmp_path / "out", tmp_path / "checked", crc_check=True)

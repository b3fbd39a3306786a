"""What conversion, encryption and lazy reading cost on a large file: memory and bytes read, whatever its size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ms_ckpt_ext import load
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.formats import ckpt, ckpt_writer
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.storage.reader import PlainReader
from tests.support import peak

MIB = 1 << 20
MOST = 160 * MIB
"""The promise is 200 MiB for a file of 3 GiB, the interpreter and the imports (40 MiB) included."""
ROWS, COLUMNS = 40 * 1024, 4096


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.ckpt` of 768 MiB, sparse but for some numbers: a tensor of 640 MiB, so in two values, and 64 smaller ones."""
    path = tmp_path_factory.mktemp("large") / "net.ckpt"
    specs = [TensorSpec("step", DTYPES["I32"], (1,)), TensorSpec("embedding", DTYPES["F32"], (ROWS, COLUMNS))]
    specs += [TensorSpec(f"layers.{n}.weight", DTYPES["BF16"], (1024, 1024)) for n in range(64)]
    laid = ckpt_writer.layout(specs)
    assert len(laid.tensors["embedding"].extents) == 2
    with path.open("wb") as file:
        for offset, literal in laid.literals:
            file.seek(offset)
            file.write(literal)
        for entry in laid.tensors.values():
            file.seek(entry.extents[-1].offset + entry.extents[-1].length - 4)
            file.write(b"last")
    assert path.stat().st_size == laid.size
    return path


CALLS = {
    "convert": "convert(arguments[0], arguments[1], to='safetensors')",
    "convert into AES-GCM": "convert(arguments[0], arguments[1], to='safetensors', enc_key=b'k' * 32)",
    "encrypt in MindSpore's blocks": "encrypt(arguments[0], arguments[1], enc_key=b'k' * 32)",
    "slices": "held = load(arguments[0])\nfor name in held: held[name].shape and held[name][:16].sum()",
    "columns": "held = load(arguments[0])\nheld['embedding'][:, 512:1024].sum()",
}


@pytest.mark.parametrize("call", CALLS)
def test_memory_does_not_grow_with_the_file(call: str, large: Path, tmp_path: Path) -> None:
    budget = MOST + (80 * MIB if call == "columns" else 0)  # the array that was asked for
    assert peak.run("from ms_ckpt_ext import convert, encrypt, load", CALLS[call], large, tmp_path / "out") <= budget


def test_decrypting_in_bounded_memory(large: Path, tmp_path: Path) -> None:
    from ms_ckpt_ext import encrypt

    encrypt(large, tmp_path / "sealed", enc_key=b"k" * 16)
    call = "decrypt(arguments[0], arguments[1], dec_key=b'k' * 16)"
    assert peak.run("from ms_ckpt_ext import decrypt", call, tmp_path / "sealed", tmp_path / "out") <= MOST
    with load(tmp_path / "out" / "net.ckpt") as held:
        assert held["embedding"][-1, -1:].tobytes() == b"last"


def test_the_index_costs_pages(large: Path) -> None:
    """A page per value, not the contents."""
    read = []

    class Counting(PlainReader):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            read.append(len(buffer))
            super().read_into(offset, buffer)

    with Counting(str(large)) as reader:
        ckpt.read_index(reader)
    assert sum(read) <= 68 * 4096


def test_one_of_eight_ranks_reads_an_eighth(large: Path) -> None:
    """Rows and columns: at most 1.05 times their bytes; the value that is cut at 512 MiB included."""
    with load(large) as held:
        rows = held["embedding"][3 * ROWS // 8 : 4 * ROWS // 8]
        columns = held["embedding"][31 * 1024 :, 3 * COLUMNS // 4 :]
        wanted = rows.nbytes + columns.nbytes
        assert held.count.nbytes <= 1.05 * wanted
        assert not rows.any()
        assert columns[-1, -1:].tobytes() == b"last"
        assert np.count_nonzero(columns) == 1

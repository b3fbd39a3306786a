"""What ties MindSpore's blocks to their order: a checksum inside, which this package writes and stock reads as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.files.convert import convert_job
from ms_ckpt_ext.engine.files.encrypted_sink import Seal
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.formats import ckpt, registry
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from tests.support.ciphers import decrypted_units

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
KEY = b"0123456789abcdef"
MODES = ["AES-GCM", "AES-CBC", "SM4-CBC"]
BLOCK = 16 << 10
HEADER = {"AES-GCM": 48, "AES-CBC": 32, "SM4-CBC": 32}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)  # 16 blocks, all of them alike
    save_file({"a": values, "b": np.arange(3, dtype=np.float32)}, tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def sealed(plain: Path, mode: str) -> Path:
    """A file of many small blocks, written as `convert` does."""
    path = plain.parent / f"{mode}.ckpt"
    seal = Seal(Key(KEY), mode, block=BLOCK)
    job = convert_job({path.name: str(plain)}, seal=seal, digests=False)
    execute(job, str(path.parent), 1, Limits())
    return path


def blocks_of(data: bytes, mode: str) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at + HEADER[mode] - 4 : at + HEADER[mode]], "little") + HEADER[mode]
        found.append(data[at : at + length])
        at += length
    return found


def values(held: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: np.asarray(value.asnumpy()).tobytes() for name, value in held.items()}


@pytest.mark.parametrize("mode", MODES)
def test_stock_reads_them_with_and_without_crc_check(mode: str, ms: Any, plain: Path) -> None:
    path = sealed(plain, mode)
    truth = values(ms.load_checkpoint(str(plain), format="safetensors"))
    for crc_check in (False, True):
        assert values(ms.load_checkpoint(str(path), dec_key=KEY, dec_mode=mode, crc_check=crc_check)) == truth
        ours = ms_ckpt_ext.load_checkpoint(path, dec_key=KEY, dec_mode=mode, crc_check=crc_check)
        assert values(ours) == truth
    with registry.open_reader(str(path), Access(Key(KEY))) as reader:
        assert ckpt.stored_crc(reader) is not None


DAMAGES = {
    "swapped": lambda blocks: [*blocks[:4], blocks[5], blocks[4], *blocks[6:]],
    "doubled in place of another": lambda blocks: [*blocks[:5], blocks[4], *blocks[6:]],
    "the end left out": lambda blocks: blocks[:-1],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("mode", MODES)
def test_other_orders_are_found(mode: str, damage: str, plain: Path) -> None:
    path = sealed(plain, mode)
    blocks = blocks_of(path.read_bytes(), mode)
    assert len(blocks) > 10
    path.write_bytes(b"".join(DAMAGES[damage](blocks)))
    with pytest.raises((errors.ChecksumError, errors.FormatError)):
        ms_ckpt_ext.load(path, dec_key=KEY, crc_check=mode != "AES-GCM")


def test_each_block_is_decrypted_once_for_checksum_and_contents(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sealed(plain, "AES-GCM")
    decrypted = decrypted_units(monkeypatch)
    registry.read_index(str(path), Access(Key(KEY)))
    assert len(decrypted) == len(set(decrypted)) > 10

"""`resume(check="digests")`: what one file is compared with, encrypted or not, beside its manifest or below it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ms_ckpt_ext import convert
from ms_ckpt_ext.engine.resume.newest import _faults
from ms_ckpt_ext.errors import DecryptionError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access, read_index
from tests.together.saved import save


def test_sealed_digests_are_compared(tmp_path: Path) -> None:
    """CBC notices nothing by itself. Without the key, only sizes are compared."""
    save(tmp_path / "c", 3)
    key, path = Key(bytes(16)), tmp_path / "sealed" / "net-1_3.ckpt"
    convert(tmp_path / "c/rank_1/net-1_3.safetensors", path, enc_key=key, enc_mode="AES-CBC")
    index = read_index(str(path), Access(key))
    assert _faults(index, Access(key)) == ""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert "the manifest says" in _faults(index, Access(key))
    assert _faults(index, Access()) == ""
    with pytest.raises(DecryptionError, match="sealed digests of 'net-1_3.ckpt'"):
        _faults(index, Access(Key(b"x" * 16)))


def test_a_manifest_one_folder_up_is_compared(tmp_path: Path) -> None:
    """As jobs for several ranks write it."""
    save(tmp_path / "c", 3)
    convert(tmp_path / "c", tmp_path / "out", to="safetensors")
    path = tmp_path / "out/rank_1/net-1_3.safetensors"
    index = read_index(str(path))
    assert _faults(index, Access()) == ""
    shutil.copy(tmp_path / "out/rank_2/net-1_3.safetensors", path)
    assert "the manifest says" in _faults(index, Access())

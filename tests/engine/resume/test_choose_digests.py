"""`resume(check="digests")`: what one file is compared with, encrypted or not, beside its manifest or below it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ms_ckpt_ext import convert
from ms_ckpt_ext.engine.integrity.recorded import damaged_files
from ms_ckpt_ext.engine.source.catalog import Catalog, files_catalog
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import PLAIN, Access
from ms_ckpt_ext.transport.local import LocalWorld
from tests.support.saved import save


def faults(catalog: Catalog, access: Access = PLAIN) -> str:
    """What is found in a file that two ranks look at; both get the same answer."""
    catalog = catalog._replace(access=access)
    told, same = LocalWorld(2, timeout=20.0).run(lambda transport: damaged_files(transport, catalog, None, 1))
    assert told == same
    return "; ".join(map(str, told))


def as_old_as_before(catalog: Catalog) -> None:
    """Damage by a disk does not change the time of modification."""
    os.utime(catalog.files[0].path, ns=(catalog.files[0].mtime_ns,) * 2)


def test_sealed_digests_are_compared(tmp_path: Path) -> None:
    """CBC detects nothing by itself. Without the key, only sizes are compared."""
    save(tmp_path / "c", 3)
    key, path = Key(bytes(16)), tmp_path / "sealed" / "net-1_3.ckpt"
    convert(tmp_path / "c/rank_1/net-1_3.safetensors", path, enc_key=key, enc_mode="AES-CBC")
    catalog = files_catalog([str(path)], Access(key))
    assert faults(catalog, Access(key)) == ""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    as_old_as_before(catalog)
    assert "the manifest says" in faults(catalog, Access(key))
    assert faults(catalog) == ""
    other = faults(catalog, Access(Key(b"x" * 16)))
    assert "sealed digests of 'net-1_3.ckpt'" in other and "do not open" in other


def test_a_manifest_one_folder_up_is_compared(tmp_path: Path) -> None:
    """As jobs for several ranks write it."""
    save(tmp_path / "c", 3)
    convert(tmp_path / "c", tmp_path / "out", to="safetensors")
    path = tmp_path / "out/rank_1/net-1_3.safetensors"
    catalog = files_catalog([str(path)])
    assert faults(catalog) == ""
    shutil.copy(tmp_path / "out/rank_2/net-1_3.safetensors", path)
    assert "changed since its header was read" in faults(catalog)
    as_old_as_before(catalog)
    assert "parameter 'a.w' in" in faults(catalog) and "the manifest says" in faults(catalog)

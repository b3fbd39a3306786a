"""`verify` compares every file that carries a checksum with it, by itself and by manifest, and lists the wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import convert, verify
from ms_ckpt_ext.engine.integrity.folder import ManifestCheck
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME
from tests.support.command_line import as_json, fine
from tests.support.verifying import checked

KEY = b"0123456789abcdef"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain" / "a.safetensors"
    path.parent.mkdir()
    save_file({"w": np.arange(40, dtype="f4").reshape(5, 8)}, path, metadata={"format": "ms"})
    return path


def replace(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def by_manifest(path: Path) -> ManifestCheck:
    found = verify(path, manifest=True)
    assert isinstance(found, ManifestCheck)
    return found


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_one_bit(form: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "out", to=form, crc=True)
    path = tmp_path / "out" / f"a.{form}"
    sound = checked(path)
    assert (sound.ok, sound.checksums, sound.damaged) == (True, 1, ())
    flip(path, -40)
    found = checked(path)
    assert (found.ok, found.checksums) == (False, 1)
    assert [damaged.file for damaged in found.damaged] == [str(path)] and "CRC-32" in found.damaged[0].reason
    told = as_json("verify", path, code=1)
    assert (told["ok"], told["checksums"], len(told["damaged"])) == (False, 1, 1)
    assert told["damaged"][0]["file"] == str(path) and told["damaged"][0]["reason"] == found.damaged[0].reason
    assert fine("verify", path, code=1).startswith("Faulty")


def test_cbc_with_its_checksum_inside(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "out", to="ckpt", enc_key=KEY, enc_mode="AES-CBC")
    path = tmp_path / "out" / "a.ckpt"
    assert checked(path, dec_key=KEY).ok
    flip(path, 150)
    assert [damaged.file for damaged in checked(path, dec_key=KEY).damaged] == [str(path)]


def test_all_damaged_files_of_ranks(tmp_path: Path) -> None:
    from tests.support.checkpoints import source

    root = source(tmp_path / "source")
    convert(root / "shards", tmp_path / "out", to="ckpt", crc=True, digests=False)
    paths = [tmp_path / "out" / f"rank_{rank}" / "net.ckpt" for rank in (1, 2)]
    for path in paths:
        flip(path, -1)
    found = checked(tmp_path / "out", strategy=root / "strategy.ckpt")
    assert (found.ok, found.checksums, found.unequal) == (False, 4, ())
    assert [damaged.file for damaged in found.damaged] == list(map(str, paths))


def test_by_manifest(plain: Path, tmp_path: Path) -> None:
    """Dimensions and the checksum itself are in no tensor's bytes."""
    convert(plain, tmp_path / "out", to="ckpt", crc=True)
    path = tmp_path / "out" / "a.ckpt"
    whole = path.read_bytes()
    assert by_manifest(path.parent).ok
    replace(path, b"\x08\x05\x08\x08", b"\x08\x08\x08\x05")
    found = by_manifest(path.parent)
    assert not found.ok and {(fault.file, fault.tensor) for fault in found.faults} == {("a.ckpt", None)}
    path.write_bytes(whole)
    flip(path, -1)
    assert not by_manifest(path.parent).ok


@pytest.mark.parametrize("crc", [False, True])
def test_a_manifest_covers_the_header(crc: bool, plain: Path, tmp_path: Path) -> None:
    """Safetensors checksums sum names and contents; dtypes, shapes and notes they do not."""
    save_file({"q": np.arange(40, dtype="i1").reshape(5, 8)}, plain, metadata={"format": "ms", "q": "Int4"})
    convert(plain, tmp_path / "out", crc=crc)
    path = tmp_path / "out" / "a.safetensors"
    whole = path.read_bytes()
    assert by_manifest(path.parent).ok
    for old, new in ((b"Int4", b"Int5"), (b'"I8","shape":[5,8]', b'"U8","shape":[8,5]')):
        replace(path, old, new)
        (fault,) = by_manifest(path.parent).faults
        assert (fault.file, fault.tensor) == ("a.safetensors", None) and "dtypes, shapes and notes" in str(fault)
        path.write_bytes(whole)


def test_a_manifest_of_an_older_release_counts_for_what_it_holds(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "out", to="ckpt")
    manifest = tmp_path / "out" / MANIFEST_NAME
    content = json.loads(manifest.read_bytes())
    assert by_manifest(tmp_path / "out").ok
    del content["files"]["a.ckpt"]["framing"]
    manifest.write_text(json.dumps(content))
    assert by_manifest(tmp_path / "out").ok
    flip(tmp_path / "out" / "a.ckpt", -1)
    assert [fault.tensor for fault in by_manifest(tmp_path / "out").faults] == ["w"]

"""Encrypted files and their manifest: what is checked, with digests and without; what is said when nothing is."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import convert, encrypt, load, verify
from ms_ckpt_ext.cli.main import main
from ms_ckpt_ext.engine.integrity.folder import ManifestCheck
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, FileDigests, Manifest, load_manifest, write_manifest
from ms_ckpt_ext.engine.integrity.recorded import _why
from ms_ckpt_ext.errors import ChecksumError, DecryptionError
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import Access
from tests.support.command_line import as_json, fine

KEY = b"0123456789abcdef"
FORMS = [
    ("safetensors", "AES-GCM", True), ("ckpt", "chunked", True), ("ckpt", "AES-GCM", True), ("ckpt", "AES-CBC", True),
    ("ckpt", "SM4-CBC", True), ("bare", "AES-GCM", True), ("bare", "AES-CBC", False),
]  # fmt: skip
"""(what is encrypted, how, whether that alone tells what was altered); "bare" is a `.ckpt` without a checksum."""


@pytest.fixture(params=[False, True], ids=["bare record", "digests"])
def digests(request: Any) -> bool:
    """Whether the manifest has digests; those of a recorder, which has no key, list sizes only."""
    return bool(request.param)


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(map(str, form[:2])))
def made(request: Any, digests: bool, tmp_path: Path) -> tuple[Path, bool]:
    """A folder with one encrypted file and its manifest, and whether what is altered in it is noticed."""
    from safetensors.numpy import save_file

    form, mode, tells = request.param
    save_file({"w": np.random.default_rng(0).standard_normal(4096).astype("f4")}, tmp_path / "plain.safetensors")
    if form == "bare":
        convert(tmp_path / "plain.safetensors", tmp_path / "plain.ckpt", digests=False)
        encrypt(tmp_path / "plain.ckpt", tmp_path / "sealed", enc_key=KEY, enc_mode=mode)
    else:
        convert(tmp_path / "plain.safetensors", tmp_path / "sealed", to=form, enc_key=KEY, enc_mode=mode)
    if not digests:
        manifest = load_manifest(str(tmp_path / "sealed"))
        assert manifest is not None
        sizes = {name: FileDigests(held.size, {}) for name, held in manifest.files.items()}
        write_manifest(str(tmp_path / "sealed"), Manifest(sizes))
    return tmp_path / "sealed", tells or digests


def checked(folder: Path, **more: Any) -> ManifestCheck:
    found = verify(folder, manifest=True, **more)
    assert isinstance(found, ManifestCheck)
    return found


def test_with_the_key_contents_are_looked_at(made: tuple[Path, bool], digests: bool) -> None:
    folder, tells = made
    found = checked(folder, dec_key=KEY)
    assert (found.ok, found.faults, found.files, found.tensors) == (tells, (), 1, int(digests))
    assert [u.reason for u in found.unchecked] == (
        [] if tells else ["AES-CBC is not authenticated, and the file holds no checksum"]
    )


def test_altered_contents_are_found(made: tuple[Path, bool]) -> None:
    folder, tells = made
    (file,) = (path for path in folder.iterdir() if path.suffix != ".json")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = checked(folder, dec_key=KEY)
    assert not found.ok and bool(found.faults) == tells
    assert {fault.file for fault in found.faults} <= {file.name}


def test_without_a_key_nothing_is_called_right(made: tuple[Path, bool]) -> None:
    folder, _ = made
    found = checked(folder)
    assert not found.ok and found.faults == ()
    assert found.unchecked[0].reason.endswith("and no key is given")
    told = as_json("verify", folder, "--manifest", code=1)
    assert (told["ok"], told["faults"]) == (False, [])
    assert [each["reason"] for each in told["unchecked"]] == [each.reason for each in found.unchecked]
    out = fine("verify", folder, "--manifest", code=1)
    assert out.startswith("Not checked in full") and "no key is given" in out and "As written" not in out


def two_files(tmp_path: Path, mode: str) -> tuple[Path, Path]:
    """Two encrypted files of one layout, with other contents."""
    from safetensors.numpy import save_file

    for rank in range(2):
        folder = tmp_path / "plain" / f"rank_{rank}"
        folder.mkdir(parents=True)
        save_file({"w": np.full(64, rank, "f4")}, folder / "net.safetensors")
    convert(tmp_path / "plain", tmp_path / "sealed", to="ckpt", enc_key=KEY, enc_mode=mode)
    one, two = (tmp_path / "sealed" / f"rank_{rank}" / "net.ckpt" for rank in range(2))
    return one, two


@pytest.mark.parametrize("manifest_too", [False, True])
@pytest.mark.parametrize("mode", ["chunked", "AES-GCM", "AES-CBC"])
def test_files_that_changed_places_are_found(mode: str, manifest_too: bool, tmp_path: Path) -> None:
    """Each is authentic; that it is another one than it was shows in the digests, and these are bound to names."""
    one, two = two_files(tmp_path, mode)
    raw = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(raw)
    if manifest_too:
        manifest = tmp_path / "sealed" / MANIFEST_NAME
        content = json.loads(manifest.read_text())
        a, b = content["files"]
        content["files"] = {a: content["files"][b], b: content["files"][a]}
        manifest.write_text(json.dumps(content))
    found = checked(tmp_path / "sealed", dec_key=KEY)
    assert {fault.file for fault in found.faults} == {"rank_0/net.ckpt", "rank_1/net.ckpt"}
    assert ("w" in {fault.tensor for fault in found.faults}) is not manifest_too


def test_files_without_tensors_are_compared_too(tmp_path: Path) -> None:
    """They hold framing only, such as notes."""
    from safetensors.numpy import save_file

    for rank in range(2):
        (tmp_path / "plain").mkdir(exist_ok=True)
        save_file({}, tmp_path / "plain" / f"{rank}.safetensors", {"rank": f"{rank}"})
    for folder, key in (("open", None), ("sealed", KEY)):
        convert(tmp_path / "plain", tmp_path / folder, **({} if key is None else {"enc_key": key}))
        one, two = (tmp_path / folder / f"{rank}.safetensors" for rank in range(2))
        assert checked(tmp_path / folder, dec_key=key).ok
        raw = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(raw)
        assert len(checked(tmp_path / folder, dec_key=key).faults) == 2


def test_sealed_digests_are_never_taken_for_proved(tmp_path: Path) -> None:
    """A plain file in the place of an encrypted one is what somebody without the key can make."""
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(100, "f4")}, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "sealed", enc_key=KEY)
    path = tmp_path / "sealed/w.safetensors"
    size = path.stat().st_size
    path.write_bytes((size - 8).to_bytes(8, "little") + b"{}" + b" " * (size - 10))
    found = checked(tmp_path / "sealed")
    assert not found.ok and found.unchecked[0].reason.endswith("and no key is given")
    assert len(checked(tmp_path / "sealed", dec_key=KEY).faults) == 1


def test_a_file_that_cannot_be_read_is_a_fault_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = two_files(tmp_path, "AES-GCM")
    held = two.read_bytes()
    two.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    real = os.preadv

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if os.path.samestat(os.fstat(fd), one.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    found = checked(tmp_path / "sealed", dec_key=KEY)
    assert {fault.file: "Input/output error" in fault.found for fault in found.faults} == {
        "rank_0/net.ckpt": True,
        "rank_1/net.ckpt": False,
    }


@pytest.mark.parametrize("mode", ["chunked", "AES-GCM", "AES-CBC"])
def test_an_older_file_of_another_size_is_found(mode: str, tmp_path: Path) -> None:
    """Each of them decrypts; the manifest is that of the newer one."""
    from safetensors.numpy import save_file

    for length in (1000, 10):  # the older one first
        save_file({"w": np.zeros(length, "f4")}, tmp_path / "w.safetensors")
        convert(tmp_path / "w.safetensors", tmp_path / f"{length}", to="ckpt", enc_key=KEY, enc_mode=mode)
    (tmp_path / "10/w.ckpt").write_bytes((tmp_path / "1000/w.ckpt").read_bytes())
    with pytest.raises(ChecksumError, match="bytes, the manifest says"):
        load(tmp_path / "10/w.ckpt", dec_key=KEY, verify="full")
    assert not checked(tmp_path / "10", dec_key=KEY).ok


@pytest.mark.parametrize("mode", ["chunked", "AES-GCM", "AES-CBC", "SM4-CBC"])
@pytest.mark.parametrize("fault", ["none", "altered", "another key"])
def test_a_load_compares_what_is_encrypted(mode: str, fault: str, tmp_path: Path) -> None:
    """`verify="full"`, as every rank does it; the load itself is in tests/live."""
    from ms_ckpt_ext.engine.integrity import recorded
    from ms_ckpt_ext.engine.source.catalog import files_catalog
    from ms_ckpt_ext.formats.crypto import Key

    one, two = two_files(tmp_path, mode)
    if fault == "altered":
        one.write_bytes(two.read_bytes())  # decrypts
    catalog = files_catalog([str(one)], Access(Key(KEY)))
    if fault == "another key":
        manifest = load_manifest(str(tmp_path / "sealed"))
        assert manifest is not None
        held = manifest.files["rank_0/net.ckpt"]._replace(tensors={"w": "0" * 32}, sealed=None)
        other = held.sealed_by(Key(b"x" * 16), "rank_0/net.ckpt")
        write_manifest(str(tmp_path / "sealed"), Manifest({"rank_0/net.ckpt": other}))
        with pytest.raises(DecryptionError, match="sealed digests of 'rank_0/net.ckpt'"):
            recorded._found(catalog, {0: ["w"]}, 1)
        return
    faults = recorded._found(catalog, {0: ["w"]}, 1)
    assert [each.tensor for each in faults] == ([] if fault == "none" else ["w"])


def test_another_mode_than_expected_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, "f4")}, tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", tmp_path / "sealed", to="ckpt", enc_key=KEY)
    (tmp_path / "key").write_bytes(KEY)
    assert not checked(tmp_path / "sealed", dec_key=KEY, dec_mode="AES-CBC").ok
    words = ["inspect", str(tmp_path / "sealed" / "plain.ckpt"), "--dec-key-file", str(tmp_path / "key"), "--dec-mode"]
    assert main([*words, "AES-GCM"]) == 0
    assert main([*words, "AES-CBC"]) == 6
    assert "AES-GCM, not AES-CBC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reader", "recorded", "expected"),
    [
        ("plain", None, "neither the file's folder nor the one above has a ms_ckpt_ext.digests.json that lists it"),
        ("plain", FileDigests(1, {"other": "0" * 32}), "lists the file, but without this parameter"),
        ("plain", FileDigests(1, {}), "lists the file without digests"),
        ("AES-CBC", FileDigests(1, {}), "without digests, as it is encrypted (AES-CBC, which is not authenticated)"),
    ],
)
def test_why_there_is_no_digest_is_said_as_it_is(reader: str, recorded: Any, expected: str) -> None:
    assert expected in _why(FileIndex("x", 1, 0, {}, {}, reader), recorded)

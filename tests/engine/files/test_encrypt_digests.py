"""Digests of files that are encrypted or decrypted: of what was copied, compared at a rerun, and in bounded memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import xxhash

from ms_ckpt_ext import convert, decrypt, encrypt
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import Manifest, load_manifest
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats import crypto
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.storage.digest_sink import DigestStream
from tests.support.checkpoints import assert_nothing_complete
from tests.support.dying import killed, notes_what_to_publish
from tests.support.formats import KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents
from tests.support.formats import encrypt as encrypt_file
from tests.support.sealed import MODES, MORE


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_digests_of_what_is_copied(mode: str, workers: int, tmp_path: Path) -> None:
    """Of the tensors in a file, in whatever pieces it was copied; encrypted beside an encrypted one."""
    source, options = write_ckpt(tmp_path / "net.ckpt", crc=True, **MORE), {"max_process_num": workers}
    truth = digest_file(read_index(str(source)))
    assert dict(truth.tensors) == {
        name: xxhash.xxh3_128_hexdigest(entry[2]) for name, entry in contents(source).items()
    }
    encrypt(source, tmp_path / "sealed", enc_key=KEY, enc_mode=mode, **options)  # type: ignore[arg-type]
    decrypt(tmp_path / "sealed", tmp_path / "plain", dec_key=KEY, **options)  # type: ignore[arg-type]
    sealed, plain = (load_manifest(str(tmp_path / name)) for name in ("sealed", "plain"))
    assert sealed is not None
    assert sealed.files["net.ckpt"].tensors == {}
    assert sealed.files["net.ckpt"].opened_by(crypto.Key(KEY), "net.ckpt")[1:3] == truth[1:3]
    assert plain == Manifest({"net.ckpt": truth})
    assert check_digests(str(tmp_path / "plain"), plain) == []


def test_digests_or_none(tmp_path: Path) -> None:
    source = write_ckpt(tmp_path / "net.ckpt")
    convert(source, tmp_path / "converted", to="safetensors")
    convert(source, tmp_path / "a", to="safetensors", digests=False)
    encrypt(source, tmp_path / "b", enc_key=KEY, digests=False)
    decrypt(tmp_path / "b", tmp_path / "c", dec_key=KEY, digests=False)
    listed = load_manifest(str(tmp_path / "converted"))
    assert listed is not None
    truth = {name: xxhash.xxh3_128_hexdigest(entry[2]) for name, entry in contents(source).items()}
    assert dict(listed.files["net.safetensors"].tensors) == truth
    assert [load_manifest(str(tmp_path / name)) for name in "abc"] == [None] * 3


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_listed_is_decrypted_all_the_same(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MindSpore encrypts what this package does not read, MapParameters for one."""
    plain = write_ckpt(tmp_path / "net.ckpt").read_bytes()
    plain = plain[: len(plain) // 2]
    if mode == "chunked":
        (tmp_path / "net.safetensors").write_bytes(plain)
        encrypt_file(tmp_path / "net.safetensors", tmp_path / "sealed.safetensors", None)
        decrypt(tmp_path / "sealed.safetensors", tmp_path / "other", dec_key=KEY)
        assert (tmp_path / "other/sealed.safetensors").read_bytes() == plain
    (tmp_path / "net.ckpt").write_bytes(plain)
    encrypt_file(tmp_path / "net.ckpt", tmp_path / "sealed.ckpt", None if mode == "chunked" else mode)
    decrypt(tmp_path / "sealed.ckpt", tmp_path / "out", dec_key=KEY)
    assert (tmp_path / "out" / "sealed.ckpt").read_bytes() == plain
    assert load_manifest(str(tmp_path / "out")) is None
    assert "no digests of 'sealed.ckpt' are recorded" in caplog.text and ".partial" not in caplog.text


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_what_an_interrupted_run_copied_is_compared_as_a_whole(mode: str, listed: bool, tmp_path: Path) -> None:
    """Names, shapes and notes too, of which a copy knows nothing beforehand; what holds none is taken as it is."""
    plain = write_ckpt(tmp_path / "net.ckpt").read_bytes()
    plain = plain if listed else plain[:-9]
    (tmp_path / "sealed").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.ckpt").write_bytes(plain)
        encrypt_file(tmp_path / f"{name}.ckpt", tmp_path / f"sealed/{name}.ckpt", None if mode == "chunked" else mode)
    killed(lambda: decrypt(tmp_path / "sealed", tmp_path / "out", dec_key=KEY), notes_what_to_publish)
    (held,) = (tmp_path / "out").glob(".ms_ckpt_ext/*/a.ckpt")
    raw = bytearray(held.read_bytes())
    at = raw.index(b"z.weight")
    raw[at : at + 1] = b"y"
    held.write_bytes(raw)
    report = decrypt(tmp_path / "sealed", tmp_path / "out", dec_key=KEY)
    assert report.files_written == (("a.ckpt",) if listed else ())
    assert ((tmp_path / "out/a.ckpt").read_bytes() == plain) is listed
    assert (tmp_path / "out/b.ckpt").read_bytes() == plain


@pytest.mark.parametrize("size", ["larger", "smaller"])
def test_a_file_that_is_replaced_before_its_turn_is_told(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look at it was for its size, the second lists its tensors."""
    source = write_ckpt(tmp_path / "net.ckpt")
    raw = source.read_bytes()
    real = os.close

    def replaced(descriptor: int) -> None:
        """The first reader of the file has seen enough."""
        ours = os.path.samestat(os.fstat(descriptor), source.stat())
        real(descriptor)
        if ours:
            monkeypatch.setattr(os, "close", real)
            source.unlink()
            source.write_bytes(raw + raw.replace(b"weight", b"height") if size == "larger" else raw[: len(raw) // 2])

    monkeypatch.setattr(os, "close", replaced)
    with pytest.raises(CheckpointError):
        encrypt(source, tmp_path / "out", enc_key=KEY)
    assert_nothing_complete(tmp_path / "out")


def test_only_files_under_way_are_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a thousand files has a million tensors, and what digests one takes half a KiB."""
    for number in range(12):
        (tmp_path / f"src/{number}").mkdir(parents=True)
        write_ckpt(tmp_path / f"src/{number}/net.ckpt")
    under_way: list[int] = []
    close = os.close

    def counted(descriptor: int) -> None:
        """Of a file that is complete, whose digests are about to be asked for."""
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".partial"):
            under_way.append(sum(type(each) is DigestStream for each in gc.get_objects()))
        close(descriptor)

    monkeypatch.setattr(os, "close", counted)
    tensors = len(contents(tmp_path / "src/0/net.ckpt"))
    encrypt(tmp_path / "src", tmp_path / "out", enc_key=KEY, sync=False)
    digests = load_manifest(str(tmp_path / "out"))
    assert digests is not None and len(digests.files) == 12 <= len(under_way)
    for name, held in digests.files.items():
        opened = held.opened_by(crypto.Key(KEY), name)
        assert len(opened.tensors) == tensors and opened.framing
    assert 0 < max(under_way) <= 3 * (tensors + 1)

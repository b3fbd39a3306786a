"""Encrypting, decrypting and converting between both: the same bytes back, MindSpore reads them, keys show nowhere."""

from __future__ import annotations

import json
import logging
import mmap
import zlib
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import convert, decrypt, encrypt, load, unified_safetensors
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import Manifest, load_manifest
from ms_ckpt_ext.errors import CheckpointError, ChecksumError, DecryptionError, FormatError, UsageError
from ms_ckpt_ext.formats import ckpt_writer, crypto
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.registry import DEC_KEY_VARIABLE, ENC_KEY_VARIABLE, Access, read_index
from tests.support.checkpoints import assert_nothing_complete, tree
from tests.support.ciphers import decrypted_units
from tests.support.encrypted import in_blocks, write_sealed
from tests.support.formats import CASE, KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents
from tests.support.formats import encrypt as encrypt_file
from tests.support.machine import watch_reads
from tests.support.sealed import MODES, MORE, sealed


def container(path: Path) -> Any:
    return crypto.sniff(path.read_bytes()[: crypto.SNIFF_BYTES])


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_and_back(mode: str, large: bool, tmp_path: Path) -> None:
    """Units for which there is no room, as MindSpore's of 64 MiB, are streamed."""
    source = write_ckpt(tmp_path / "net.ckpt", crc=True, **(MORE if large else {}))
    sealed(source, tmp_path / "sealed.ckpt", mode, large)
    assert container(tmp_path / "sealed.ckpt") == mode
    decrypt(tmp_path / "sealed.ckpt", tmp_path / "plain", dec_key=KEY, dec_mode=mode)
    assert (tmp_path / "plain" / "sealed.ckpt").read_bytes() == source.read_bytes()
    with load(tmp_path / "sealed.ckpt", dec_key=KEY, crc_check=True) as held:
        assert held["note"] == "nöte"


@pytest.mark.parametrize("mode", ["AES-GCM", "chunked"])
def test_safetensors_go_into_the_authenticated_container(mode: str, tmp_path: Path) -> None:
    convert(write_ckpt(tmp_path / "net.ckpt"), tmp_path / "net.safetensors")
    encrypt(tmp_path / "net.safetensors", tmp_path / "out", enc_key=KEY, enc_mode=mode)
    assert container(tmp_path / "out" / "net.safetensors") == crypto.CHUNKED
    decrypt(tmp_path / "out", tmp_path / "back", dec_key=KEY)
    assert (tmp_path / "back" / "net.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    with pytest.raises(UsageError, match="safetensors files take AES-GCM"):
        encrypt(tmp_path / "net.safetensors", tmp_path / "cbc", enc_key=KEY, enc_mode="AES-CBC")
    assert not (tmp_path / "cbc").exists()


@pytest.mark.parametrize("kind", ["ckpt_crc", "safetensors"])
def test_golden_trees(kind: str, golden: Path, tmp_path: Path) -> None:
    source = golden / CASE / kind
    report = encrypt(source, tmp_path / "sealed", enc_key=KEY)
    assert report.published
    assert len(report.files_written) == 8
    sealed = tree(tmp_path / "sealed")
    assert set(sealed) == set(tree(source))
    assert b"layers" not in b"".join(sealed.values())  # names are encrypted too
    again = encrypt(source, tmp_path / "sealed", enc_key=KEY)
    assert (again.bytes_read, len(again.files_kept)) == (0, 8)
    assert tree(tmp_path / "sealed") == sealed
    decrypt(tmp_path / "sealed", tmp_path / "back", dec_key=KEY)
    assert tree(tmp_path / "back") == tree(source)


def test_a_merged_checkpoint_stays_loadable(golden: Path, tmp_path: Path) -> None:
    unified_safetensors(golden / "dp2_tp4" / "shards", golden / "dp2_tp4" / "strategy.ckpt", tmp_path / "merged")
    encrypt(tmp_path / "merged", tmp_path / "sealed", enc_key=KEY)
    names = json.loads((tmp_path / "merged" / "param_name_map.json").read_text())
    assert json.loads((tmp_path / "sealed" / "param_name_map.json").read_text()) == names
    with load(tmp_path / "sealed", dec_key=KEY) as sealed, load(tmp_path / "merged") as merged:
        assert {n: a.tobytes() for n, a in sealed.arrays().items()} == {
            n: a.tobytes() for n, a in merged.arrays().items()
        }


@pytest.mark.parametrize("mode", MODES)
def test_converting_from_one_key_to_another(mode: str, golden: Path, tmp_path: Path) -> None:
    """Another format, another key, another mode, a checksum inside: in one pass."""
    source, plain = golden / CASE / "ckpt_aes_gcm", golden / CASE / "ckpt"
    new, to = b"another key 1234", "ckpt" if mode != "chunked" else "safetensors"
    seal = {"enc_key": new, "enc_mode": mode, "crc": True}
    convert(source, tmp_path / "out", to=to, dec_key=KEY, file_name_regex="rank_1", **seal)  # type: ignore[arg-type]
    (name,) = tree(tmp_path / "out")
    held = contents(tmp_path / "out" / name, Access(crypto.Key(new), None, crc_check=True))
    assert held == contents((plain / name).with_suffix(".ckpt"))
    with pytest.raises(DecryptionError):
        contents(tmp_path / "out" / name, Access(crypto.Key(KEY)))


@pytest.mark.stock
@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_mindspore_reads_what_we_encrypt(mode: str, golden: Path, tmp_path: Path) -> None:
    import mindspore

    path = next((golden / CASE / "ckpt" / "rank_1").glob("*.ckpt"))
    encrypt(path, tmp_path / "sealed.ckpt", enc_key=KEY, enc_mode=mode)
    found = mindspore.load_checkpoint(str(tmp_path / "sealed.ckpt"), dec_key=KEY, dec_mode=mode)
    truth = contents(path)
    assert {name: bytes(value.get_bytes()) for name, value in found.items()} == {n: t[2] for n, t in truth.items()}


def test_keys_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_ckpt(tmp_path / "net.ckpt")
    for call, variable in ((encrypt, ENC_KEY_VARIABLE), (decrypt, DEC_KEY_VARIABLE)):
        with pytest.raises(UsageError, match=variable):
            call(source, tmp_path / "none")
        monkeypatch.setenv(variable, "hex:" + KEY.hex())
    encrypt(source, tmp_path / "sealed.ckpt")
    decrypt(tmp_path / "sealed.ckpt", tmp_path / "back.ckpt")
    assert (tmp_path / "back.ckpt").read_bytes() == source.read_bytes()
    convert(source, tmp_path / "converted.safetensors")
    assert container(tmp_path / "converted.safetensors") == crypto.CHUNKED


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_faults_write_nothing_and_tell_no_key(
    mode: str, large: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is streamed is written before its tags are checked."""
    caplog.set_level(logging.DEBUG)
    source = write_ckpt(tmp_path / "net.ckpt", **(MORE if large else {}))
    sealed(source, tmp_path / "sealed.ckpt", mode, large)
    whole = (tmp_path / "sealed.ckpt").read_bytes()
    flipped = whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:]
    faults = [(b"y" * 16, whole), (KEY, whole[:-5])]
    for key, data in faults if mode.endswith("CBC") else [*faults, (KEY, flipped)]:  # CBC authenticates nothing
        (tmp_path / "sealed.ckpt").write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            decrypt(tmp_path / "sealed.ckpt", tmp_path / "out", dec_key=key)
        for secret in (KEY, b"y" * 16):
            assert secret.decode() not in f"{caught.value!r} {caught.value} {caplog.text}"
            assert secret.hex() not in f"{caught.value!r} {caught.value} {caplog.text}"
        assert_nothing_complete(tmp_path / "out")


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_exchanged_blocks_are_found_by_the_checksum_inside(mode: str, tmp_path: Path) -> None:
    """Every block decrypts to the right length, and to wrong contents."""
    laid = ckpt_writer.layout([TensorSpec("w", DTYPES["U8"], (1000,))])
    plain = bytearray(laid.literals[0][1] + bytes(range(250)) * 4)
    plain += b"crc_num" + zlib.crc32(plain).to_bytes(10, "big")
    (tmp_path / "net.ckpt").write_bytes(plain)
    sealed = tmp_path / "sealed.ckpt"
    sealed.write_bytes(in_blocks(bytes(plain), KEY, mode, block=256))
    decrypt(sealed, tmp_path / "right", dec_key=KEY)
    assert (tmp_path / "right" / "sealed.ckpt").read_bytes() == plain
    raw = sealed.read_bytes()
    starts = [at for at in range(len(raw)) if raw.startswith(raw[:4], at)]
    a, b, c = starts[1:4]
    sealed.write_bytes(raw[:a] + raw[b:c] + raw[a:b] + raw[c:])
    with pytest.raises(ChecksumError, match="blocks were exchanged or altered"):
        decrypt(sealed, tmp_path / "out", dec_key=KEY)
    assert_nothing_complete(tmp_path / "out")


def test_what_is_no_checkpoint_or_already_encrypted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.ckpt").write_bytes(b"not a checkpoint at all")
    with pytest.raises(FormatError, match="is not a MindSpore .ckpt"):
        encrypt(tmp_path / "net.ckpt", tmp_path / "out", enc_key=KEY)
    write_ckpt(tmp_path / "net.ckpt")
    encrypt(tmp_path / "net.ckpt", tmp_path / "out", enc_key=KEY)
    with pytest.raises(DecryptionError, match="is encrypted"):
        encrypt(tmp_path / "out", tmp_path / "twice", enc_key=KEY)
    with pytest.raises(DecryptionError, match="is not encrypted"):
        decrypt(tmp_path / "net.ckpt", tmp_path / "plain", dec_key=KEY)


@pytest.mark.parametrize("block", [64 << 20, 4 << 20])
def test_every_block_is_decrypted_once(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore's blocks have 64 MiB, of which one is kept; several threads must not take it from each other."""
    size = 200 << 20
    laid = ckpt_writer.layout([TensorSpec("w", DTYPES["F32"], (size // 4096, 1024))])
    with (tmp_path / "net.ckpt").open("wb") as file:
        file.write(laid.literals[0][1])
        file.truncate(laid.size)
    with (tmp_path / "net.ckpt").open("rb") as plain, (tmp_path / "sealed.ckpt").open("wb") as file:
        with mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            write_sealed(crypto.BlockSealer(KEY, "AES-GCM", laid.size, block=block), mapped, file)
    reads = watch_reads(monkeypatch)
    decrypt(tmp_path / "sealed.ckpt", tmp_path / "out", dec_key=KEY)
    assert size <= sum(read.nbytes for read in reads if read.path == str(tmp_path / "sealed.ckpt")) <= 1.1 * size
    assert load_manifest(str(tmp_path / "out")) == Manifest(
        {"sealed.ckpt": digest_file(read_index(str(tmp_path / "net.ckpt")))}
    )


def test_blocks_are_decrypted_about_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the table of contents, once for the tensors, though the output has another order than the source."""
    specs = [TensorSpec(f"{n}", DTYPES["F32" if n % 2 else "BF16"], (500_000 + 7 * n,)) for n in range(64)]
    laid = ckpt_writer.layout(specs)
    raw = bytearray(laid.size)
    for offset, literal in laid.literals:
        raw[offset : offset + len(literal)] = literal
    (tmp_path / "net.ckpt").write_bytes(raw)
    encrypt_file(tmp_path / "net.ckpt", tmp_path / "sealed.ckpt", "AES-GCM", unit=9 << 20)
    decrypted = decrypted_units(monkeypatch)
    convert(tmp_path / "sealed.ckpt", tmp_path / "out/net.safetensors", dec_key=KEY, max_process_num=1)
    assert contents(tmp_path / "out/net.safetensors").keys() == {spec.name for spec in specs}
    # One block is kept, as of MindSpore's of 64 MiB.
    assert len(set(decrypted)) > 8 and len(decrypted) <= 2 * len(set(decrypted)) + 2

"""How files are opened: which container, with which key, and the errors when that fails."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Optional

import pytest

from ms_ckpt_ext.errors import CheckpointError, ChecksumError, DecryptionError, StorageError, UsageError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import PLAIN, Access, lay_out, open_reader, read_index, read_indexes, reopen
from ms_ckpt_ext.storage.reader import ByteReader
from tests.support.damage import time_limit
from tests.support.encrypted import in_chunks
from tests.support.machine import watch_reads
from tests.support.memory import read

SECRET = b"0123456789ABCDEF"
"""The key of the golden files."""
KEY = Key(SECRET)
WRONG = Key(b"0123456789abcdef")
FORMATS = "formats_dp2_tp4"
MODES = {"ckpt_aes_gcm": "AES-GCM", "ckpt_aes_cbc": "AES-CBC", "ckpt_sm4_cbc": "SM4-CBC"}


def golden_file(golden: Path, kind: str, rank: int = 0) -> str:
    (file,) = (golden / FORMATS / kind / f"rank_{rank}").iterdir()
    return str(file)


def contents(reader: ByteReader) -> bytes:
    return read(reader, 0, reader.size)


def chunked(source: str, target: Path, key: bytes = SECRET) -> str:
    target.write_bytes(in_chunks(Path(source).read_bytes(), key, chunk=1024))
    return str(target)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder", "device"])
def test_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = os.listdir("/proc/self/fd")
    with time_limit(), pytest.raises(StorageError, match="a.ckpt.*no regular file"):
        read_index(str(path))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_links_to_files_are_files(golden: Path, tmp_path: Path) -> None:
    link = tmp_path / "a.ckpt"
    link.symlink_to(golden_file(golden, "ckpt"))
    assert read_index(str(link)).tensors == read_index(golden_file(golden, "ckpt")).tensors


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("mode", ["right", None])
def test_an_encrypted_file_is_its_plaintext(kind: str, mode: Optional[str], golden: Path) -> None:
    access = Access(KEY, MODES[kind] if mode else None)
    path, plain = golden_file(golden, kind), golden_file(golden, "ckpt")
    index = read_index(path, access)
    assert index.tensors == read_index(plain).tensors
    assert (index.reader, index.size) == (MODES[kind], os.path.getsize(path))
    assert read_index(plain).reader == "plain"
    with open_reader(path, access) as reader, reopen(index, access) as again:
        assert contents(reader) == contents(again) == Path(plain).read_bytes()
        assert reader.fd is None


@pytest.mark.parametrize("mode", [None, "chunked", "AES-GCM"])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_the_chunked_container(kind: str, mode: Optional[str], golden: Path, tmp_path: Path) -> None:
    plain = golden_file(golden, kind)
    path = chunked(plain, tmp_path / f"a.{kind}")
    assert read_index(path, Access(KEY, mode)).tensors == read_index(plain).tensors
    assert read_index(path, Access(KEY, mode)).metadata == read_index(plain).metadata


@pytest.mark.parametrize(
    "kind, access, said",
    [
        ("ckpt_aes_gcm", PLAIN, r"is encrypted \(AES-GCM\); pass the key .*dec_key.* MS_CKPT_EXT_DEC_KEY"),
        ("ckpt_aes_cbc", Access(KEY, "AES-GCM"), "is encrypted with AES-CBC, not AES-GCM; pass dec_mode='AES-CBC'"),
        ("ckpt_aes_gcm", Access(WRONG), "the key is wrong, or the file was altered"),
        ("ckpt_aes_cbc", Access(WRONG), "the key is wrong, or the file was altered"),
        ("ckpt_sm4_cbc", Access(WRONG), "the key is wrong, or the file was altered"),
        ("ckpt", Access(KEY), "is not encrypted, but a key is given"),
        ("safetensors", Access(KEY), "is not encrypted, but a key is given"),
    ],
)
def test_refusals_name_the_file_and_leave_nothing_open(kind: str, access: Access, said: str, golden: Path) -> None:
    path, before = golden_file(golden, kind), len(os.listdir("/proc/self/fd"))
    with pytest.raises(DecryptionError, match=said) as caught:
        read_index(path, access)
    assert path in str(caught.value)
    assert "0123456789" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_ambient_key_need_not_be_used(golden: Path) -> None:
    path = golden_file(golden, "ckpt")
    assert read_index(path, Access(KEY, optional=True)) == read_index(path)


def test_keys_do_not_show() -> None:
    assert "0123" not in repr(Access(KEY)) + str(Access(KEY)) + f"{Access(KEY)!r}"
    with pytest.raises(UsageError, match="no such dec_mode; choose one of AES-GCM, AES-CBC, SM4-CBC, chunked"):
        Access(KEY, "AES")


def test_a_plain_file_costs_one_short_read_or_none(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(golden_file(golden, "ckpt"))
    reads = watch_reads(monkeypatch)
    open_reader(index.path).close()
    assert [read.nbytes for read in reads] == [8]
    reopen(index, PLAIN).close()
    reopen(index, Access(KEY, optional=True)).close()
    assert [read.nbytes for read in reads] == [8]


@pytest.mark.parametrize("kind", ["ckpt_crc", "safetensors"])
def test_checksums_are_verified_on_request(kind: str, golden: Path, tmp_path: Path) -> None:
    plain = Path(golden_file(golden, kind))
    checked = Access(crc_check=True)
    assert read_indexes([str(plain)] * 2, checked) == read_indexes([str(plain)] * 2)
    if kind == "ckpt_crc":
        data = bytearray(plain.read_bytes())
        entry = next(iter(read_index(str(plain)).tensors.values()))
        data[entry.extents[0].offset] ^= 1
        (tmp_path / "a.ckpt").write_bytes(data)
        read_index(str(tmp_path / "a.ckpt"))
        with pytest.raises(ChecksumError, match="a.ckpt': CRC-32"):
            read_index(str(tmp_path / "a.ckpt"), checked)


def test_unknown_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    for call in (lambda: read_index(str(tmp_path / "a.bin")), lambda: lay_out("a.bin", [], {})):
        with pytest.raises(UsageError, match=re.escape("known are .safetensors, .ckpt")):
            call()


def test_an_empty_file_is_an_error_of_its_format(tmp_path: Path) -> None:
    for suffix in ("ckpt", "safetensors"):
        (tmp_path / f"a.{suffix}").touch()
        with pytest.raises(CheckpointError, match=f"a.{suffix}"):
            read_index(str(tmp_path / f"a.{suffix}"))

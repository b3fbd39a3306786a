"""Keys: sources, lengths, and that they never appear in output."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from ms_ckpt_ext.engine.files.encrypted_sink import Seal
from ms_ckpt_ext.errors import ArgumentTypeError, MissingDependencyError, StorageError, UsageError
from ms_ckpt_ext.formats.crypto import Key, backend, load_key, sniff
from ms_ckpt_ext.formats.crypto.keys import SM4_LENGTHS, as_key
from ms_ckpt_ext.formats.registry import Access

SECRET = b"S3CRET-s3cret-00"


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_key() is None
    assert load_key(SECRET).reveal() == SECRET  # type: ignore[union-attr]
    texts = [SECRET, SECRET + b"\n", b"hex:" + SECRET.hex().encode() + b"\n", b"base64:" + base64.b64encode(SECRET)]
    for text in texts:
        (tmp_path / "key").write_bytes(text)
        monkeypatch.setenv("CKPT_KEY", text.decode())
        for key in (load_key(file=str(tmp_path / "key")), load_key(env="CKPT_KEY")):
            assert key is not None and key.reveal() == SECRET


def test_raw_keys_may_end_in_any_byte(tmp_path: Path) -> None:
    raw = b"x" * 15 + b"\n"
    (tmp_path / "key").write_bytes(raw)
    assert load_key(file=str(tmp_path / "key")).reveal() == raw  # type: ignore[union-attr]


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 33, 64])
def test_lengths(length: int) -> None:
    with pytest.raises(UsageError, match=f"a key of {length} bytes"):
        load_key(b"k" * length)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="16"):
        as_key(b"k" * 32, SM4_LENGTHS)
    with pytest.raises(ArgumentTypeError, match="bytes, not str"):
        as_key("0123456789ABCDEF")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="given 2 times, by key and env"):
        load_key(SECRET, env="X")
    monkeypatch.delenv("CKPT_KEY", raising=False)
    with pytest.raises(UsageError, match="CKPT_KEY is not set"):
        load_key(env="CKPT_KEY")
    with pytest.raises(StorageError, match="key file"):
        load_key(file=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "text", [b"hex:zz" + SECRET, b"base64:!" + SECRET, SECRET + b"x", b"hex:" + SECRET[:5].hex().encode()]
)
def test_nothing_secret_shows(tmp_path: Path, text: bytes) -> None:
    """Not in a repr, and not in the whole traceback of an error about a key."""
    shown = [repr(Key(SECRET)), str(Key(SECRET)), f"{Key(SECRET)}"]
    (tmp_path / "key").write_bytes(text)
    for call in (lambda: load_key(file=str(tmp_path / "key")), lambda: as_key(text)):
        try:
            call()
        except UsageError as error:
            shown += [str(error), repr(error), "".join(traceback.format_exception(type(error), error, None))]
    assert len(shown) > 3
    assert not any("S3CRET" in item or "s3cret" in item or SECRET[:5].hex() in item for item in shown)


@pytest.mark.parametrize(
    "text", [SECRET.decode(), f"hex:{SECRET.hex()}", SECRET.hex(), "base64:UzNDUkVU", "UzNDUkVUUzNDUkVUUzNDUg=="]
)
def test_a_key_where_its_place_belongs_is_not_repeated(text: str) -> None:
    for call in (lambda: load_key(file=text), lambda: load_key(env=text), lambda: load_key(file=text.encode())):  # type: ignore[arg-type]
        with pytest.raises((UsageError, StorageError, ArgumentTypeError)) as caught:
            call()
        assert text not in "".join(traceback.format_exception(caught.type, caught.value, None))


def test_other_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        load_key(file=str(tmp_path / "absent.key"))
    for name in ("DEC_KEY", "A_NAME_OF_LETTERS_AND_24_"):
        with pytest.raises(UsageError, match=f"environment variable {name} is not set"):
            load_key(env=name)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("d85e3a7f00000000", "AES-GCM"),
        ("d95e3a7f", "AES-CBC"),
        ("da5e3a7f", "SM4-CBC"),
        ("894d53580d0a1a01", "chunked"),
        ("894d53580d0a1a02", None),
        ("0a14", None),
        ("", None),
        ("4000000000000000", None),
    ],
)
def test_sniff(head: str, name: str) -> None:
    assert sniff(bytes.fromhex(head)) == name


def test_no_plain_format_can_begin_like_a_container() -> None:
    """safetensors begins with a length of at most 100 MB; every magic, read as one, is far larger."""
    for head in ("d85e3a7f00000000", "d95e3a7f00000000", "da5e3a7f00000000", "894d53580d0a1a01"):
        assert int.from_bytes(bytes.fromhex(head), "little") > 10**9


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend._module.cache_clear()
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(MissingDependencyError, match="pip install 'cryptography>=35'"):
        backend.gcm(Key(SECRET), bytes(12), None)
    backend._module.cache_clear()


def test_importing_costs_nothing() -> None:
    """Neither cryptography nor mindspore nor numpy comes along."""
    code = (
        "import sys, ms_ckpt_ext.formats.ckpt, ms_ckpt_ext.formats.ckpt_writer, ms_ckpt_ext.formats.crypto;"
        "assert not {'cryptography', 'mindspore'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("raw", [b"0123456789ABCDE\n", b"0123456789ABCDE\r", b"0123456789ABC\n\n\n"])
@pytest.mark.parametrize("newline", [b"", b"\n", b"\r\n"])
def test_one_newline_is_dropped_and_no_more(raw: bytes, newline: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(raw + newline)
    found = load_key(file=str(tmp_path / "key"))
    assert found is not None and found.reveal() == raw


def test_a_key_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(Key(SECRET))
    assert copy.deepcopy(Key(SECRET)).reveal() == SECRET


def test_a_key_in_the_place_of_a_mode_is_not_quoted() -> None:
    for wrong in (lambda: Access(Key(SECRET), SECRET.decode()), lambda: Seal(Key(SECRET), SECRET.decode())):
        with pytest.raises(UsageError) as caught:
            wrong()
        assert SECRET.decode() not in str(caught.value)

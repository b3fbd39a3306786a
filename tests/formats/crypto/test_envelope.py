"""A few bytes encrypted as a whole: they open with their key, for what they are about, and if they are unaltered."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.errors import DecryptionError
from ms_ckpt_ext.formats.crypto import Key, envelope

keys = st.sampled_from([16, 24, 32]).flatmap(lambda length: st.binary(min_size=length, max_size=length)).map(Key)


@pytest.mark.parametrize("length", [16, 24, 32])
def test_the_format_is_the_one_that_is_written_down(length: int) -> None:
    key = bytes(range(length))
    wrapped = envelope.wrap(Key(key), b"a message", b"about")
    derived = HKDF(SHA256(), length, wrapped[:32], b"ms_ckpt_ext sealed digests v1").derive(key)
    assert AESGCM(derived).decrypt(bytes(12), wrapped[32:], b"about") == b"a message"
    assert len(wrapped) == 32 + len(b"a message") + 16


@given(keys, st.binary(max_size=300), st.binary(max_size=40))
def test_there_and_back(key: Key, plain: bytes, about: bytes) -> None:
    wrapped = envelope.wrap(key, plain, about)
    assert envelope.unwrap(key, wrapped, about) == plain
    assert envelope.wrap(key, plain, about) != wrapped


@given(keys, st.binary(max_size=60), st.integers(0, 10**6), st.integers(0, 7))
def test_an_altered_one_does_not_open(key: Key, plain: bytes, place: int, bit: int) -> None:
    wrapped = bytearray(envelope.wrap(key, plain, b"about"))
    wrapped[place % len(wrapped)] ^= 1 << bit
    with pytest.raises(DecryptionError, match="tag does not fit"):
        envelope.unwrap(key, bytes(wrapped), b"about")


def test_it_opens_for_nothing_else() -> None:
    key = Key(bytes(16))
    wrapped = envelope.wrap(key, b"a message", b"about")
    for other, about in ((Key(b"x" * 16), b"about"), (Key(bytes(32)), b"about"), (key, b"about it")):
        with pytest.raises(DecryptionError):
            envelope.unwrap(other, wrapped, about)
    for length in range(len(wrapped)):
        with pytest.raises(DecryptionError):
            envelope.unwrap(key, wrapped[:length], b"about")

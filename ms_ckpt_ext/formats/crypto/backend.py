"""The only module that imports `cryptography`, and only when a cipher is really needed.

The streaming contexts (`Cipher(...).encryptor()`) are used rather than the one-shot AEAD classes: they exist in all
versions, write into buffers that are reused, and let other threads run meanwhile. Where fresh memory is expensive
this is several times faster.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Optional, Protocol

from ms_ckpt_ext.errors import MissingDependencyError
from ms_ckpt_ext.formats.crypto.keys import Key

CIPHER_BLOCK = 16
"""Bytes of a cipher block of AES and of SM4, and of a GCM tag."""
_SLACK = CIPHER_BLOCK - 1
"""Bytes that `update_into` requires behind its output, though it does not touch them."""


class Context(Protocol):
    """A running encryption or decryption."""

    def update(self, data: memoryview) -> bytes:
        """Transform some bytes."""

    def update_into(self, data: memoryview, buf: memoryview) -> int:
        """Transform some bytes into a buffer that is 15 bytes longer."""

    def finalize(self) -> bytes:
        """End it; for GCM, check the tag."""


@cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.{name}")
    except ImportError as error:
        raise MissingDependencyError(
            "encrypted checkpoints need the package `cryptography`, which cannot be imported here "
            f"({error}); install it with: pip install 'cryptography>=35'"
        ) from error


def gcm(key: Key, nonce: bytes, tag: Optional[bytes], associated: bytes = b"") -> Any:
    """An AES-GCM context: decrypting if `tag` is given, else encrypting (its tag is `context.tag` after finalize)."""
    ciphers = _module("hazmat.primitives.ciphers")
    cipher = ciphers.Cipher(ciphers.algorithms.AES(key.reveal()), ciphers.modes.GCM(nonce, tag))
    context = cipher.encryptor() if tag is None else cipher.decryptor()
    context.authenticate_additional_data(associated)
    return context


def cbc(key: Key, iv: bytes, *, sm4: bool, encrypt: bool) -> Any:
    """A CBC context without padding, for AES or SM4."""
    ciphers = _module("hazmat.primitives.ciphers")
    algorithm = _sm4() if sm4 else ciphers.algorithms.AES
    try:
        cipher = ciphers.Cipher(algorithm(key.reveal()), ciphers.modes.CBC(iv))
        return cipher.encryptor() if encrypt else cipher.decryptor()
    except _module("exceptions").UnsupportedAlgorithm as error:
        name = "SM4" if sm4 else "AES"
        raise MissingDependencyError(
            f"the OpenSSL that `cryptography` uses here was built without {name}-CBC; "
            "install a wheel of it from PyPI: pip install --force-reinstall cryptography"
        ) from error


@cache
def _sm4() -> Any:
    """The SM4 class, which newer versions of the package may keep in its `decrepit` module."""
    for place in ("hazmat.primitives.ciphers.algorithms", "hazmat.decrepit.ciphers.algorithms"):
        try:
            return getattr(importlib.import_module(f"cryptography.{place}"), "SM4")  # noqa: B009
        except (ImportError, AttributeError):
            continue
    _module("hazmat.primitives.ciphers")
    raise MissingDependencyError(
        "this version of `cryptography` has no SM4; install one from 35 on: pip install -U cryptography"
    )


def key_fits(context: Context) -> bool:
    """End a decryption: whether the tag of a GCM context fits; True where there is none."""
    try:
        context.finalize()
    except _module("exceptions").InvalidTag:
        return False
    return True


def hkdf(key: Key, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    derive = _module("hazmat.primitives.kdf.hkdf").HKDF
    sha256 = _module("hazmat.primitives.hashes").SHA256()
    out: bytes = derive(algorithm=sha256, length=length, salt=salt, info=info).derive(key.reveal())
    return out


def pour(context: Context, source: memoryview, target: memoryview) -> None:
    """Transform `source` into `target`, which is exactly as long (in CBC: whole blocks only).

    All but the last bytes go straight into place; those without slack behind them go through a copy.
    """
    direct = max(0, len(source) - _SLACK) // CIPHER_BLOCK * CIPHER_BLOCK
    if direct:
        context.update_into(source[:direct], target)
    target[direct:] = context.update(source[direct:])

"""A few bytes encrypted as a whole, for what is noted about an encrypted file: its digests.

    0   salt        32 random bytes
    32  ciphertext  as long as the plaintext
    …   tag         16 bytes

HKDF-SHA256(key, salt, info = a label) gives the AES key of this one message, as long as the user's, so the nonce may be
twelve zeros. The associated data is what the message is about: it can be opened for nothing else.
"""

from __future__ import annotations

import os

from ms_ckpt_ext.errors import DecryptionError
from ms_ckpt_ext.formats.crypto import backend
from ms_ckpt_ext.formats.crypto.keys import Key

_LABEL = b"ms_ckpt_ext sealed digests v1"
_SALT = 32
_NONCE = bytes(12)


def wrap(key: Key, plain: bytes, about: bytes) -> bytes:
    """Encrypt a message; `about` is not stored in it, and is needed to open it."""
    salt = os.urandom(_SALT)
    context = backend.gcm(_derived(key, salt), _NONCE, None, about)
    sealed: bytes = salt + context.update(plain) + context.finalize() + context.tag
    return sealed


def unwrap(key: Key, wrapped: bytes, about: bytes) -> bytes:
    """The message. Raises DecryptionError: another key, it was altered, or it is about something else."""
    salt, sealed, tag = wrapped[:_SALT], wrapped[_SALT : -backend.CIPHER_BLOCK], wrapped[-backend.CIPHER_BLOCK :]
    if len(wrapped) < _SALT + backend.CIPHER_BLOCK:
        raise DecryptionError(
            f"{len(wrapped)} bytes where an encrypted message has at least {_SALT + backend.CIPHER_BLOCK}"
        )
    context = backend.gcm(_derived(key, salt), _NONCE, tag, about)
    plain: bytes = context.update(sealed)
    if not backend.key_fits(context):
        raise DecryptionError("its tag does not fit: another key, altered, or about another file")
    return plain


def _derived(key: Key, salt: bytes) -> Key:
    return Key(backend.hkdf(key, salt, _LABEL, len(key)))

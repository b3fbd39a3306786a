"""Writing MindSpore's encrypted `.ckpt`, block by block in any order; the format is in block_table.py.

Blocks are of one length (shorter than MindSpore's own, which it reads as well), so every offset is known. IVs are
random, 16 bytes, as MindSpore's are.
"""

from __future__ import annotations

import os
import struct

from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats.crypto import BLOCK_MAGIC, GCM, SM4, backend
from ms_ckpt_ext.formats.crypto.backend import CIPHER_BLOCK, pour
from ms_ckpt_ext.formats.crypto.block_table import BLOCK_BYTES, IV_BYTES, NONCE_BYTES, TAG_BYTES
from ms_ckpt_ext.formats.crypto.keys import AES_LENGTHS, SM4_LENGTHS, Key, KeyLike, as_key

_MAGIC = {mode: magic for magic, mode in BLOCK_MAGIC.items()}


def _checked(key: KeyLike, mode: str, block: int) -> Key:
    if mode not in _MAGIC:
        raise UsageError(f"no such mode: MindSpore has {', '.join(_MAGIC)}; pass one of these")
    if not 0 < block <= BLOCK_BYTES or block % CIPHER_BLOCK:
        raise UsageError(f"a block of {block} bytes; it must be a multiple of {CIPHER_BLOCK}, at most {BLOCK_BYTES}")
    return as_key(key, SM4_LENGTHS if mode == SM4 else AES_LENGTHS)


def _header(mode: str, tag: bytes, iv: bytes, length: int) -> bytes:
    """What stands before the ciphertext of a block."""
    numbers = struct.pack("<II", 8 + IV_BYTES + length, IV_BYTES)
    return struct.pack("<I", _MAGIC[mode]) + tag + numbers + iv + struct.pack("<I", length)


class BlockSealer:
    """Encrypts the blocks of one new file, in any order and from any thread.

    Args:
        key: 16, 24 or 32 bytes, for SM4 16.
        mode: "AES-GCM", "AES-CBC" or "SM4-CBC".
        size: bytes of the whole plaintext.
        block: plaintext bytes of every block but the last.

    Attributes:
        header: what stands at the front of the file: nothing.
        count: number of blocks.
        stored_size: bytes of the whole encrypted file.
    """

    header = b""

    def __init__(self, key: KeyLike, mode: str, size: int, *, block: int = BLOCK_BYTES) -> None:
        self._key, self._mode, self._size, self._block = _checked(key, mode, block), mode, size, block
        self._front = len(_header(mode, bytes(TAG_BYTES if mode == GCM else 0), bytes(IV_BYTES), 0))
        self.count = -(-size // block)
        self.stored_size = self.offset(self.count - 1) + self.stored(self.count - 1) if size else 0

    def span(self, index: int) -> tuple[int, int]:
        """Plaintext offsets of a block, half-open."""
        return index * self._block, min(self._size, (index + 1) * self._block)

    def stored(self, index: int) -> int:
        """Bytes of a block as it lies in the file."""
        low, high = self.span(index)
        return self._front + (high - low if self._mode == GCM else ((high - low) // CIPHER_BLOCK + 1) * CIPHER_BLOCK)

    def offset(self, index: int) -> int:
        """Where a block begins in the file."""
        return index * self.stored(0)

    def seal(self, index: int, plain: memoryview, out: memoryview) -> int:
        """Encrypt block `index` with its header into the front of `out`; returns their length in bytes."""
        iv, length, front = os.urandom(IV_BYTES), self.stored(index) - self._front, self._front
        if self._mode == GCM:
            context = backend.gcm(self._key, iv[:NONCE_BYTES], None)
            pour(context, plain, out[front : front + length])
        else:
            context = backend.cbc(self._key, iv, sm4=self._mode == SM4, encrypt=True)
            whole, padding = len(plain) // CIPHER_BLOCK * CIPHER_BLOCK, length - len(plain)
            pour(context, plain[:whole], out[front : front + whole])
            out[front + whole : front + length] = context.update(bytes(plain[whole:]) + bytes([padding]) * padding)
        context.finalize()
        tag = getattr(context, "tag", b"") if self._mode == GCM else b""
        out[:front] = _header(self._mode, tag, iv, length)
        return front + length

    def unseal(self, index: int, stored: memoryview, out: memoryview) -> bool:
        """Decrypt what `seal` wrote into `out`, of the block's length; False when its tag no longer fits."""
        front, whole = self._front, len(out) // CIPHER_BLOCK * CIPHER_BLOCK
        iv = bytes(stored[front - 4 - IV_BYTES : front - 4])
        if self._mode == GCM:
            context = backend.gcm(self._key, iv[:NONCE_BYTES], bytes(stored[4 : 4 + TAG_BYTES]))
            pour(context, stored[front:], out)
        else:
            context = backend.cbc(self._key, iv, sm4=self._mode == SM4, encrypt=False)
            pour(context, stored[front : front + whole], out[:whole])
            out[whole:] = context.update(stored[front + whole :])[: len(out) - whole]
        return backend.key_fits(context)

"""Writing MindSpore's encrypted `.ckpt`, as a stream or block by block in any order; the format is in block_table.py.

As a stream: a block's header holds its tag and length, so the ciphertext of one block (64 MiB) is collected in a buffer
that is reused, and written with its header when the block is full. IVs are random, 16 bytes, as MindSpore's are.

In any order: with blocks of one length (shorter than MindSpore's own, which it reads as well) every offset is known.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, Optional, Protocol, Union

from ms_ckpt_ext.errors import UsageError, storage_error
from ms_ckpt_ext.formats.crypto import BLOCK_MAGIC, GCM, SM4, backend
from ms_ckpt_ext.formats.crypto.backend import CIPHER_BLOCK, pour
from ms_ckpt_ext.formats.crypto.block_table import BLOCK_BYTES, IV_BYTES, NONCE_BYTES, TAG_BYTES
from ms_ckpt_ext.formats.crypto.keys import AES_LENGTHS, SM4_LENGTHS, Key, KeyLike, as_key
from ms_ckpt_ext.formats.crypto.units import PIECE
from ms_ckpt_ext.storage import linux
from ms_ckpt_ext.storage.reader import ByteReader

_MAGIC = {mode: magic for magic, mode in BLOCK_MAGIC.items()}


class EncryptingWriter:
    """Takes plaintext in order and writes MindSpore's blocks to a binary file object, which stays open.

    `finish` (or leaving the `with` block without an error) writes the last block; without it the file is incomplete.

    Args:
        sink: where the blocks go; only its `write` is used.
        key: 16, 24 or 32 bytes, for SM4 16.
        mode: "AES-GCM" (authenticated; prefer it), "AES-CBC" or "SM4-CBC".
        block: plaintext bytes of a block; only tests change the default.

    Raises:
        UsageError: no such mode, or a key of the wrong length.
    """

    def __init__(self, sink: BinaryIO, key: KeyLike, mode: str = GCM, *, block: int = BLOCK_BYTES) -> None:
        self._sink = sink
        self._key = _checked(key, mode, block)
        self._mode = mode
        self._most = block
        self._sealed = linux.scratch(block + CIPHER_BLOCK)
        self._filled = 0
        self._rest = b""
        self._context: Optional[backend.Context] = None
        self._iv = b""
        self._finished = False

    def write(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """Encrypt more plaintext; returns its length in bytes. Raises StorageError when the sink does not take it."""
        if self._finished:
            raise UsageError("this encrypted file is finished; open a new one")
        source = memoryview(data).cast("B")
        while len(source):
            part = source[: min(len(source), self._most - self._filled - len(self._rest))]
            self._add(part)
            source = source[len(part) :]
            if self._filled + len(self._rest) == self._most:
                self._flush()
        return memoryview(data).nbytes

    def finish(self) -> None:
        """Write the last block. The sink is not closed."""
        if self._filled or self._rest:
            self._flush()
        self._finished = True

    def __enter__(self) -> EncryptingWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()

    def _add(self, part: memoryview) -> None:
        """Encrypt a part of one block; up to 15 bytes that fill no cipher block wait in `_rest`."""
        if self._context is None:
            self._begin()
        if self._rest:
            taken = min(CIPHER_BLOCK - len(self._rest), len(part))
            self._rest += bytes(part[:taken])
            part = part[taken:]
            if len(self._rest) == CIPHER_BLOCK:
                self._encrypt(memoryview(self._rest))
                self._rest = b""
        whole = len(part) // CIPHER_BLOCK * CIPHER_BLOCK
        self._encrypt(part[:whole])
        self._rest += bytes(part[whole:])

    def _begin(self) -> None:
        self._iv = os.urandom(IV_BYTES)
        self._filled = 0
        if self._mode == GCM:
            self._context = backend.gcm(self._key, self._iv[:NONCE_BYTES], None)
        else:
            self._context = backend.cbc(self._key, self._iv, sm4=self._mode == SM4, encrypt=True)

    def _encrypt(self, data: memoryview) -> None:
        """Encrypt whole cipher blocks, or the end of a GCM block, and append them to the buffer."""
        assert self._context is not None
        stop = self._filled + len(data)
        for low in range(self._filled, stop, PIECE):
            high = min(low + PIECE, stop)
            target = self._sealed[low:high]
            pour(self._context, data[low - self._filled : high - self._filled], target)
        self._filled = stop

    def _flush(self) -> None:
        """End the block and write it."""
        assert self._context is not None
        rest, self._rest = self._rest, b""
        if self._mode != GCM:
            rest += bytes([CIPHER_BLOCK - len(rest)]) * (CIPHER_BLOCK - len(rest))
        self._encrypt(memoryview(rest))
        self._context.finalize()
        tag = getattr(self._context, "tag", b"") if self._mode == GCM else b""
        self._emit(_header(self._mode, tag, self._iv, self._filled))
        self._emit(self._sealed[: self._filled])
        self._context, self._filled = None, 0

    def _emit(self, data: Union[bytes, memoryview]) -> None:
        write_all(self._sink, data)


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


def write_all(sink: BinaryIO, data: Union[bytes, memoryview]) -> None:
    """Write all of `data`, even to an unbuffered file, which may take less at a time."""
    view = memoryview(data)
    try:
        while len(view):
            view = view[sink.write(view) :]
    except OSError as error:
        raise storage_error("write to", str(getattr(sink, "name", "the encrypted file")), error) from error


class Writer(Protocol):
    """Either of the two encrypting writers."""

    def write(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """Encrypt more plaintext."""


def encrypt_all(reader: ByteReader, writer: Writer) -> None:
    """Pass the whole of a plain file through an encrypting writer, in bounded memory; the caller calls `finish`."""
    buffer = linux.scratch(min(PIECE, reader.size))
    for offset in range(0, reader.size, PIECE):
        part = buffer[: min(PIECE, reader.size - offset)]
        reader.read_into(offset, part)
        writer.write(part)

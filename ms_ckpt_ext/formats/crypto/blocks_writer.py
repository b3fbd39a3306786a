"""Writing MindSpore's encrypted `.ckpt` as a stream; the format is in blocks.py.

A block's header holds its tag and length, so the ciphertext of one block (64 MiB) is collected in a buffer that is
reused, and written with its header when the block is full. IVs are random, 16 bytes, as MindSpore's are.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, Optional, Protocol, Union

import numpy as np

from ms_ckpt_ext.errors import UsageError, storage_error
from ms_ckpt_ext.formats.crypto import backend
from ms_ckpt_ext.formats.crypto.backend import BLOCK, pour
from ms_ckpt_ext.formats.crypto.blocks import BLOCK_BYTES, IV_BYTES, NONCE_BYTES
from ms_ckpt_ext.formats.crypto.keys import AES_LENGTHS, SM4_LENGTHS, KeyLike, as_key
from ms_ckpt_ext.formats.crypto.sniff import BLOCK_MAGIC, GCM, SM4
from ms_ckpt_ext.formats.crypto.units import PIECE
from ms_ckpt_ext.storage.reader import ByteReader

_MAGIC = {mode: magic for magic, mode in BLOCK_MAGIC.items()}


class EncryptingWriter:
    """Takes plaintext in order and writes MindSpore's blocks to a binary file object, which stays open.

    `finish` (or leaving the `with` block without an error) writes the last block; without it the file is incomplete.

    Args:
        sink: where the blocks go; only its `write` is used.
        key: 16, 24 or 32 bytes, for SM4 16.
        mode: "AES-GCM" (authenticated; prefer it), "AES-CBC" or "SM4-CBC".
        block: plaintext bytes of a block; other than the default only in tests.

    Raises:
        UsageError: no such mode, or a key of the wrong length.
    """

    def __init__(self, sink: BinaryIO, key: KeyLike, mode: str = GCM, *, block: int = BLOCK_BYTES) -> None:
        if mode not in _MAGIC:
            raise UsageError(f"no mode {mode!r}: MindSpore has {', '.join(_MAGIC)}; pass one of these")
        if block <= 0 or block % BLOCK:
            raise UsageError(f"a block of {block} bytes; it must be a multiple of {BLOCK}")
        self._sink = sink
        self._key = as_key(key, SM4_LENGTHS if mode == SM4 else AES_LENGTHS)
        self._mode = mode
        self._most = block
        self._sealed = np.empty(block + BLOCK, np.uint8)  # numpy asks for huge pages, and touches none before its use
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
            taken = min(BLOCK - len(self._rest), len(part))
            self._rest += bytes(part[:taken])
            part = part[taken:]
            if len(self._rest) == BLOCK:
                self._encrypt(memoryview(self._rest))
                self._rest = b""
        whole = len(part) // BLOCK * BLOCK
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
        """Encrypt whole cipher blocks, or the end of a GCM block, behind what the buffer holds."""
        assert self._context is not None
        stop = self._filled + len(data)
        for low in range(self._filled, stop, PIECE):
            high = min(low + PIECE, stop)
            target = memoryview(self._sealed)[low:high]
            pour(self._context, data[low - self._filled : high - self._filled], target)
        self._filled = stop

    def _flush(self) -> None:
        """End the block and write it."""
        assert self._context is not None
        rest, self._rest = self._rest, b""
        if self._mode != GCM:
            rest += bytes([BLOCK - len(rest)]) * (BLOCK - len(rest))
        self._encrypt(memoryview(rest))
        self._context.finalize()
        tag = getattr(self._context, "tag", b"") if self._mode == GCM else b""
        header = struct.pack("<I", _MAGIC[self._mode]) + tag
        header += struct.pack("<II", 8 + IV_BYTES + self._filled, IV_BYTES) + self._iv
        self._emit(header + struct.pack("<I", self._filled))
        self._emit(memoryview(self._sealed)[: self._filled])
        self._context, self._filled = None, 0

    def _emit(self, data: Union[bytes, memoryview]) -> None:
        write_all(self._sink, data)


def write_all(sink: BinaryIO, data: Union[bytes, memoryview]) -> None:
    """Write all of `data`, also to an unbuffered file, which may take less at once."""
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
    """Pass the whole of a plain file through an encrypting writer, in bounded memory; `finish` is the caller's."""
    buffer = memoryview(bytearray(min(PIECE, reader.size)))
    for offset in range(0, reader.size, PIECE):
        part = buffer[: min(PIECE, reader.size - offset)]
        reader.read_into(offset, part)
        writer.write(part)

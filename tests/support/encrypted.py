"""Encrypted files out of plaintext, in units of any length, by the sealers that jobs write with."""

from __future__ import annotations

import io
from typing import BinaryIO, Union

from ms_ckpt_ext.formats.crypto import GCM, BlockSealer, Sealer
from ms_ckpt_ext.formats.crypto.block_table import BLOCK_BYTES
from ms_ckpt_ext.formats.crypto.container import CHUNK


def in_blocks(plain: bytes, key: bytes, mode: str = GCM, *, block: int = BLOCK_BYTES) -> bytes:
    """In MindSpore's blocks."""
    sink = io.BytesIO()
    write_sealed(BlockSealer(key, mode, len(plain), block=block), plain, sink)
    return sink.getvalue()


def in_chunks(plain: bytes, key: bytes, *, chunk: int = CHUNK) -> bytes:
    """In the chunked container."""
    sink = io.BytesIO()
    write_sealed(Sealer(key, len(plain), chunk=chunk), plain, sink)
    return sink.getvalue()


def write_sealed(units: Union[BlockSealer, Sealer], plain: bytes, sink: BinaryIO) -> None:
    """Write a whole encrypted file, a unit at a time."""
    sink.write(units.header)
    out = memoryview(bytearray(units.stored(0) if units.count else 0))
    for index in range(units.count):
        low, high = units.span(index)
        length = units.seal(index, memoryview(plain)[low:high], out)
        assert length == units.stored(index)
        assert sink.tell() == units.offset(index)
        sink.write(out[:length])
    assert sink.tell() == units.stored_size

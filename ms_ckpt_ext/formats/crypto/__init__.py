"""Encryption: MindSpore's own block format for `.ckpt`, and a chunked container for everything else.

    keys             where keys come from; they are never shown
    block_table      where MindSpore's blocks lie in a file
    blocks           DecryptingReader: MindSpore's AES-GCM, AES-CBC, SM4-CBC, at plaintext offsets
    blocks_writer    BlockSealer: the same, written block by block
    container        ChunkedReader: authenticated, slices decrypt on their own
    container_writer Sealer: the same, written chunk by chunk
    units            the reader that both authenticated formats share
    envelope         a few bytes encrypted as a whole: the digests of an encrypted file
    backend          the only module that imports `cryptography`, when it is needed

The first bytes of a file show which container it is. A safetensors file begins with the length of its header, at most
100 MB in eight little-endian bytes, a `.ckpt` with 0x0a; so neither can begin with one of the magics here.

Importing this package costs nothing: the module of a container is imported when one is met, `cryptography` when
something is encrypted or decrypted.
"""

from __future__ import annotations

import importlib
import struct
from typing import TYPE_CHECKING, Any, Optional, Union

from ms_ckpt_ext.errors import DecryptionError
from ms_ckpt_ext.storage.reader import ByteReader

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.crypto.blocks import DecryptingReader, keep_checksums
    from ms_ckpt_ext.formats.crypto.blocks_writer import BlockSealer
    from ms_ckpt_ext.formats.crypto.container import ChunkedReader
    from ms_ckpt_ext.formats.crypto.container_writer import Sealer
    from ms_ckpt_ext.formats.crypto.keys import Key, KeyLike, load_key

GCM, CBC, SM4 = "AES-GCM", "AES-CBC", "SM4-CBC"
"""MindSpore's names for its block formats, as in `enc_mode` and `dec_mode`."""
CHUNKED = "chunked"
"""The container of this package, see container.py."""

BLOCK_MAGIC = {0x7F3A5ED8: GCM, 0x7F3A5ED9: CBC, 0x7F3A5EDA: SM4}
"""First four bytes, little-endian, of every block that MindSpore encrypts."""
CHUNK_MAGIC = b"\x89MSX\r\n\x1a\x01"
"""As PNG's: it is not text, and is damaged by anything that takes it for text. Read as a length it is 8e16."""

SNIFF_BYTES = 8
"""How many first bytes `sniff` needs."""

_LATE = {
    "BlockSealer": "blocks_writer",
    "ChunkedReader": "container",
    "DecryptingReader": "blocks",
    "Key": "keys",
    "KeyLike": "keys",
    "Sealer": "container_writer",
    "keep_checksums": "blocks",
    "load_key": "keys",
}

__all__ = [
    "BLOCK_MAGIC",
    "CHUNK_MAGIC",
    "CBC",
    "CHUNKED",
    "GCM",
    "SNIFF_BYTES",
    "SM4",
    "BlockSealer",
    "ChunkedReader",
    "DecryptingReader",
    "Key",
    "KeyLike",
    "Sealer",
    "decrypting_reader",
    "key_fingerprint",
    "keep_checksums",
    "load_key",
    "sniff",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)


def sniff(head: bytes) -> Optional[str]:
    """Name of the encrypted container that begins with `head`: a MindSpore mode, "chunked", or None.

    >>> sniff(bytes.fromhex("d85e3a7f") + bytes(4))
    'AES-GCM'
    >>> sniff(b"\\n\\x14\\n\\x01w") is None
    True
    """
    if head.startswith(CHUNK_MAGIC):
        return CHUNKED
    return BLOCK_MAGIC.get(struct.unpack_from("<I", head)[0]) if len(head) >= 4 else None


def key_fingerprint(key: Key, label: bytes) -> str:
    """Hexadecimal digits that distinguish keys and reveal nothing about them: HKDF-SHA256 of the key."""
    from ms_ckpt_ext.formats.crypto import backend

    return backend.hkdf(key, b"", label, 16).hex()


def decrypting_reader(
    reader: ByteReader, key: KeyLike, mode: Optional[str] = None, *, cache_bytes: Optional[int] = None
) -> Union[DecryptingReader, ChunkedReader]:
    """The reader that shows the plaintext of an encrypted file, whichever container it is.

    Args:
        reader: the file as it lies on disk; closed with the result, and left open by an error here.
        key: the key that it was saved with.
        mode: the container that is expected ("AES-GCM", "AES-CBC", "SM4-CBC", "chunked"), or None for any.
        cache_bytes: most memory for units that are read in part, at least one of them; None for the reader's default.

    Raises:
        DecryptionError: not encrypted, another container, or a wrong key.
    """
    from ms_ckpt_ext.formats.crypto import blocks, container

    head = bytearray(min(SNIFF_BYTES, reader.size))
    reader.read_into(0, memoryview(head))
    if sniff(bytes(head)) != CHUNKED:
        return blocks.DecryptingReader(reader, key, mode, cache_bytes=cache_bytes or blocks.BLOCK_CACHE_BYTES)
    if mode not in (None, CHUNKED):
        raise DecryptionError(f"{reader.path!r} is a {CHUNKED} container, not {mode}; pass mode {CHUNKED!r} or None")
    return container.ChunkedReader(reader, key, cache_bytes=cache_bytes or container.CHUNK_CACHE_BYTES)

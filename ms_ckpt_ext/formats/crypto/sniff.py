"""Which encrypted container a file is, by its first bytes.

A safetensors file begins with the length of its header, at most 100 MB in eight little-endian bytes; a `.ckpt` with
0x0a; so neither can begin with one of these magics.
"""

from __future__ import annotations

import struct
from typing import Optional

GCM, CBC, SM4 = "AES-GCM", "AES-CBC", "SM4-CBC"
"""MindSpore's names of its block formats, as in `enc_mode` and `dec_mode`."""
CHUNKED = "chunked"
"""The container of this package, see container.py."""

BLOCK_MAGIC = {0x7F3A5ED8: GCM, 0x7F3A5ED9: CBC, 0x7F3A5EDA: SM4}
"""First four bytes, little-endian, of every block that MindSpore encrypts."""
CHUNK_MAGIC = b"\x89MSX\r\n\x1a\x01"
"""As PNG does it: not text, and damaged by anything that takes it for text. Read as a length it is 8e16."""

SNIFF_BYTES = 8
"""How many first bytes `sniff` wants."""


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


def is_encrypted(head: bytes) -> bool:
    """Whether a file that begins with `head` (8 bytes suffice) is one of the encrypted containers."""
    return sniff(head) is not None

"""The blocks of MindSpore's encrypted `.ckpt`: where each lies, and what decrypts it.

The plaintext is cut into blocks of 64 MiB, each encrypted on its own (mindspore/core/utils/crypto.cc). Every block,
all numbers u32 little-endian:

    magic           which mode, see `BLOCK_MAGIC`
    tag             16 bytes, AES-GCM only
    block length    8 + IV length + ciphertext length
    IV length       16
    IV              GCM uses the first 12 bytes of it only
    cipher length
    ciphertext      GCM: as long as the plaintext; CBC: padded to 16 bytes (PKCS #7)

Headers are walked one by one. In CBC the last two cipher blocks of each block are read as well, for the padding gives
the length of the plaintext, and an invalid one means that the key is wrong.

`save_checkpoint(enc_key=…, crc_check=True)` appends an unencrypted `crc_num` and ten zeros, which MindSpore itself
then refuses to decrypt. Such a tail is recognised and skipped here. Both read a checksum inside the plaintext.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple, Optional

from ms_ckpt_ext.errors import DecryptionError, FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats.crypto import BLOCK_MAGIC, GCM, SM4, backend
from ms_ckpt_ext.formats.crypto.backend import CIPHER_BLOCK
from ms_ckpt_ext.formats.crypto.keys import Key
from ms_ckpt_ext.storage.reader import ByteReader

BLOCK_BYTES = 64 << 20
"""Plaintext of a full block: MindSpore's ENCRYPT_BLOCK_SIZE, 64 * 1024 KiB."""
IV_BYTES = 16
NONCE_BYTES = 12
"""How much of a GCM block's IV is used: MindSpore stores 16 random bytes and leaves OpenSSL at its default of 12."""
TAG_BYTES = 16
_U32 = struct.Struct("<I")
_PER_BLOCK = 450
"""Bytes of Python objects per block in the table, as measured."""
_STRAY_TAIL = 17
"""Length of the unencrypted checksum tail that MindSpore appends by mistake."""


class CipherBlock(NamedTuple):
    """One block: plaintext offsets, where its ciphertext lies, and what decrypts it."""

    start: int
    stop: int
    offset: int
    length: int
    iv: bytes
    tag: bytes


def wrong_key(path: str, offset: int, mode: str) -> DecryptionError:
    """The error for a block whose tag, padding or first bytes make no sense."""
    return DecryptionError(
        f"{path!r}: the {mode} block at byte {offset} does not decrypt: the key is wrong, or the file was altered; "
        "check that the key is the one it was saved with, byte for byte, then restore the file from a copy"
    )


def block_mode(reader: ByteReader, wanted: Optional[str]) -> str:
    """The mode that the file states, which must be the wanted one if one is given."""
    if wanted is not None and wanted not in BLOCK_MAGIC.values():
        raise UsageError(f"no such mode: MindSpore has {', '.join(BLOCK_MAGIC.values())}; pass one of these")
    if reader.size < _U32.size:
        raise TruncatedFileError(f"{reader.path!r} has {reader.size} bytes, too few for an encrypted checkpoint")
    found = BLOCK_MAGIC.get(_u32(reader, 0))
    if found is None:
        raise DecryptionError(
            f"{reader.path!r} is not encrypted by MindSpore: it begins with 0x{_u32(reader, 0):08x}; "
            "load it without a key, or check the path"
        )
    if wanted not in (None, found):
        raise DecryptionError(f"{reader.path!r} is encrypted with {found}, not {wanted}; pass dec_mode={found!r}")
    return found


def block_table(reader: ByteReader, mode: str, key: Key, budget: int) -> tuple[CipherBlock, ...]:
    return tuple(_walk(reader, mode, key, budget))


def _walk(reader: ByteReader, mode: str, key: Key, budget: int) -> Iterator[CipherBlock]:
    """Every block of a file of one mode, by its headers alone (and in CBC by its padding)."""
    offset = start = count = 0
    while offset < reader.size and not (offset and _is_stray_tail(reader, offset)):
        count += 1
        if count * _PER_BLOCK > reader.size + budget:
            raise FormatError(
                f"{reader.path!r}: {count} {mode} blocks up to byte {offset}, far more than a file of {reader.size} "
                f"bytes can need, for a block holds up to {BLOCK_BYTES} bytes. Do not trust this file: restore it, or "
                "choose another one"
            )
        block = _header(reader, offset, start, mode)
        if mode != GCM:
            padding = _padding(reader, block, key, mode)
            block = block._replace(stop=block.stop - padding)
        yield block
        offset, start = block.offset + block.length, block.stop


def _header(reader: ByteReader, offset: int, start: int, mode: str) -> CipherBlock:
    """The block whose header is at `offset`, with its padding."""
    tagged = TAG_BYTES if mode == GCM else 0
    width = 4 * _U32.size + tagged + IV_BYTES
    if offset + width > reader.size:
        raise TruncatedFileError(
            f"{reader.path!r} ends at byte {reader.size}, inside the header of the {mode} block at byte {offset}; "
            "restore it or choose another checkpoint"
        )
    raw = bytearray(width)
    reader.read_into(offset, memoryview(raw))
    magic, whole, iv_length = (_U32.unpack_from(raw, at)[0] for at in (0, 4 + tagged, 8 + tagged))
    length = _U32.unpack_from(raw, 12 + tagged + IV_BYTES)[0]
    _check(reader, offset, mode, (BLOCK_MAGIC.get(magic), whole, iv_length, length))
    if offset + width + length > reader.size:
        raise TruncatedFileError(
            f"{reader.path!r}: the {mode} block at byte {offset} should end at byte {offset + width + length}, "
            f"but the file ends at {reader.size}; restore it or choose another checkpoint"
        )
    iv = bytes(raw[12 + tagged : 12 + tagged + IV_BYTES])
    return CipherBlock(start, start + length, offset + width, length, iv, bytes(raw[4 : 4 + tagged]))


def _check(reader: ByteReader, offset: int, mode: str, header: tuple[Optional[str], int, int, int]) -> None:
    """Raise unless the numbers of a block header agree with each other and with MindSpore's limits."""
    found, whole, iv_length, length = header
    most = BLOCK_BYTES if mode == GCM else BLOCK_BYTES + CIPHER_BLOCK
    agrees = iv_length == IV_BYTES and whole == 2 * _U32.size + iv_length + length
    fits = 0 < length <= most and (mode == GCM or length % CIPHER_BLOCK == 0)
    if found != mode or not agrees or not fits:
        raise FormatError(
            f"{reader.path!r}: no {mode} block at byte {offset}: mode {found}, block length {whole}, IV length "
            f"{iv_length}, cipher length {length}; the file is damaged: restore it or choose another checkpoint"
        )


def _padding(reader: ByteReader, block: CipherBlock, key: Key, mode: str) -> int:
    """Length of a CBC block's padding, from its last 16 bytes."""
    sealed = bytearray(min(2 * CIPHER_BLOCK, block.length))
    reader.read_into(block.offset + block.length - len(sealed), memoryview(sealed))
    iv = bytes(sealed[:CIPHER_BLOCK]) if len(sealed) > CIPHER_BLOCK else block.iv
    context = backend.cbc(key, iv, sm4=mode == SM4, encrypt=False)
    last: bytes = context.update(bytes(sealed[-CIPHER_BLOCK:]))
    count = last[-1]
    if not 0 < count <= CIPHER_BLOCK or last[-count:] != bytes([count]) * count:
        raise wrong_key(reader.path, block.offset, mode)
    return count


def _is_stray_tail(reader: ByteReader, offset: int) -> bool:
    if reader.size - offset != _STRAY_TAIL:
        return False
    mark = bytearray(7)
    reader.read_into(offset, memoryview(mark))
    return mark == b"crc_num"


def _u32(reader: ByteReader, offset: int) -> int:
    raw = bytearray(_U32.size)
    reader.read_into(offset, memoryview(raw))
    number: int = _U32.unpack(raw)[0]
    return number

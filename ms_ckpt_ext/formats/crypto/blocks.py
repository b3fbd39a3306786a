"""MindSpore's encrypted `.ckpt`, read in place.

The plaintext is cut into blocks of 64 MiB, each encrypted on its own (mindspore/core/utils/crypto.cc). Every block,
all numbers u32 little-endian:

    magic           which mode, see sniff.BLOCK_MAGIC
    tag             16 bytes, AES-GCM only
    block length    8 + IV length + ciphertext length
    IV length       16
    IV              GCM uses the first 12 bytes of it only
    cipher length
    ciphertext      GCM: as long as the plaintext; CBC: padded to 16 bytes (PKCS #7)

1. Walk the headers: that gives the table of blocks. In CBC the last two cipher blocks of each are decrypted as well,
   for the padding says how long the plaintext is, and nonsense there says that the key is wrong.
2. GCM: a block is decrypted whole, for nothing in it may be believed before its tag was checked; see units.py.
   CBC: any 16 bytes can be decrypted with the 16 cipher bytes before them as IV, so just what is asked is read.

CBC has no authentication. A wrong key is noticed (padding and the first byte of a checkpoint: all but 1 in 65,000);
altered contents are not, unless the plaintext has a CRC tail. Prefer AES-GCM.

GCM blocks are authentic one by one, and nothing ties them to their place or their file: blocks that change places
decrypt. A CRC tail in the plaintext, out of reach without the key, finds that: `crc32` reads it off the blocks.

`save_checkpoint(enc_key=…, crc_check=True)` appends an unencrypted `crc_num` and ten zeros, which MindSpore itself
then refuses to decrypt. Such a tail is recognised and skipped here. A checksum inside the plaintext is read by both.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple, Optional, Union

from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import DecryptionError, FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats.checksum import combine, crc_of
from ms_ckpt_ext.formats.crypto import BLOCK_MAGIC, GCM, SM4, backend
from ms_ckpt_ext.formats.crypto.backend import CIPHER_BLOCK, pour
from ms_ckpt_ext.formats.crypto.keys import AES_LENGTHS, SM4_LENGTHS, Key, KeyLike, as_key
from ms_ckpt_ext.formats.crypto.units import PIECE, STREAMED, Sealed, UnitReader, require_range, thread_scratch, unseal
from ms_ckpt_ext.formats.index import BUDGET
from ms_ckpt_ext.storage.reader import ByteReader, Take, Traits

BLOCK_BYTES = 64 << 20
"""Plaintext of a full block: MindSpore's ENCRYPT_BLOCK_SIZE, 64 * 1024 KiB."""
IV_BYTES = 16
NONCE_BYTES = 12
"""How much of a GCM block's IV is used: MindSpore stores 16 random bytes and leaves OpenSSL at its default of 12."""
TAG_BYTES = 16
_U32 = struct.Struct("<I")
_PER_BLOCK = 450
"""Bytes of objects that a block becomes in the table, as measured."""
_STRAY_TAIL = 17
"""Length of the unencrypted checksum tail that MindSpore appends by mistake."""

BLOCK_CACHE_BYTES = 3 * BLOCK_BYTES
"""Default memory for decrypted GCM blocks: the one in use, and one on either side of a boundary."""


class _Block(NamedTuple):
    """One block: plaintext offsets, where its ciphertext lies, and what decrypts it."""

    start: int
    stop: int
    offset: int
    length: int
    iv: bytes
    tag: bytes


class DecryptingReader:
    """A ByteReader of the plaintext of an encrypted `.ckpt`, at plaintext offsets.

    Args:
        reader: the encrypted file; closed with this one.
        key: 16, 24 or 32 bytes, for SM4 16.
        mode: "AES-GCM", "AES-CBC", "SM4-CBC", or None to take what the file says.
        cache_bytes: most memory for decrypted GCM blocks; at least one block.
        expect: first bytes of the plaintext, by which a wrong key is told in CBC; a `.ckpt` begins with 0x0a.
        budget: bytes of memory that the table of blocks may take beyond the size of the file.
        piece_bytes: most bytes that `stream` hands over at once.

    Raises:
        DecryptionError: the file is not encrypted in this mode, or the key is wrong.
        UsageError: no such mode, or a key of the wrong length. `reader` stays open then, as after every error here.
        FormatError, TruncatedFileError: the blocks are damaged.
        MissingDependencyError: `cryptography` is not installed.
    """

    fd: Optional[int] = None

    def __init__(
        self,
        reader: ByteReader,
        key: KeyLike,
        mode: Optional[str] = None,
        *,
        cache_bytes: int = BLOCK_CACHE_BYTES,
        expect: bytes = b"\n",
        budget: int = BUDGET,
        piece_bytes: int = STREAMED,
    ) -> None:
        self.mode = _mode(reader, mode)
        secret = as_key(key, SM4_LENGTHS if self.mode == SM4 else AES_LENGTHS)
        self.path = reader.path
        self.disk_size = reader.disk_size
        self.mtime_ns = reader.mtime_ns
        self._inner: Union[UnitReader, _CbcReader]
        if self.mode == GCM:
            self._units = _GcmBlocks(reader, secret, budget)
            self._inner = UnitReader(reader, self._units, cache_bytes, self.mode, piece_bytes)
        else:
            self._inner = _CbcReader(reader, secret, self.mode, budget)
        self.size = self._inner.size
        self.traits = self._inner.traits._replace(crc32=self.crc32)
        if self.mode != GCM:
            self._require_start(expect)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with plaintext from `offset`. Raises as the constructor does."""
        self._inner.read_into(offset, buffer)

    def stream(self, offset: int, length: int, take: Take) -> None:
        """As `UnitReader.stream`, for AES-GCM."""
        assert isinstance(self._inner, UnitReader)
        self._inner.stream(offset, length, take)

    def keep_checksums(self) -> None:
        """From now on note the CRC-32 of every GCM block that is decrypted: `crc32` need not decrypt it again."""
        if self.mode == GCM:
            self._units.checksums = {}

    def crc32(self, stop: int) -> int:
        """CRC-32 of the plaintext up to `stop`: put together from those of blocks, where they are kept."""
        known = self._units.checksums if self.mode == GCM else None
        crc = start = 0
        if known is not None:
            for number, end in enumerate(self._units.ends):
                if end > stop:
                    break
                if number not in known:
                    self.read_into(start, memoryview(bytearray(1)))  # decrypts all of the block
                crc, start = combine(crc, known[number], end - start), end
        rest = crc_of(self, [Extent(start, stop - start)])
        return combine(crc, rest, stop - start)

    def close(self) -> None:
        """Release the file and forget the plaintext."""
        self._inner.close()

    def __enter__(self) -> DecryptingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_start(self, expect: bytes) -> None:
        head = bytearray(min(len(expect), self.size))
        self.read_into(0, memoryview(head))
        if not expect.startswith(bytes(head)):
            raise wrong_key(self.path, 0, self.mode)


def keep_checksums(reader: ByteReader) -> None:
    """`DecryptingReader.keep_checksums` of a reader of MindSpore's blocks."""
    assert isinstance(reader, DecryptingReader)
    reader.keep_checksums()


class _GcmBlocks:
    """The blocks of an AES-GCM file as units of a `UnitReader`."""

    def __init__(self, base: ByteReader, key: Key, budget: int) -> None:
        self._base = base
        self._key = key
        self._blocks = _table(base, GCM, key, budget)
        self._starts = [block.start for block in self._blocks]
        self.ends = [block.stop for block in self._blocks]
        self.checksums: Optional[dict[int, int]] = None
        self.size = self._blocks[-1].stop
        self.largest = max(block.length for block in self._blocks)

    def find(self, offset: int) -> int:
        """Number of the block that holds plaintext byte `offset`."""
        return bisect_right(self._starts, offset) - 1

    def span(self, unit: int) -> tuple[int, int]:
        """Plaintext offsets of a block."""
        return self._blocks[unit].start, self._blocks[unit].stop

    def decrypt(self, first: int, stop: int, out: memoryview) -> None:
        """Decrypt whole blocks; their ciphertext passes through a small buffer."""
        for number in range(first, stop):
            sealed = self.sealed(number)
            plain, out = out[: sealed.length], out[sealed.length :]
            for _ in unseal(self._base, sealed, (plain[at : at + PIECE] for at in range(0, len(plain), PIECE))):
                pass
            if self.checksums is not None and number not in self.checksums:
                self.checksums[number] = zlib.crc32(plain)

    def sealed(self, unit: int) -> Sealed:
        """A block that is to be decrypted by `unseal`."""
        block = self._blocks[unit]
        context = backend.gcm(self._key, block.iv[:NONCE_BYTES], block.tag)
        return Sealed(block.offset, block.length, context, lambda: wrong_key(self._base.path, block.offset, GCM))


class _CbcReader:
    """Plaintext ranges of an AES-CBC or SM4-CBC file, without a cache: no more is decrypted than is asked."""

    def __init__(self, base: ByteReader, key: Key, mode: str, budget: int) -> None:
        self.path = base.path
        self._base = base
        self._key = key
        self._sm4 = mode == SM4
        self.traits = Traits(mode)
        self._blocks = _table(base, mode, key, budget)
        self._starts = [block.start for block in self._blocks]
        self.size = self._blocks[-1].stop
        self._closed = False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with plaintext from `offset`."""
        require_range(self.path, self.size, offset, len(buffer), self._closed)
        done = 0
        while done < len(buffer):
            block = self._blocks[bisect_right(self._starts, offset + done) - 1]
            low = offset + done - block.start
            length = min(len(buffer) - done, block.stop - block.start - low, PIECE)
            self._range(block, low, buffer[done : done + length])
            done += length

    def _range(self, block: _Block, low: int, out: memoryview) -> None:
        """Decrypt `out` from byte `low` of a block on: whole cipher blocks around it, and the one before as IV."""
        skip = low % CIPHER_BLOCK
        first = low - skip
        length = -(-(skip + len(out)) // CIPHER_BLOCK) * CIPHER_BLOCK
        before = CIPHER_BLOCK if first else 0
        sealed = thread_scratch(before + length)
        self._base.read_into(block.offset + first - before, sealed)
        iv = bytes(sealed[:before]) if before else block.iv
        context = backend.cbc(self._key, iv, sm4=self._sm4, encrypt=False)
        if length == len(out):
            pour(context, sealed[before:], out)
        else:
            out[:] = memoryview(context.update(sealed[before:]))[skip : skip + len(out)]

    def close(self) -> None:
        """Release the file."""
        self._closed = True
        self._base.close()


def wrong_key(path: str, offset: int, mode: str) -> DecryptionError:
    """The error for a block whose tag, padding or first bytes make no sense."""
    return DecryptionError(
        f"{path!r}: the {mode} block at byte {offset} does not decrypt: the key is wrong, or the file was altered; "
        "check that the key is the one it was saved with, byte for byte, then restore the file from a copy"
    )


def _mode(reader: ByteReader, wanted: Optional[str]) -> str:
    """The mode that the file says it has, which must be the wanted one if there is one."""
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


def _table(reader: ByteReader, mode: str, key: Key, budget: int) -> tuple[_Block, ...]:
    return tuple(_walk(reader, mode, key, budget))


def _walk(reader: ByteReader, mode: str, key: Key, budget: int) -> Iterator[_Block]:
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


def _header(reader: ByteReader, offset: int, start: int, mode: str) -> _Block:
    """The block whose header is at `offset`, before padding is taken off."""
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
    return _Block(start, start + length, offset + width, length, iv, bytes(raw[4 : 4 + tagged]))


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


def _padding(reader: ByteReader, block: _Block, key: Key, mode: str) -> int:
    """Length of a CBC block's padding, out of its last 16 bytes."""
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

"""MindSpore's encrypted `.ckpt`, read in place.

1. The headers give the table of blocks (`block_table`).
2. GCM: a block is decrypted whole, for nothing in it may be trusted before its tag was checked; see units.py.
   CBC: any 16 bytes can be decrypted with the 16 cipher bytes before them as IV, so only what is asked for is read.

CBC has no authentication. A wrong key is noticed (padding and the first byte of a checkpoint: all but 1 in 65,000);
altered contents are not, unless the plaintext has a CRC tail. Prefer AES-GCM.

GCM blocks are authentic one by one, but nothing ties them to their place or their file: blocks that change places still
decrypt. A CRC tail in the plaintext, out of reach without the key, detects that: `crc32` combines it from the blocks.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from typing import Optional, Union

from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.formats.checksum import combine, crc_of
from ms_ckpt_ext.formats.crypto import GCM, SM4, backend
from ms_ckpt_ext.formats.crypto.backend import CIPHER_BLOCK, pour
from ms_ckpt_ext.formats.crypto.block_table import (
    BLOCK_BYTES,
    NONCE_BYTES,
    CipherBlock,
    block_mode,
    block_table,
    wrong_key,
)
from ms_ckpt_ext.formats.crypto.keys import AES_LENGTHS, SM4_LENGTHS, Key, KeyLike, as_key
from ms_ckpt_ext.formats.crypto.units import PIECE, STREAMED, Sealed, UnitReader, require_range, thread_scratch, unseal
from ms_ckpt_ext.formats.index import BUDGET
from ms_ckpt_ext.storage.reader import ByteReader, Take, Traits

BLOCK_CACHE_BYTES = 3 * BLOCK_BYTES
"""Default memory for decrypted GCM blocks: the one in use, and one on either side of a boundary."""


class DecryptingReader:
    """A ByteReader of the plaintext of an encrypted `.ckpt`, at plaintext offsets.

    Args:
        reader: the encrypted file; closed with this one.
        key: 16, 24 or 32 bytes, for SM4 16.
        mode: "AES-GCM", "AES-CBC", "SM4-CBC", or None to take what the file says.
        cache_bytes: most memory for decrypted GCM blocks; at least one block.
        expect: first bytes of the plaintext, which reveal a wrong key in CBC; a `.ckpt` begins with 0x0a.
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
        self.mode = block_mode(reader, mode)
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
        """From now on keep the CRC-32 of every GCM block that is decrypted: `crc32` need not decrypt it again."""
        if self.mode == GCM:
            self._units.checksums = {}

    def crc32(self, stop: int) -> int:
        """CRC-32 of the plaintext up to `stop`, combined from those of blocks where they are kept."""
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
        self._blocks = block_table(base, GCM, key, budget)
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
    """Plaintext ranges of an AES-CBC or SM4-CBC file, without a cache: no more is decrypted than is asked for."""

    def __init__(self, base: ByteReader, key: Key, mode: str, budget: int) -> None:
        self.path = base.path
        self._base = base
        self._key = key
        self._sm4 = mode == SM4
        self.traits = Traits(mode)
        self._blocks = block_table(base, mode, key, budget)
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

    def _range(self, block: CipherBlock, low: int, out: memoryview) -> None:
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

"""An authenticated container whose slices decrypt on their own; used for safetensors, which MindSpore cannot encrypt.

The plaintext is any file. docs/encryption.md is the specification; in short, little-endian:

    0   magic            8 bytes
    8   version          u16, 1
    10  key length       u16: 16, 24 or 32
    12  chunk size       u32, plaintext bytes of every chunk but the last
    16  plaintext size   u64
    24  salt             32 random bytes, the identity of the file
    56  reserved         8 zeros
    64  check            32 bytes
    96  chunks           each its ciphertext and a 16-byte AES-GCM tag

1. HKDF-SHA256(key, salt, info = a label and bytes 0 to 64) gives the file's AES key and the check. So a wrong key or
   an altered header is noticed before anything is decrypted, and each file has a key of its own.
2. Chunk i is AES-GCM with nonce = i (12 bytes, big-endian) and associated data = bytes 0 to 64, i, and whether it is
   the last one. A chunk that was altered, moved, doubled, dropped or taken from another file fails its tag.
3. All chunks but the last are equally long, so every offset is known: readers decrypt what they need, writers may
   write chunks in any order. Each chunk number may be encrypted only once per file, which container_writer.py enforces.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Optional

from ms_ckpt_ext.errors import DecryptionError, FormatError, TruncatedFileError
from ms_ckpt_ext.formats.crypto import CHUNK_MAGIC, CHUNKED, backend
from ms_ckpt_ext.formats.crypto.backend import pour
from ms_ckpt_ext.formats.crypto.keys import AES_LENGTHS, Key, KeyLike, as_key
from ms_ckpt_ext.formats.crypto.units import PIECE, Sealed, UnitReader, thread_scratch
from ms_ckpt_ext.storage.reader import ByteReader

CHUNK = 1 << 20
"""Default chunk: reading a slice costs at most 2 MiB beyond it, and tags add 16 parts in a million."""
MIN_CHUNK, MAX_CHUNK = 64, 64 << 20
"""Limits of what a reader accepts, so that a forged header cannot demand much memory."""
MAX_CHUNKS = 1 << 32
"""Most chunks of a file: what NIST SP 800-38D allows for one key."""
VERSION = 1
TAG = 16
SALT = 32
CHECK = 32
_FIXED = struct.Struct("<8sHHIQ32s8x")
HEADER = _FIXED.size + CHECK
_LABEL = b"ms_ckpt_ext chunked container v1"
CHUNK_CACHE_BYTES = 32 << 20
"""Default memory for chunks that were read in part."""


@dataclass(frozen=True)
class Geometry:
    """What a header says: where everything lies.

    Raises:
        FormatError: numbers outside the format's limits.
    """

    key_length: int
    chunk: int
    size: int
    salt: bytes

    def __post_init__(self) -> None:
        fits = MIN_CHUNK <= self.chunk <= MAX_CHUNK and self.size >= 0 and self.count <= MAX_CHUNKS
        if not fits or self.key_length not in AES_LENGTHS or len(self.salt) != SALT:
            raise FormatError(
                f"not an encrypted container: key of {self.key_length} bytes, chunks of {self.chunk} bytes "
                f"({MIN_CHUNK} to {MAX_CHUNK} are allowed), {self.size} bytes of plaintext in {self.count} of them "
                f"(at most {MAX_CHUNKS})"
            )

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.size // max(1, self.chunk))

    @property
    def stored_size(self) -> int:
        """Bytes of the whole encrypted file."""
        return HEADER + self.size + TAG * self.count

    def span(self, index: int) -> tuple[int, int]:
        """Plaintext offsets of a chunk, half-open."""
        return index * self.chunk, min(self.size, (index + 1) * self.chunk)

    def offset(self, index: int) -> int:
        """Where a chunk's ciphertext begins in the file."""
        return HEADER + index * (self.chunk + TAG)

    def packed(self) -> bytes:
        """Bytes 0 to 64 of the header."""
        return _FIXED.pack(CHUNK_MAGIC, VERSION, self.key_length, self.chunk, self.size, self.salt)


class Secrets:
    """The keys of one file: what seals and opens its chunks."""

    def __init__(self, key: Key, geometry: Geometry) -> None:
        self._bound = geometry.packed()
        self._last = geometry.count - 1
        length = geometry.key_length
        derived = backend.hkdf(key, geometry.salt, _LABEL + self._bound, length + CHECK)
        self._key, self.check = Key(derived[:length]), derived[length:]

    def context(self, index: int, tag: Optional[bytes]) -> backend.Context:
        """The AES-GCM context of one chunk, to decrypt if `tag` is given."""
        associated = self._bound + struct.pack("<QB", index, index == self._last)
        context: backend.Context = backend.gcm(self._key, index.to_bytes(12, "big"), tag, associated)
        return context


class ChunkedReader(UnitReader):
    """A ByteReader of the plaintext of an encrypted container, at plaintext offsets.

    Args:
        reader: the encrypted file; closed with this one.
        key: 16, 24 or 32 bytes, as long as the one that it was written with.
        cache_bytes: most memory for chunks that were read in part; at least one chunk.

    Raises:
        DecryptionError: the key is wrong, or the header was altered.
        FormatError, TruncatedFileError: not such a container, or not all of it.
        MissingDependencyError: `cryptography` is not installed.
    """

    def __init__(self, reader: ByteReader, key: KeyLike, *, cache_bytes: int = CHUNK_CACHE_BYTES) -> None:
        super().__init__(reader, _Chunks(reader, as_key(key)), cache_bytes, CHUNKED)


class _Chunks:
    """The chunks of a container as units of a `UnitReader`."""

    def __init__(self, base: ByteReader, key: Key) -> None:
        self._base = base
        self._geometry, check = _read_header(base)
        self._secrets = _require_key(base.path, key, self._geometry, check)
        self.size = self._geometry.size
        self.largest = min(self._geometry.chunk, self.size)
        _require_length(base, self._geometry)

    def find(self, offset: int) -> int:
        """Number of the chunk that holds plaintext byte `offset`."""
        return offset // self._geometry.chunk

    def span(self, unit: int) -> tuple[int, int]:
        """Plaintext offsets of a chunk."""
        return self._geometry.span(unit)

    def decrypt(self, first: int, stop: int, out: memoryview) -> None:
        """Decrypt chunks into `out`, reading several MiB at once."""
        batch = max(1, PIECE // (self._geometry.chunk + TAG))
        for index in range(first, stop, batch):
            low, high = self.span(index)[0], self.span(min(index + batch, stop) - 1)[1]
            self._batch(index, min(index + batch, stop), out[: high - low])
            out = out[high - low :]

    def _batch(self, first: int, stop: int, out: memoryview) -> None:
        sealed = thread_scratch(len(out) + TAG * (stop - first))
        self._base.read_into(self._geometry.offset(first), sealed)
        for index in range(first, stop):
            length = self.span(index)[1] - self.span(index)[0]
            self._open(index, sealed[: length + TAG], out[:length])
            sealed, out = sealed[length + TAG :], out[length:]

    def _open(self, index: int, sealed: memoryview, out: memoryview) -> None:
        context = self._secrets.context(index, bytes(sealed[-TAG:]))
        pour(context, sealed[:-TAG], out)
        if not backend.key_fits(context):
            raise self._unfit(index)

    def sealed(self, unit: int) -> Sealed:
        """A chunk that is to be decrypted by `unseal`."""
        low, high = self.span(unit)
        offset, tag = self._geometry.offset(unit), bytearray(TAG)
        self._base.read_into(offset + high - low, memoryview(tag))
        return Sealed(offset, high - low, self._secrets.context(unit, bytes(tag)), lambda: self._unfit(unit))

    def _unfit(self, index: int) -> DecryptionError:
        return DecryptionError(
            f"{self._base.path!r}: chunk {index} at byte {self._geometry.offset(index)} was altered, moved or "
            "taken from another file (its tag does not fit, though the key is right); restore the file from a copy"
        )


def _read_header(base: ByteReader) -> tuple[Geometry, bytes]:
    """Geometry and check value of a file's header, not yet verified."""
    if base.size < HEADER:
        raise TruncatedFileError(
            f"{base.path!r} has {base.size} bytes, fewer than the {HEADER} of a header; choose another checkpoint"
        )
    raw = bytearray(HEADER)
    base.read_into(0, memoryview(raw))
    magic, version, key_length, chunk, size, salt = _FIXED.unpack_from(raw)
    if magic != CHUNK_MAGIC:
        raise FormatError(f"{base.path!r} is not an encrypted container: it begins with {magic!r}; check the path")
    if version != VERSION:
        raise FormatError(f"{base.path!r} is a container of version {version}; this package reads {VERSION}: update it")
    try:
        geometry = Geometry(key_length, chunk, size, salt)
    except FormatError as error:
        raise FormatError(f"{base.path!r}: {error}; restore the file from a copy") from None
    if geometry.packed() != raw[: _FIXED.size]:
        raise FormatError(f"{base.path!r}: reserved bytes 56 to 64 are not zero; restore the file from a copy")
    return geometry, bytes(raw[_FIXED.size :])


def _require_key(path: str, key: Key, geometry: Geometry, check: bytes) -> Secrets:
    """The file's secrets; raises unless the key and the header produce the check value."""
    if len(key) != geometry.key_length:
        raise DecryptionError(
            f"{path!r} was encrypted with a key of {geometry.key_length} bytes, but one of {len(key)} is given; "
            "pass the key that it was saved with"
        )
    secrets = Secrets(key, geometry)
    if not hmac.compare_digest(secrets.check, check):
        raise DecryptionError(
            f"{path!r}: the key is wrong, or the header (bytes 0 to {HEADER}) was altered; "
            "check that the key is the one it was saved with, then restore the file from a copy"
        )
    return secrets


def _require_length(base: ByteReader, geometry: Geometry) -> None:
    if base.size < geometry.stored_size:
        raise TruncatedFileError(
            f"{base.path!r} ends at byte {base.size} where its header says {geometry.stored_size}; "
            "a save or a copy was interrupted: restore it or choose another checkpoint"
        )
    if base.size > geometry.stored_size:
        raise FormatError(
            f"{base.path!r} has {base.size} bytes where its header says {geometry.stored_size}; "
            "something was appended: restore it from a copy"
        )

"""Writing the encrypted container of container.py, chunk by chunk in any order."""

from __future__ import annotations

import os
import threading

from ms_ckpt_ext.errors import FormatError, UsageError
from ms_ckpt_ext.formats.crypto import backend
from ms_ckpt_ext.formats.crypto.backend import pour
from ms_ckpt_ext.formats.crypto.container import CHUNK, SALT, TAG, Geometry, Secrets
from ms_ckpt_ext.formats.crypto.keys import KeyLike, as_key


class Sealer:
    """Encrypts the chunks of one new container, in any order and from any thread, each once.

    Args:
        key: 16, 24 or 32 bytes.
        size: bytes of the whole plaintext.
        chunk: plaintext bytes of a chunk.

    Attributes:
        geometry: where each chunk goes.
        header: the first 96 bytes of the file.
        count: number of chunks.
        stored_size: bytes of the whole encrypted file.
    """

    def __init__(self, key: KeyLike, size: int, *, chunk: int = CHUNK) -> None:
        secret = as_key(key)
        try:
            self.geometry = Geometry(len(secret), chunk, size, os.urandom(SALT))
        except FormatError as error:
            raise UsageError(f"cannot encrypt {size} bytes in chunks of {chunk}: {error}") from None
        self._secrets = Secrets(secret, self.geometry)
        self.header = self.geometry.packed() + self._secrets.check
        self.count, self.stored_size = self.geometry.count, self.geometry.stored_size
        self._sealed: set[int] = set()
        self._lock = threading.Lock()

    def span(self, index: int) -> tuple[int, int]:
        """Plaintext offsets of a chunk, half-open."""
        return self.geometry.span(index)

    def stored(self, index: int) -> int:
        """Bytes of a chunk as it lies in the file."""
        low, high = self.span(index)
        return high - low + TAG

    def offset(self, index: int) -> int:
        """Where a chunk begins in the file."""
        return self.geometry.offset(index)

    def seal(self, index: int, plain: memoryview, out: memoryview) -> int:
        """Encrypt chunk `index` and its tag into the front of `out`; returns their length in bytes.

        Raises:
            UsageError: there is no such chunk, it has another length, or was sealed already: twice under one nonce
                would reveal both plaintexts.
        """
        self._claim(index, len(plain))
        context = self._secrets.context(index, None)
        pour(context, plain, out[: len(plain)])
        context.finalize()
        out[len(plain) : len(plain) + TAG] = getattr(context, "tag")  # noqa: B009
        return len(plain) + TAG

    def unseal(self, index: int, stored: memoryview, out: memoryview) -> bool:
        """Decrypt what `seal` wrote into `out`, of the chunk's length; False when its tag no longer fits."""
        context = self._secrets.context(index, bytes(stored[-TAG:]))
        pour(context, stored[:-TAG], out)
        return backend.key_fits(context)

    def _claim(self, index: int, length: int) -> None:
        low, high = self.geometry.span(index)
        if not 0 <= index < self.geometry.count or length != high - low:
            raise UsageError(
                f"chunk {index} of {length} bytes; there are {self.geometry.count} chunks of {self.geometry.chunk} "
                f"bytes, the last of which ends at {self.geometry.size}"
            )
        with self._lock:
            if index in self._sealed:
                raise UsageError(f"chunk {index} was sealed already; begin a new file instead of rewriting a chunk")
            self._sealed.add(index)

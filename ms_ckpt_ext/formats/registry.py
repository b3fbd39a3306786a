"""How files of any format are opened and laid out, plain or encrypted.

The suffix gives the format (`formats.table`), and the first bytes tell whether the file is encrypted. Above this module
a file is its plaintext: tables of contents and reads have plaintext offsets, whatever is on disk.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import DecryptionError, FormatError, UsageError
from ms_ckpt_ext.formats import crypto
from ms_ckpt_ext.formats.index import FileIndex, FileLayout, TensorSpec
from ms_ckpt_ext.formats.table import SUFFIXES, Format, format_of, pointer_fault
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader
from ms_ckpt_ext.storage.threads import in_order

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.checksum import StoredChecksum

DEC_KEY_VARIABLE, ENC_KEY_VARIABLE = "MS_CKPT_EXT_DEC_KEY", "MS_CKPT_EXT_ENC_KEY"
"""Environment variables with the keys of sources and of outputs; their forms are those of `crypto.load_key`."""
CACHE_BYTES = 8 << 20
"""Memory of one open encrypted file for chunks that are read in part; MindSpore's AES-GCM needs a block, 64 MiB."""
_MODES = (crypto.GCM, crypto.CBC, crypto.SM4, crypto.CHUNKED)
AUTHENTICATED = frozenset((crypto.GCM, crypto.CHUNKED))
"""Containers that detect every altered byte when it is decrypted."""


class _How(NamedTuple):
    key: Optional[crypto.Key] = None
    mode: Optional[str] = None
    crc_check: bool = False
    optional: bool = False


class Access(_How):
    """How files may be opened.

    Attributes:
        key: the key of encrypted files; None when there is none. No repr shows it.
        mode: the container that is expected; None for any. "AES-GCM" also covers this package's chunked container,
            which is AES-GCM too.
        crc_check: verify the checksum of every file that has one when its table of contents is read. For MindSpore's
            AES-GCM blocks that is always done: nothing else ties blocks to their places.
        optional: the key need not be used, for it comes from the environment. A key that the caller gave means that
            the files are encrypted: a plain one in their place is refused, as by MindSpore.

    Raises:
        UsageError: no such mode.
    """

    __slots__ = ()

    def __new__(
        cls,
        key: Optional[crypto.Key] = None,
        mode: Optional[str] = None,
        crc_check: bool = False,
        optional: bool = False,
    ) -> Access:
        if mode is not None and mode not in _MODES:
            raise UsageError(f"no such dec_mode; choose one of {', '.join(_MODES)}")  # unquoted: it may be a key
        return super().__new__(cls, key, mode, crc_check, optional)


PLAIN = Access()
"""No key, no check."""


def open_reader(path: str, access: Access = PLAIN) -> ByteReader:
    """The plaintext of a checkpoint file; costs a plain file one read of 8 bytes.

    Raises:
        DecryptionError: encrypted and no key, in another mode, or with another key; plain where a key was given.
        FormatError: an encrypted file whose headers are damaged, or a pointer that git-lfs left in place of the file.
        StorageError: the operating system refused.
    """
    base = PlainReader(path)
    try:
        return _decrypted(base, access)
    except BaseException:
        base.close()
        raise


def _decrypted(base: PlainReader, access: Access) -> ByteReader:
    head = bytearray(min(crypto.SNIFF_BYTES, base.size))
    base.read_into(0, memoryview(head))
    container = crypto.sniff(bytes(head))
    fault = pointer_fault(base.path, bytes(head))
    if fault is not None:
        raise FormatError(fault)
    if container is None:
        if access.key is None or access.optional:
            return base
        raise DecryptionError(
            f"{base.path!r} is not encrypted, but a key is given, so another file was meant, or this one was replaced; "
            "load it without a key, or check the path"
        )
    if access.key is None:
        raise DecryptionError(
            f"{base.path!r} is encrypted ({container}); pass the key it was saved with (dec_key), "
            f"or set the environment variable {DEC_KEY_VARIABLE}"
        )
    mode = None if (container, access.mode) == (crypto.CHUNKED, crypto.GCM) else access.mode
    return crypto.decrypting_reader(base, access.key, mode, cache_bytes=CACHE_BYTES)


def reopen(index: FileIndex, access: Access) -> ByteReader:
    """The plaintext of a file whose table of contents was read: a plain one's first bytes are not read again."""
    return PlainReader(index.path) if index.reader == "plain" else open_reader(index.path, access)


def read_index(path: str, access: Access = PLAIN) -> FileIndex:
    """Table of contents of one checkpoint file, by its suffix, with plaintext offsets.

    Raises:
        UsageError: a suffix that no reader knows.
        ChecksumError: the contents are not what was written (with `access.crc_check`, or blocks of AES-GCM).
        FormatError, DecryptionError, StorageError: as the format's reader and `open_reader` say.
    """
    form = _form(path, "read")
    with open_reader(path, access) as reader:
        by_blocks = _by_blocks(reader, form)
        index = index_through(reader, path)
        if access.crc_check or by_blocks:
            from ms_ckpt_ext.formats.checksum import verify_stored

            if not verify_stored(reader, stored_checksum(index)):
                log.warning("%r has no checksum, so crc_check cannot check it", path)
        return index


def index_through(reader: ByteReader, name: str) -> FileIndex:
    """Table of contents of a file that is open already; `name` says its format. Raises as `read_index`."""
    index: FileIndex = _module(_form(name, "read").reader).read_index(reader, reader.mtime_ns)
    return index


def _by_blocks(reader: ByteReader, form: Format) -> bool:
    """Whether only the checksum inside a file ties its blocks to their places, and there is one: it is always verified.

    Most of an AES-GCM block file is decrypted for its table of contents anyway. A CBC file is not, nor is it authentic.
    """
    if not form.blocks or reader.traits.container != crypto.GCM or _module(form.reader).stored_crc(reader) is None:
        return False
    crypto.keep_checksums(reader)
    return True


def stored_checksum(index: FileIndex) -> Optional[StoredChecksum]:
    """The checksum that a file carries; None when it carries none."""
    found: Optional[StoredChecksum] = _module(_form(index.path, "read").reader).stored_checksum(index)
    return found


def read_indexes(paths: Iterable[str], access: Access = PLAIN, workers: int = 8) -> list[FileIndex]:
    """Tables of contents of many files, in order, read in parallel where that helps (network storage)."""
    return in_order(partial(read_index, access=access), paths, workers)


def lay_out(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str], crc: bool = False) -> FileLayout:
    """Plan an output file in the format of its suffix; with `crc`, with room for a checksum.

    Raises UsageError for a suffix that no writer knows, or a tensor that the format cannot hold.
    """
    for spec in specs:
        try:
            spec.name.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"cannot write a tensor named {spec.name!r} into {name!r}: names in checkpoints are UTF-8, which "
                "has no half of a surrogate pair; give it another name (choice_func)"
            ) from error
    layout: FileLayout = _module(_form(name, "write").writer).layout(specs, metadata=metadata, crc=crc)
    return layout


def in_files(specs: Sequence[TensorSpec], form: Format) -> list[list[TensorSpec]]:
    """The tensors, in their order, in as few groups as files of a format can list; one, unless they are very many."""
    if not form.listed:
        return [[*specs]]
    groups: list[list[TensorSpec]] = _module(form.writer).in_headers(specs)
    return groups


def _form(name: str, action: str) -> Format:
    form = format_of(name)
    if form is None:
        suffix = os.path.splitext(name)[1] or "without a suffix"
        raise UsageError(f"cannot {action} {name!r}: no format {suffix!r}; known are {', '.join(SUFFIXES)}")
    return form


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"ms_ckpt_ext.formats.{name}")

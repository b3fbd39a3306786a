"""safetensors files: 8-byte little-endian header length, JSON header, then the tensors without gaps.

The reader checks everything a header can get wrong before any content is used. The writer lays tensors out as the
safetensors library does (dtype descending, then name), so a file written here is byte-identical to the library's.

MindSpore's checksum is the entry `crc_num` of the metadata: the CRC-32, in decimal, of name and contents of every
tensor, in the order of names (but see `checksum.Integer`). A writer leaves room for it and puts it in at the end.

The format has no text, which a `.ckpt` may hold beside its tensors. Here text is a tensor of its code points, U32 with
one axis, the same bytes as in a `.ckpt`; a JSON list in the metadata, `ms_ckpt_ext.text`, names those that are text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ms_ckpt_ext.core.dtype import DTYPES, FILE_ORDER
from ms_ckpt_ext.core.reads import Extent
from ms_ckpt_ext.errors import ChecksumError, FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats.checksum import Integer, Part, crc_of
from ms_ckpt_ext.formats.index import (
    BUDGET,
    MAX_RANK,
    Checksum,
    FileIndex,
    FileLayout,
    TensorEntry,
    TensorSpec,
    countable,
)
from ms_ckpt_ext.storage.reader import ByteReader

_PARSED = ((b'"', 12), (b",", 44), (b":", 150), (b"[", 84), (b"{", 64))
"""Bytes of objects that a character stands for, once parsed: half a string, an item of a list, of an object, …

As measured; of what can be legal, the worst case.
"""
MAX_HEADER = 100_000_000
"""The safetensors library's own limit on the header, in bytes."""
METADATA = "__metadata__"
DEDUPLICATED = "remove_redundancy"
"""MindSpore's metadata key: "True" when replicas were dropped, so that a slice lies in one of its ranks' files only."""
CRC_NUM = "crc_num"
"""MindSpore's metadata key of the checksum."""
NO_CRC = "0" * len(str(2**32 - 1))
"""What stands there until it is known."""
TEXT_NOTE = "ms_ckpt_ext.text"
_TEXT, _TEXT_AS = DTYPES["STR"], DTYPES["U32"]
_ADVICE = "the file is damaged or was not completely written: restore it, or choose another checkpoint"


def read_index(reader: ByteReader, mtime_ns: int = 0) -> FileIndex:
    """Read and check the header.

    Raises:
        TruncatedFileError: the file ends before its header or its tensors do.
        FormatError: it is not a safetensors file, or its header contradicts itself.
    """
    path, length = reader.path, _header_length(reader)
    header = _read_header(reader, length)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path!r}: {METADATA} must map strings to strings; {_ADVICE}")
    tensors = {name: _entry(path, name, raw, 8 + length) for name, raw in header.items()}
    _check_coverage(path, tensors, 8 + length, reader.size)
    for name in _texts(path, metadata.pop(TEXT_NOTE, "[]"), tensors):
        tensors[name] = tensors[name]._replace(dtype=_TEXT)
    return FileIndex(path, reader.disk_size, mtime_ns, tensors, metadata, reader.traits.container)


def verify_crc(reader: ByteReader, index: FileIndex) -> bool:
    """Compare the stored checksum with the bytes, in bounded memory; False when the file has none.

    Raises:
        ChecksumError: they differ, or what is stored is no number.
    """
    stored = index.metadata.get(CRC_NUM)
    if stored is None:
        return False
    found = crc_of(reader, _crc_parts(index.tensors))
    if stored.lstrip("0") != str(found).lstrip("0"):
        raise ChecksumError(
            f"{index.path!r}: the CRC-32 of its tensors is {found}, but its header says {stored[:32]!r}; "
            "the file was damaged after it was saved: restore it or choose another checkpoint"
        )
    return True


def _crc_parts(tensors: Mapping[str, TensorEntry]) -> list[Part]:
    """What MindSpore's checksum of these tensors covers."""
    parts: list[Part] = []
    for name in sorted(tensors):
        entry = tensors[name]
        scalar = entry.shape == () and entry.dtype.family in ("int", "uint")
        parts.append(name.encode())
        parts += [Integer(e, entry.dtype.family == "int") if scalar else e for e in entry.extents]
    return parts


def _header_length(reader: ByteReader) -> int:
    if reader.size < 8:
        raise TruncatedFileError(
            f"{reader.path!r} holds {reader.size} bytes; a safetensors file starts with an 8-byte length: {_ADVICE}"
        )
    head = bytearray(8)
    reader.read_into(0, memoryview(head))
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"{reader.path!r}: bytes 0-7 announce a header of {length} bytes, more than the format's limit of "
            f"{MAX_HEADER}: this is not a safetensors file (it starts with {bytes(head)!r})"
        )
    if 8 + length > reader.size:
        raise TruncatedFileError(
            f"{reader.path!r}: the header needs {8 + length} bytes, the file has {reader.size}; {_ADVICE}"
        )
    return length


def _read_header(reader: ByteReader, length: int) -> dict[str, Any]:
    raw = bytearray(length)
    reader.read_into(8, memoryview(raw))
    _check_density(reader.path, raw, reader.size)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateError as error:
        raise FormatError(f"{reader.path!r}: the header names {error.args[0]!r} twice; {_ADVICE}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{reader.path!r}: bytes 8-{7 + len(raw)} are not a JSON header ({error}): not safetensors, or damaged"
        ) from error
    if not isinstance(header, dict):
        raise FormatError(f"{reader.path!r}: the header is a JSON {type(header).__name__}, expected an object")
    try:
        "".join(header).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise FormatError(f"{reader.path!r}: a name in the header is no text ({error.reason}); {_ADVICE}") from None
    return header


def _check_density(path: str, raw: bytearray, size: int) -> None:
    """Refuse a header that is hardly more than punctuation before it is parsed into objects twenty times its size."""
    text = len(raw) * (2 if raw.isascii() else 8)  # all of it, and as much again if it is one string
    memory = len(raw) + text + sum(raw.count(mark) * nbytes for mark, nbytes in _PARSED)
    if memory > size + BUDGET:
        raise FormatError(
            f"{path!r}: the header of {len(raw)} bytes would take some {memory >> 20} MiB of memory, in a file of "
            f"{size} bytes: no table of tensors is so dense. Do not trust this file: restore it, or choose another one"
        )


class _DuplicateError(Exception):
    """A JSON object has the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _entry(path: str, name: str, raw: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = DTYPES.get(raw["dtype"]), raw["shape"], raw["data_offsets"]
        axes_ok = isinstance(shape, list) and len(shape) <= MAX_RANK
        numbers_ok = axes_ok and all(type(n) is int and 0 <= n < 1 << 64 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(
            f"{path!r}: header entry of {name!r} must have dtype, shape and data_offsets ({error!r}); {_ADVICE}"
        ) from error
    if dtype is None or dtype.name not in _WRITABLE:
        raise FormatError(
            f"{path!r}: parameter {name!r} has dtype {str(raw['dtype'])[:64]!r}, which safetensors does not define"
        )
    if not numbers_ok:
        raise FormatError(
            f"{path!r}: parameter {name!r} has shape {str(shape)[:99]}, offsets {str([start, stop])[:99]}: "
            f"expected whole numbers of at least 0 and below 2^64, at most {MAX_RANK} axes; {_ADVICE}"
        )
    bits = prod(shape) * dtype.bits
    if (stop - start) * 8 != bits:
        raise FormatError(
            f"{path!r}: parameter {name!r} ({dtype.name}{list(shape)}) needs {bits / 8:g} bytes, "
            f"its offsets {[start, stop]} give {stop - start}; {_ADVICE}"
        )
    if not countable(dtype, tuple(shape)):
        raise FormatError(f"{path!r}: no array has the shape {shape} of parameter {name!r} ({dtype.name}); {_ADVICE}")
    return TensorEntry(dtype, tuple(shape), (Extent(base + start, stop - start),))


_WRITABLE = {name for name in DTYPES if name not in ("C128", "STR")}


def _texts(path: str, note: str, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Names of the tensors that are text."""
    try:
        names = json.loads(note)
        fits = isinstance(names, list) and all(
            tensors[name].dtype is _TEXT_AS and len(tensors[name].shape) == 1 for name in names
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        fits = False
    if not fits:
        raise FormatError(f"{path!r}: {TEXT_NOTE} in {METADATA} is no list of U32 tensors of one axis; {_ADVICE}")
    return list(names)


def _check_coverage(path: str, tensors: Mapping[str, TensorEntry], base: int, size: int) -> None:
    at, before = base, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].extents[0]):
        extent = entry.extents[0]
        if extent.offset != at:
            what = "overlaps" if extent.offset < at else f"leaves a gap of {extent.offset - at} bytes after"
            raise FormatError(
                f"{path!r}: parameter {name!r} at data offset {extent.offset - base} {what} {before!r}; {_ADVICE}"
            )
        at, before = extent.offset + extent.length, name
    if at > size:
        raise TruncatedFileError(f"{path!r}: the tensors end at byte {at}, the file has {size}; {_ADVICE}")
    if at < size:
        raise FormatError(f"{path!r}: {size - at} bytes after the last tensor belong to none; {_ADVICE}")


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str], crc: bool = False) -> FileLayout:
    """Lay out a file for `specs`; with `crc`, with room for the checksum in its header.

    Raises UsageError for a dtype the format cannot hold, or a name given twice.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names) or METADATA in names:
        clash = next((n for n in names if names.count(n) > 1), METADATA)
        raise UsageError(f"cannot write two tensors named {clash!r} into one safetensors file; rename one")
    texts = sorted(spec.name for spec in specs if spec.dtype is _TEXT)
    specs = [spec._replace(dtype=_TEXT_AS) if spec.dtype is _TEXT else spec for spec in specs]
    for spec in specs:
        if spec.dtype.name not in _WRITABLE:
            raise UsageError(
                f"parameter {spec.name!r} is {spec.dtype.mindspore}, which safetensors cannot hold; write .ckpt instead"
            )
    ordered = sorted(specs, key=lambda spec: (-FILE_ORDER[spec.dtype.name], spec.name))
    notes = {**metadata, CRC_NUM: NO_CRC} if crc else dict(metadata)
    if texts:
        notes[TEXT_NOTE] = json.dumps(texts, ensure_ascii=False)
    header: dict[str, Any] = {METADATA: notes} if notes else {}
    offset = 0
    places = []
    for spec in ordered:
        length = spec.dtype.nbytes(prod(spec.shape))
        header[spec.name] = {
            "dtype": spec.dtype.name,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + length],
        }
        places.append((spec, Extent(offset, length)))
        offset += length
    text = _dump(header)
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    tensors = {
        spec.name: TensorEntry(spec.dtype, spec.shape, (Extent(base + extent.offset, extent.length),))
        for spec, extent in places
    }
    prefix = len(text).to_bytes(8, "little")

    def render(number: int) -> bytes:
        return prefix + _dump({**header, METADATA: {**notes, CRC_NUM: str(number)}}).ljust(len(text))

    checksum = Checksum(tuple(_crc_parts(tensors)), 0, render) if crc else None
    return FileLayout(base + offset, ((0, prefix + text),), tensors, checksum)


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

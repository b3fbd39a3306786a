"""safetensors files: 8-byte little-endian header length, JSON header, then the tensors without gaps.

The reader checks everything a header can get wrong before any content is used. The writer lays tensors out as the
safetensors library does (dtype descending, then name), so a file written here is byte-identical to the library's.

MindSpore's checksum is the entry `crc_num` of the metadata: the CRC-32, in decimal, of name and contents of every
tensor, in the order of names (but see `checksum.Integer`). A writer leaves room for it and fills it in at the end.

The format has no text, which a `.ckpt` may hold beside its tensors. Here text is a tensor of its code points, U32 with
one axis, the same bytes as in a `.ckpt`; a JSON list in the metadata, `ms_ckpt_ext.text`, lists those that are text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, Optional

from ms_ckpt_ext.core.geometry.array import DTYPES, FILE_ORDER, DType, Shape
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import FormatError, TruncatedFileError, UsageError
from ms_ckpt_ext.formats.index import (
    CRC_NUM,
    MAX_RANK,
    Checksum,
    FileIndex,
    FileLayout,
    TensorEntry,
    TensorSpec,
    countable,
)
from ms_ckpt_ext.formats.safetensors_header import METADATA, HeaderError, Member, read_header, read_texts
from ms_ckpt_ext.storage.reader import ByteReader

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.checksum import Covered, StoredChecksum

MAX_HEADER = 100_000_000
"""The safetensors library's own limit on the header, in bytes."""
_MEMBER_BYTES, _CHARACTER_BYTES = 1000, 12
"""Upper bounds: a tensor's member without its name, and a character of the name, which a note may repeat."""
DEDUPLICATED = "remove_redundancy"
"""MindSpore's metadata key: "True" when replicas were dropped, so a slice is in the file of only one of its ranks."""
SHARDING_INFO = "DCP_SHARDING_INFO"
"""Metadata key of torch's distributed checkpoint, see `formats.discovery.torch_slices`."""
NO_CRC = "0" * len(str(2**32 - 1))
"""The value of `CRC_NUM` until it is known."""
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
    raw = bytearray(length)
    reader.read_into(8, memoryview(raw))
    table = _Table(8 + length)
    try:
        metadata = read_header(raw, table.add)
    except HeaderError as error:
        raise FormatError(f"{path!r}: {error}; {_ADVICE}") from error
    _check_coverage(path, table.tensors, 8 + length, reader.size)
    for name in _texts(path, metadata.pop(TEXT_NOTE, ""), table.tensors):
        table.tensors[name] = table.tensors[name]._replace(dtype=_TEXT)
    return FileIndex(path, reader.disk_size, mtime_ns, table.tensors, metadata, reader.traits.container)


def stored_checksum(index: FileIndex) -> Optional[StoredChecksum]:
    """The checksum in a file's header; None when there is none."""
    from ms_ckpt_ext.formats.checksum import StoredChecksum

    stored = index.metadata.get(CRC_NUM)
    if stored is None:
        return None

    def fault(found: int) -> Optional[str]:
        if stored.lstrip("0") == str(found).lstrip("0"):
            return None
        return (
            f"{index.path!r}: the CRC-32 of its tensors is {found}, but its header says {stored[:32]!r}; "
            "the file was damaged after it was saved: restore it or choose another checkpoint"
        )

    return StoredChecksum(tuple(_crc_parts(index.tensors)), fault)


def _crc_parts(tensors: Mapping[str, TensorEntry]) -> list[Covered]:
    """What MindSpore's checksum of these tensors covers."""
    from ms_ckpt_ext.formats.checksum import Integer

    parts: list[Covered] = []
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


class _Table:
    """Entries of tensors, checked one by one; what many of them have in common is made and checked once."""

    def __init__(self, base: int) -> None:
        self.tensors: dict[str, TensorEntry] = {}
        self._base = base
        self._forms: dict[tuple[str, Shape], tuple[DType, Shape, int]] = {}

    def add(self, member: Member) -> None:
        """Raises HeaderError."""
        name, dtype_name, shape, start, stop = member
        form = self._forms.get((dtype_name, shape))
        if form is None:
            form = self._forms[dtype_name, shape] = _form(member)
        dtype, shape, bits = form
        if (stop - start) * 8 != bits or not 0 <= start <= stop < 1 << 64:
            raise HeaderError(
                f"parameter {name!r} ({dtype.name}{list(shape)}) needs {bits / 8:g} bytes, "
                f"its offsets {[start, stop]} give {stop - start}"
            )
        if name in self.tensors:
            raise HeaderError(f"the header names {name!r} twice")
        self.tensors[name] = TensorEntry(dtype, shape, (Extent(self._base + start, stop - start),))


def _form(member: Member) -> tuple[DType, Shape, int]:
    """Dtype, shape and number of bits of a tensor. Raises HeaderError for what no tensor has."""
    name, shape = member.name, member.shape
    dtype = DTYPES.get(member.dtype)
    if dtype is None or dtype.name not in _WRITABLE:
        raise HeaderError(f"parameter {name!r} has dtype {member.dtype[:64]!r}, which safetensors does not define")
    if len(shape) > MAX_RANK or not all(0 <= extent < 1 << 64 for extent in shape):
        raise HeaderError(
            f"parameter {name!r} has shape {str(shape)[:99]}: expected whole numbers of at least 0 and below 2^64, "
            f"at most {MAX_RANK} axes"
        )
    if not countable(dtype, shape):
        raise HeaderError(f"no array has the shape {shape} of parameter {name!r} ({dtype.name})")
    return dtype, shape, prod(shape) * dtype.bits


_WRITABLE = {name for name in DTYPES if name not in ("C128", "STR")}


def _texts(path: str, note: str, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Names of the tensors that are text."""
    try:
        names = read_texts(note) if note else []
        fits = all(tensors[name].dtype is _TEXT_AS and len(tensors[name].shape) == 1 for name in names)
    except (HeaderError, KeyError):
        fits = False
    if not fits:
        raise FormatError(f"{path!r}: {TEXT_NOTE} in {METADATA} is not a list of U32 tensors of one axis; {_ADVICE}")
    return names


def _check_coverage(path: str, tensors: Mapping[str, TensorEntry], base: int, size: int) -> None:
    at, before = base, "the header"
    in_order = sorted(tensors, key=lambda name: tensors[name].extents[0])
    for name in in_order:
        extent = tensors[name].extents[0]
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

    Raises UsageError for a dtype the format cannot hold, a name given twice, or more tensors than a header can list.
    """
    count = Counter(spec.name for spec in specs)
    count[METADATA] += 1
    if len(count) <= len(specs):
        clash = next(name for name in count if count[name] > 1)
        raise UsageError(f"cannot write two tensors named {clash!r} into one safetensors file; rename one")

    texts = sorted(spec.name for spec in specs if spec.dtype is _TEXT)
    notes = {**metadata, CRC_NUM: NO_CRC} if crc else dict(metadata)
    if texts:
        notes[TEXT_NOTE] = _json(texts)
    in_order = sorted(map(_storable, specs), key=lambda spec: (-FILE_ORDER[spec.dtype.name], spec.name))
    sizes = [spec.dtype.nbytes(prod(spec.shape)) for spec in in_order]
    starts = [0, *accumulate(sizes)]
    members = [_member(spec, start, stop) for spec, start, stop in zip(in_order, starts, starts[1:])]
    tensors = ",".join(members)

    def head(number: str) -> bytes:
        told = {**notes, CRC_NUM: number} if crc else notes
        parts = [f'"{METADATA}":{_json(told)}'] * bool(told) + [tensors] * bool(tensors)
        text = ("{" + ",".join(parts) + "}").encode()
        return text + b" " * (-len(text) % 8)

    text = head(NO_CRC)
    if len(text) > MAX_HEADER:
        raise UsageError(
            f"{len(specs)} tensors in one safetensors file need a header of {len(text)} bytes, and the format allows "
            f"{MAX_HEADER}: write .ckpt instead, or leave parameters out"
        )
    base, prefix = 8 + len(text), len(text).to_bytes(8, "little")
    places = {
        name: TensorEntry(dtype, shape, (Extent(base + start, nbytes),))
        for (name, dtype, shape), start, nbytes in zip(in_order, starts, sizes)
    }

    def render(number: int) -> bytes:
        return prefix + head(str(number)).ljust(len(text))

    checksum = Checksum(tuple(_crc_parts(places)), 0, render) if crc else None
    return FileLayout(base + starts[-1], ((0, prefix + text),), places, checksum)


def in_headers(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """The tensors, in their order, in as few groups as headers can list; one, unless they are very many."""
    if sum(_MEMBER_BYTES + _CHARACTER_BYTES * len(spec.name) for spec in specs) <= MAX_HEADER:
        return [list(specs)]
    groups: list[list[TensorSpec]] = []
    left = 0
    for spec in specs:
        needed = _member_bytes(spec)
        if needed > left:
            groups.append([])
            left = MAX_HEADER - _MEMBER_BYTES
        groups[-1].append(spec)
        left -= needed
    return groups


def _member_bytes(spec: TensorSpec) -> int:
    """Most bytes that a tensor takes in a header, wherever it lies in the file, with a note about it."""
    name = len(_json(spec.name).encode())
    return 2 * name + len(_member(spec._replace(name=""), 1 << 63, 1 << 63)) + len(',:"Int4",')


def _storable(spec: TensorSpec) -> TensorSpec:
    if spec.dtype is _TEXT:
        return spec._replace(dtype=_TEXT_AS)
    if spec.dtype.name not in _WRITABLE:
        raise UsageError(
            f"parameter {spec.name!r} is {spec.dtype.mindspore}, which safetensors cannot hold; write .ckpt instead"
        )
    return spec


def _member(spec: TensorSpec, start: int, stop: int) -> str:
    """The same text as `_json` of the entry, without objects in between."""
    name, (_, dtype, shape) = json.encoder.encode_basestring(spec.name), spec
    return f'{name}:{{"dtype":"{dtype.name}","shape":[{_numbers(shape)}],"data_offsets":[{start},{stop}]}}'


@lru_cache(maxsize=1024)
def _numbers(shape: Shape) -> str:
    return ",".join(map(str, shape))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

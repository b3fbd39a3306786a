"""Writing `.ckpt`: every offset is known before a byte moves, and the bytes are those of MindSpore's own writer.

1. `layout` turns names, dtypes and shapes into framing literals and holes. A tensor above 512 MiB becomes several
   values with one tag, each carrying all dims and the next 512 MiB (`_write_parameter_bytes_data` in
   mindspore/train/serialization.py); text and scalars are framed as `save_checkpoint` frames them.
2. The holes may be filled by anybody, in any order.
3. With `crc`, the last literal is the checksum's tail with zeros in it; the layout's `checksum` says what replaces it
   when the rest is in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Optional

from ms_ckpt_ext.core.geometry.array import INT4, DType
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats.ckpt import CRC_MARK, CRC_TAIL, MAX_TEXT, value_bytes
from ms_ckpt_ext.formats.index import BUDGET, Checksum, FileLayout, TensorEntry, TensorSpec
from ms_ckpt_ext.formats.wire import BYTES, encode_bytes, encode_number, encode_varint

SLICE_BYTES = 512 << 20
"""Most bytes of one value's contents: MindSpore's SLICE_SIZE, 512 * 1024 KiB."""


def layout(
    specs: Sequence[TensorSpec],
    *,
    crc: bool = False,
    metadata: Optional[Mapping[str, str]] = None,
    piece: int = SLICE_BYTES,
    budget: int = BUDGET,
) -> FileLayout:
    """Where every byte of a `.ckpt` with these tensors, in this order, goes.

    Args:
        specs: the tensors. A dtype STR is text: shape (code points,), contents UTF-32.
        crc: leave room for the checksum tail, the last 17 bytes; see `crc_tail`.
        metadata: `{name: "Int4"}` marks int8 tensors that hold packed 4-bit numbers.
        piece: most bytes of one value; MindSpore reads other lengths as well.
        budget: bytes of memory that a reader's table may take beyond the size of the file, as in `ckpt.read_index`.

    Raises:
        UsageError: a name occurs twice or is too long, a dtype has no name in MindSpore, or the tensors are too many.
    """
    notes = metadata or {}
    memory = 0
    literals: list[tuple[int, bytes]] = []
    tensors: dict[str, TensorEntry] = {}
    offset = 0
    for spec in specs:
        if spec.name in tensors:
            raise UsageError(f"parameter {spec.name!r} is to be written twice into one file; pass each name once")
        if len(spec.name.encode()) > MAX_TEXT:
            raise UsageError(
                f"the name {spec.name[:64]!r}… has {len(spec.name.encode())} bytes, and readers of .ckpt take "
                f"{MAX_TEXT}: give it another one (choice_func)"
            )
        extents = []
        for length in _pieces(spec.dtype.nbytes(prod(spec.shape)), piece):
            framing = _framing(spec, length, spec.dtype.name == "I8" and notes.get(spec.name) == INT4)
            literals.append((offset, framing))
            extents.append(Extent(offset + len(framing), length))
            offset += len(framing) + length
            memory += value_bytes(spec.name, len(spec.shape), spec.dtype.mindspore)
        tensors[spec.name] = TensorEntry(spec.dtype, spec.shape, tuple(extents))
    if memory > offset + budget:
        raise UsageError(
            f"{len(specs)} tensors in one .ckpt are more than its reader takes in so few bytes: the table of a file of "
            f"{offset} bytes would take {memory >> 20} MiB of memory; write several files, or leave parameters out"
        )
    checksum = None
    if crc:
        checksum = Checksum((Extent(0, offset),), offset, crc_tail)
        literals.append((offset, crc_tail(0)))
        offset += CRC_TAIL
    return FileLayout(offset, tuple(literals), tensors, checksum)


def crc_tail(crc: int) -> bytes:
    """The 17 bytes that end a file whose preceding bytes have this CRC-32."""
    return CRC_MARK + crc.to_bytes(CRC_TAIL - len(CRC_MARK), "big")


def _pieces(total: int, piece: int) -> list[int]:
    """Lengths of the values of one tensor; a tensor without elements is one empty value."""
    return [min(piece, total - start) for start in range(0, total, piece)] or [0]


def _framing(spec: TensorSpec, length: int, int4: bool) -> bytes:
    """Everything of one value before its contents, which are the last thing in it."""
    dims = (0,) if spec.dtype.name == "STR" else spec.shape
    inner = b"".join(encode_number(1, dim) for dim in dims)
    inner += encode_bytes(2, (INT4 if int4 else _type_name(spec)).encode()) + _open(3, length)
    tag = encode_bytes(1, spec.name.encode())
    tensor = _open(2, len(inner) + length) + inner
    return _open(1, len(tag) + len(tensor) + length) + tag + tensor


def _open(number: int, length: int) -> bytes:
    """Key and length of a field whose `length` bytes follow."""
    return encode_varint(number << 3 | BYTES) + encode_varint(length)


def _type_name(spec: TensorSpec) -> str:
    dtype: DType = spec.dtype
    if not dtype.mindspore:
        raise UsageError(
            f"parameter {spec.name!r} has dtype {dtype.name}, for which .ckpt files have no name; write safetensors"
        )
    return dtype.mindspore

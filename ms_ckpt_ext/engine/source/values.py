"""Small things out of a checkpoint as values: training scalars, text."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, outside_of
from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_indexes
from ms_ckpt_ext.storage.reader import ReaderPool

if TYPE_CHECKING:
    import numpy.typing as npt

_NAMED = 3
TEXT = "STR"
"""The dtype of text in a `.ckpt`."""
NUMPY = {"BOOL": "?", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "U8": "u1", "U16": "u2", "U32": "u4"} | {
    "U64": "u8",
    "F16": "f2",
    "F32": "f4",
    "F64": "f8",
    "C64": "c8",
    "C128": "c16",
    "BF16": "u2",
}
"""dtype -> numpy's; BF16 as its bit patterns. What numpy lacks, 8-bit floats and packed types, is missing."""
_STRUCT = {
    "BOOL": "?",
    "I8": "b",
    "I16": "h",
    "I32": "i",
    "I64": "q",
    "U8": "B",
    "U16": "H",
    "U32": "I",
    "U64": "Q",
} | {
    "F16": "e",
    "F32": "f",
    "F64": "d",
}
"""dtype -> that of Python's `struct`."""


def read_extras(
    directory: str,
    strategy: Optional[Strategy],
    file_suffix: Optional[str] = None,
    access: Access = PLAIN,
    kind: Optional[str] = None,
) -> dict[str, Union[npt.NDArray[Any], str]]:
    """The contents of every training scalar: text, and what has no more than one axis, outside the strategy.

    Without a strategy, every text and single-element parameter. What differs between ranks is left out, and a warning
    names it.
    """
    if strategy is None and os.path.isfile(directory):
        catalog, alone = _of_ranks({0: directory}, access), True
    elif strategy is None and rank_folders.is_sharded(directory):
        catalog, alone = _of_ranks(rank_folders.rank_files(directory, kind, file_suffix), access), True
    else:
        catalog, alone = open_catalog(directory, strategy, file_suffix, access=access, kind=kind), False

    def is_scalar(held: Union[SourceTensor, UnlistedTensor]) -> bool:
        dtype, shape = catalog.kind(held)
        return dtype.name == TEXT or math.prod(shape) == 1 or (len(shape) == 1 and not alone)

    groups = (catalog.extras, catalog.unproven, catalog.own)
    wanted = {name for group in groups for name, held in group.items() if is_scalar(held)}
    from ms_ckpt_ext.engine.unlisted.alike import compared

    catalog = compared(catalog, wanted)
    differing = [catalog.own[name] for name in sorted(wanted) if name in catalog.own]
    if differing:
        told = "; ".join(f"{held.name!r} is {held.differences()}" for held in differing[:_NAMED])
        log.warning(
            "%d names outside the strategy differ by rank and are no training scalars: %s", len(differing), told
        )
    with catalog.readers() as readers:
        return {n: read_whole(catalog, readers, tensor) for n, tensor in catalog.extras.items() if n in wanted}


def _of_ranks(files: Mapping[int, str], access: Access) -> Catalog:
    """What the files of ranks hold, nothing known of how it is cut."""
    indexes = tuple(read_indexes(files.values(), access))
    outside = outside_of(indexes, {rank: number for number, rank in enumerate(files)}, frozenset())
    return Catalog(indexes, {}, outside.extras, {}, access, own=outside.own, unproven=outside.unproven)


def decode_text(contents: bytes) -> str:
    """Text as a `.ckpt` stores it: UTF-32, little-endian, zeros at its end as numpy has them.

    Raises:
        FormatError: these bytes are no text.
    """
    try:
        return contents.decode("utf-32-le", "surrogatepass").rstrip("\0")
    except UnicodeDecodeError as error:
        raise FormatError(f"a text of {len(contents)} bytes is not UTF-32 ({error.reason}): it is damaged") from error


def read_whole(catalog: Catalog, readers: ReaderPool, tensor: SourceTensor) -> Union[npt.NDArray[Any], str]:
    """One small tensor, read in one go. Raises as `bytes_of` and `decode_text`."""
    data = bytes_of(catalog, readers, tensor)
    if tensor.meta.dtype.name == TEXT:
        return decode_text(data)
    import numpy as np

    dtype = NUMPY.get(tensor.meta.dtype.name)
    flat = np.frombuffer(data, np.dtype(dtype or "u1"))
    return flat.reshape(tensor.meta.shape) if dtype else flat


def bytes_of(catalog: Catalog, readers: ReaderPool, tensor: SourceTensor) -> bytes:
    """All bytes of a small tensor, row-major. Raises CoverageError, FormatError or StorageError."""
    if tensor.recipe is not None or any(parts != 1 for placement in tensor.placements for parts in placement.parts):
        from ms_ckpt_ext.engine.copying.worker import Assembler

        data = bytearray(catalog.nbytes(tensor))
        Assembler(readers, catalog.stored, Limits()).read(tensor, Region.whole(tensor.meta.shape), memoryview(data))
        return bytes(data)
    file = next(iter(tensor.placements[0].holders.values()))[0]
    parts = []
    for offset, length in catalog.stored(file, tensor.stored_name):
        parts.append(bytearray(length))
        readers.read_into(file, offset, memoryview(parts[-1]))
    return b"".join(parts)


def to_python(data: bytes, dtype: DType, shape: Shape) -> object:
    """Contents of a small tensor as a number or a nested list of them; None for what Python has no type for.

    numpy is not used: it takes longer to import than everything else that a few numbers need.
    """
    numbers = _numbers(data, dtype)
    return None if numbers is None else _nested(iter(numbers), shape)


def _numbers(data: bytes, dtype: DType) -> Optional[list[Any]]:
    if dtype.family not in ("bool", "int", "uint", "float"):
        return None
    count, code = len(data) * 8 // dtype.bits, _STRUCT.get(dtype.name)
    if code is not None:
        found = [*struct.unpack(f"<{count}{code}", data)]
        return [_shortest(number, f"<{code}") for number in found] if code in "ef" else found
    if dtype.name == "BF16":  # the upper half of an F32
        return [*struct.unpack(f"<{count}f", b"".join(b"\0\0" + data[2 * n : 2 * n + 2] for n in range(count)))]
    import numpy as np

    from ms_ckpt_ext.engine.integrity.numerics import values

    numbers: list[Any] = values(np.frombuffer(data, np.uint8), dtype.name).tolist()
    return numbers


def _shortest(number: float, form: str) -> float:
    """The shortest decimal that means the same number in its own type."""
    if not math.isfinite(number):
        return number
    own = struct.pack(form, number)
    for digits in range(1, 10):
        near = float(f"{number:.{digits}g}")
        try:
            if struct.pack(form, near) == own:
                return near
        except OverflowError:  # rounded up, beyond the type's largest
            continue
    return number


def _nested(numbers: Iterator[Any], shape: Shape) -> Any:
    return [_nested(numbers, shape[1:]) for _ in range(shape[0])] if shape else next(numbers)

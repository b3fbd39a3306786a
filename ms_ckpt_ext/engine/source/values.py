"""Small things out of a checkpoint as values: training scalars, text."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, outside_of
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_indexes
from ms_ckpt_ext.storage.reader import ReaderPool

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
    """One small tensor, read in one go."""
    file = next(iter(tensor.placements[0].holders.values()))[0]
    data = b""
    for offset, length in catalog.stored(file, tensor.stored_name):
        part = bytearray(length)
        readers.read_into(file, offset, memoryview(part))
        data += part
    if tensor.meta.dtype.name == TEXT:
        return decode_text(data)
    dtype = NUMPY.get(tensor.meta.dtype.name)
    flat = np.frombuffer(data, np.dtype(dtype or "u1"))
    return flat.reshape(tensor.meta.shape) if dtype else flat

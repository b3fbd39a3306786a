"""What every reader of this package returns: where each tensor of one file lies, and nothing of its contents."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DType, Shape
from ms_ckpt_ext.core.planning.io_units import Extent

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.checksum import Covered

BUDGET = 1 << 30
"""Most bytes that a table of contents may take beyond its file's size: some two million tensors without contents, more
than the longest header of safetensors can list."""

CRC_NUM = "crc_num"
"""MindSpore's metadata key of a file's checksum, a decimal number."""
MAX_RANK = 32
"""Most axes of a tensor: numpy's limit below 2.0, and more than MindSpore allows."""


def countable(dtype: DType, shape: Shape) -> bool:
    """Whether an array can have this shape: numpy counts bytes in 63 bits, taking axes without extent as 1.

    >>> from ms_ckpt_ext.core.geometry.array import DTYPES
    >>> countable(DTYPES["F32"], (0, 1 << 60)), countable(DTYPES["F32"], (0, 1 << 61))
    (True, False)
    """
    return dtype.nbytes(prod(extent for extent in shape if extent)) < 1 << 63


class TensorEntry(NamedTuple):
    """A tensor as it lies in a file: row-major, little-endian; its bytes are the extents one after another."""

    dtype: DType
    shape: Shape
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum([extent.length for extent in self.extents])


class FileIndex(NamedTuple):
    """Table of contents of one file.

    Attributes:
        path: the file.
        size: its length in bytes, as it lies on disk.
        mtime_ns: its modification time, to notice a source that changes under a run.
        tensors: name -> entry, in file order.
        metadata: the file's own notes (safetensors `__metadata__`); empty for formats that have none.
        reader: how its bytes are read: "plain", or the container it is encrypted in ("AES-GCM", "chunked", …).
    """

    path: str
    size: int
    mtime_ns: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = MappingProxyType({})
    reader: str = "plain"


class TensorSpec(NamedTuple):
    """A tensor that is to be written: what a writer must know before a byte moves."""

    name: str
    dtype: DType
    shape: Shape


class Checksum(NamedTuple):
    """A CRC-32 that a file carries of itself.

    Attributes:
        parts: what it covers, in order.
        offset: where the literal begins that holds it.
        render: checksum -> that literal, of a constant length.
    """

    parts: tuple[Covered, ...]
    offset: int
    render: Callable[[int], bytes]


class FileLayout(NamedTuple):
    """A file that is to be written, with every offset known: the finished framing, and holes for the tensors.

    Attributes:
        size: length of the whole file in bytes.
        literals: (offset, bytes) of everything that is not tensor contents: headers, tags, lengths.
        tensors: name -> where the tensor's bytes go; literals and extents together cover the file exactly.
        checksum: what is to replace one of the literals when all else is in place.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    tensors: Mapping[str, TensorEntry]
    checksum: Optional[Checksum] = None

    @property
    def fixed(self) -> tuple[tuple[int, bytes], ...]:
        """The literals that stay as they are."""
        return tuple(item for item in self.literals if self.checksum is None or item[0] != self.checksum.offset)

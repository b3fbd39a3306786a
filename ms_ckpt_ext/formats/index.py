"""What every reader of this package returns: where each tensor of one file lies, and nothing of its contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ms_ckpt_ext.core.dtype import DType
from ms_ckpt_ext.core.reads import Extent
from ms_ckpt_ext.core.region import Shape


class TensorEntry(NamedTuple):
    """A tensor as it lies in a file: row-major, little-endian; its bytes are the extents one after another."""

    dtype: DType
    shape: Shape
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(extent.length for extent in self.extents)


@dataclass(frozen=True)
class FileIndex:
    """Table of contents of one file.

    Attributes:
        path: the file.
        size: its length in bytes, as it lies on disk.
        mtime_ns: its modification time, to notice a source that changes under a run.
        tensors: name -> entry, in file order.
        metadata: the file's own notes (safetensors `__metadata__`); empty for formats that have none.
        reader: what its bytes come through: "plain", or the container it is encrypted in ("AES-GCM", "chunked", …).
    """

    path: str
    size: int
    mtime_ns: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    reader: str = "plain"


class TensorSpec(NamedTuple):
    """A tensor that is to be written: what a writer must know before a byte moves."""

    name: str
    dtype: DType
    shape: Shape


@dataclass(frozen=True)
class FileLayout:
    """A file that is to be written, with every offset known: the framing as it is, and holes for the tensors.

    Attributes:
        size: length of the whole file in bytes.
        literals: (offset, bytes) of everything that is not tensor contents: headers, tags, lengths.
        tensors: name -> where the tensor's bytes go; literals and extents together cover the file exactly.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    tensors: Mapping[str, TensorEntry]

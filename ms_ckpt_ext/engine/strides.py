"""Strided copies between flat arrays of bytes."""

from __future__ import annotations

from typing import Any

from ms_ckpt_ext.core.strided import StridedCopy

_FEW = 64
"""Runs that are copied one by one sooner than numpy is imported, or its arrays made."""


def copy_strided(copy: StridedCopy, source: Any, target: Any) -> None:
    """Make one strided copy. `source` and `target` are flat bytes: uint8 arrays, or anything that is a buffer."""
    if copy.nbytes <= _FEW * copy.run:
        for lying, landing in copy.runs():
            target[landing : landing + copy.run] = source[lying : lying + copy.run]
    else:
        _copy_many(copy, source, target)


def _copy_many(copy: StridedCopy, source: Any, target: Any) -> None:
    import numpy as np  # takes longer than all else that a file job imports, and many jobs never come here

    grain = copy.run if copy.run in (2, 4, 8) else 1  # a transposed matrix: runs of one element
    shape, dtype = (*copy.counts, copy.run // grain), np.dtype(f"u{grain}")
    lying: Any = np.ndarray(shape, dtype, source, copy.source, (*copy.source_strides, grain))
    landing: Any = np.ndarray(shape, dtype, target, copy.target, (*copy.target_strides, grain))
    landing[...] = lying

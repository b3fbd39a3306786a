"""Strided copies between flat arrays of bytes, made by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from ms_ckpt_ext.core.strided import StridedCopy


def copy_strided(copy: StridedCopy, source: Any, target: Any) -> None:
    """Make one strided copy. `source` and `target` are flat bytes: uint8 arrays, or anything that is a buffer."""
    if not copy.counts:
        target[copy.target : copy.target + copy.run] = source[copy.source : copy.source + copy.run]
        return
    grain = copy.run if copy.run in (2, 4, 8) else 1  # a transposed matrix: runs of one element
    shape, dtype = (*copy.counts, copy.run // grain), np.dtype(f"u{grain}")
    lying: Any = np.ndarray(shape, dtype, source, copy.source, (*copy.source_strides, grain))
    landing: Any = np.ndarray(shape, dtype, target, copy.target, (*copy.target_strides, grain))
    landing[...] = lying

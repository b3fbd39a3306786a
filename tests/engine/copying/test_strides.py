"""Strided copies against numpy: matrices transposed within larger ones, in elements of every width."""

from __future__ import annotations

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.strided import StridedCopy
from ms_ckpt_ext.engine.copying.strides import copy_strided


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 200), (31, 33), (32, 32), (100, 70), (65, 3), (200, 1)])
@pytest.mark.parametrize("matrices", [1, 3])
def test_a_transposed_part(width: int, rows: int, columns: int, matrices: int) -> None:
    rng = np.random.default_rng(width)
    source = rng.integers(0, 256, (matrices, rows, columns + 5, width), np.uint8)
    target = np.zeros((matrices, columns, rows + 7, width), np.uint8)
    copy = StridedCopy(
        run=width,
        counts=(matrices, rows, columns),
        source=2 * width,
        source_strides=(source[0].nbytes, (columns + 5) * width, width),
        target=3 * width,
        target_strides=(target[0].nbytes, width, (rows + 7) * width),
    )
    copy_strided(copy, source.reshape(-1), target.reshape(-1))
    expected = np.zeros_like(target)
    expected[:, :, 3 : 3 + rows] = source[:, :, 2 : 2 + columns].transpose(0, 2, 1, 3)
    assert target.tobytes() == expected.tobytes()

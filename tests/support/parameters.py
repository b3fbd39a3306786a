"""Parameters of Cells: made with wrong values, and what they hold. MindSpore is imported when one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support.checkpoints import Stored

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "I64": "int64"}


def poisoned(tensors: Mapping[str, Stored]) -> Any:
    """A Cell with Parameters of these names, shapes and dtypes, all values wrong."""
    import mindspore as ms

    cell = ms.nn.Cell()
    for number, (name, tensor) in enumerate(tensors.items()):
        poison = ms.Tensor(np.full(tensor.shape, 77), getattr(ms, _DTYPES[tensor.dtype]))
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(poison, name=name), check_name_contain_dot=False)
    return cell


def bytes_of(cell: Any) -> dict[str, bytes]:
    """What its Parameters hold."""
    return {p.name: np.ascontiguousarray(p.asnumpy()).tobytes() for p in cell.get_parameters()}


def held_by(cell: Any) -> dict[str, np.ndarray]:
    """The values of its Parameters, copied."""
    return {p.name: p.asnumpy().copy() for p in cell.get_parameters()}

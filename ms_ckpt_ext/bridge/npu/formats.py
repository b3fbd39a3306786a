"""Memory of Parameters that is in a format of its own, such as FRACTAL_NZ, which no view of it shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from mindspore import mint

from ms_ckpt_ext.bridge.memory import in_device_memory
from ms_ckpt_ext.bridge.npu.cutting import CARRIERS, NUMPY_CARRIERS
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.errors import UnsupportedError
from ms_ckpt_ext.transport.base import Bytes
from ms_ckpt_ext.transport.hccl import pinned

_FORMATTED = (ms.float16, ms.bfloat16, ms.float32, ms.int8, ms.uint8, ms.int32)
"""Types of matrices that operators want in formats of their own."""
_PLAIN = 2
"""ACL_FORMAT_ND."""
_MARKS = 64
"""Elements that are changed to see in which order they lie: more than a row of a block has in any format."""


def refuse_formats(parameters: Iterable[Any], argument: str) -> None:
    """Raise UnsupportedError for a Parameter whose bytes lie in another order on the device than its elements, such as
    FRACTAL_NZ. `argument` names what holds it.

    MindSpore 2.10 does not report the format, so it is tested: see `_lies_in_order`. Of Parameters whose names differ
    only in numbers, as those of layers do, one is tested.
    """
    kinds: dict[tuple[str, Shape, str], Any] = {}
    for parameter in parameters:
        matrix = parameter.dtype in _FORMATTED and len(parameter.shape) > 1 and 0 not in parameter.shape
        if matrix and in_device_memory(parameter):
            kinds.setdefault((re.sub(r"\d+", "#", parameter.name), parameter.shape, str(parameter.dtype)), parameter)
    for parameter in kinds.values():
        if not _lies_in_order(parameter):
            raise UnsupportedError(
                f"parameter {parameter.name!r} has been given a format of its own on the device, such as FRACTAL_NZ: "
                "its bytes are in another order than those of a checkpoint. Load before it is converted, or give it "
                "memory in the plain format first (set_data)",
                argument,
            )


def _lies_in_order(parameter: Any) -> bool:
    """Whether a copy to the first bytes of a Parameter's memory changes its first elements. They are put back.

    Views and copies between them take memory as it lies; `format_cast` and `asnumpy` of the Parameter itself heed its
    format.
    """
    carrier = CARRIERS.get(int(parameter.itemsize), ms.int8)
    flat = parameter.view(-1).view(carrier)
    marks = np.arange(1, 1 + min(_MARKS, flat.shape[0])).astype(NUMPY_CARRIERS[carrier])
    front, host = mint.narrow(flat, 0, 0, len(marks)), pinned(marks.nbytes)
    host[:] = marks.view(np.uint8)
    before = front.clone()
    front.copy_(ms.Tensor.from_numpy(host.view(marks.dtype)), non_blocking=True)
    try:
        seen = _first_elements(parameter, len(marks))
    finally:
        front.copy_(before)
        ms.runtime.current_stream().synchronize()  # until then `host` is read
    return bool(np.array_equal(seen, host))


def _first_elements(parameter: Any, count: int) -> Bytes:
    """Of a Parameter in whatever format, in the order of its elements, as bytes."""
    parameter = getattr(parameter, "parameter", parameter)  # under another name
    try:
        plain = ms.ops.auto_generate.format_cast(parameter, _PLAIN)
        held = mint.narrow(plain.view(-1), 0, 0, count).asnumpy()
    except (AttributeError, RuntimeError):  # there is no format_cast, or no memory for a copy
        held = parameter.asnumpy()
    return np.ascontiguousarray(held).reshape(-1)[:count].view(np.uint8)

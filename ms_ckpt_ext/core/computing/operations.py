"""The operations of weight rules. numpy is imported when something is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape
from ms_ckpt_ext.core.planning.recipes import Operand

if TYPE_CHECKING:
    from ms_ckpt_ext.core.computing.arithmetic import Floats

_AT_ONCE = 1 << 17
"""Elements that are computed in one go: what lies between source and result stays in a core's cache."""


class Fill(NamedTuple):
    """One element everywhere, from nothing."""

    element: bytes

    def takes(self, box: Region) -> tuple[Region, ...]:
        """See `Operation`."""
        return ()

    def gives(self, first: Region) -> Region:
        """See `Operation`."""
        return first

    def compute(self, box: Region, operands: Sequence[Operand], out: memoryview) -> None:
        """See `Operation`."""
        block = self.element * min(_AT_ONCE, box.size)
        for start in range(0, len(out), len(block)):
            part = out[start : start + len(block)]
            part[:] = block[: len(part)]


class Scaled(NamedTuple):
    """`factor` times every element of dtype `source`, in F32 (F64 for F64), rounded to dtype `output`."""

    factor: float
    source: str
    output: str

    def takes(self, box: Region) -> tuple[Region, ...]:
        """See `Operation`."""
        return (box,)

    def gives(self, first: Region) -> Region:
        """See `Operation`."""
        return first

    def compute(self, box: Region, operands: Sequence[Operand], out: memoryview) -> None:
        """See `Operation`."""
        from ms_ckpt_ext.core.computing.arithmetic import rounded_into

        (operand,) = operands
        for part, values in _by_rows(box, operand, self.source):
            with _ieee():
                rounded_into(values * values.dtype.type(self.factor), self.output, _part(out, box, part))


class Dequantized(NamedTuple):
    """Elements of dtype `source` times the scale of their block, in F32, rounded to dtype `output`.

    Attributes:
        source: dtype of the elements; F4 for two in a byte, along the last axis.
        scale: dtype of the scales.
        block: extent of a block along every axis.
    """

    source: str
    scale: str
    output: str
    block: Shape

    @property
    def _packed(self) -> int:
        """Elements in an element of the first operand."""
        return 2 if self.source == "F4" else 1

    def takes(self, box: Region) -> tuple[Region, ...]:
        """See `Operation`: the elements, and the scales."""
        low = tuple(at // extent for at, extent in zip(box.start, self.block))
        high = tuple((at - 1) // extent + 1 for at, extent in zip(box.stop, self.block))
        return _stored(box, self._packed), Region(low, high)

    def gives(self, first: Region) -> Region:
        """See `Operation`."""
        many = self._packed
        return Region((*first.start[:-1], first.start[-1] * many), (*first.stop[:-1], first.stop[-1] * many))

    def compute(self, box: Region, operands: Sequence[Operand], out: memoryview) -> None:
        """See `Operation`."""
        from ms_ckpt_ext.core.computing.arithmetic import decoded, expanded, rounded_into

        values, scales = operands
        scale = decoded(scales.bytes, self.scale).reshape(scales.region.shape)
        for axis in range(len(box.shape)):
            if axis != len(box.shape) - 2:  # rows are left to the last: many have one scale
                corners = scales.region.start[axis], box.start[axis], box.stop[axis]
                scale = expanded(scale, axis, *corners, self.block[axis])
        packed = self._packed
        for part, found in _by_rows(box, values, self.source, packed):
            with _ieee():
                self._multiply(found, scale, box, part, scales.region)
            rounded_into(found, self.output, _part(out, box, part))

    def _multiply(self, values: Floats, scale: Floats, box: Region, part: Region, scales: Region) -> None:
        """Multiply values, the elements of `part`, in place."""
        outer = tuple(low - first for low, first in zip(part.start[:-2], box.start))
        if len(part.shape) < 2:
            values *= scale
            return
        factors, extent, first = scale[outer], self.block[-2], scales.start[-2]
        low, high = part.start[-2], part.stop[-2]
        rows = values.reshape(part.shape[-2:])
        for number in range(low // extent, (high - 1) // extent + 1):
            here = slice(max(number * extent, low) - low, min((number + 1) * extent, high) - low)
            rows[here] *= factors[number - first]


class AddedProduct(NamedTuple):
    """A matrix plus `factor` times the product of two others, in F32 (F64 for a matrix of F64), rounded to `output`.

    The product is summed up along its inner axis, index by index, so that no tile or library changes a bit of it.

    Attributes:
        dtypes: of the three matrices.
        rank: extent of the inner axis.
    """

    factor: float
    dtypes: tuple[str, str, str]
    rank: int
    output: str

    def takes(self, box: Region) -> tuple[Region, ...]:
        """See `Operation`: the box itself, its rows of the left matrix, its columns of the right one."""
        (top, left), (bottom, right) = box.start, box.stop
        return box, Region((top, 0), (bottom, self.rank)), Region((0, left), (self.rank, right))

    def gives(self, first: Region) -> Region:
        """See `Operation`."""
        return first

    def compute(self, box: Region, operands: Sequence[Operand], out: memoryview) -> None:
        """See `Operation`."""
        import numpy as np

        from ms_ckpt_ext.core.computing.arithmetic import rounded_into

        _, rows, columns = self.takes(box)
        kind = np.float64 if self.dtypes[0] == "F64" else np.float32
        left: Floats = np.asarray(_box(operands[1], rows, self.dtypes[1]), kind)
        right: Floats = np.asarray(_box(operands[2], columns, self.dtypes[2]), kind)
        for part, values in _by_rows(box, operands[0], self.dtypes[0]):
            here = left[part.start[0] - box.start[0] : part.stop[0] - box.start[0]]
            with _ieee():
                total: Floats = here[:, :1] * right[:1]
                for index in range(1, self.rank):
                    total += here[:, index : index + 1] * right[index : index + 1]
                total *= kind(self.factor)
                total += values
            rounded_into(total, self.output, _part(out, box, part))


def _box(operand: Operand, box: Region, dtype: str) -> Floats:
    """The values of a box of an operand."""
    import numpy as np

    parts = [values for _, values in _by_rows(box, operand, dtype)]
    return np.concatenate(parts)


def _ieee() -> Any:
    """Infinities and NaN are results like others."""
    import numpy as np

    return np.errstate(over="ignore", invalid="ignore", under="ignore")


def _parts(box: Region) -> Iterator[Region]:
    """A box cut into rows of its matrices, at most `_AT_ONCE` elements together, or one row."""
    if len(box.shape) < 2:
        yield box
        return
    *outer, (top, bottom), (left, right) = zip(box.start, box.stop)
    step = max(1, _AT_ONCE // box.shape[-1])
    for matrix in product(*(range(low, high) for low, high in outer)):
        behind = tuple(index + 1 for index in matrix)
        for low in range(top, bottom, step):
            yield Region((*matrix, low, left), (*behind, min(low + step, bottom), right))


def _stored(box: Region, packed: int) -> Region:
    """The box of stored elements that hold a box, `packed` of whose elements are in each, along the last axis."""
    if packed == 1:
        return box
    return Region((*box.start[:-1], box.start[-1] // packed), (*box.stop[:-1], -(-box.stop[-1] // packed)))


def _by_rows(box: Region, operand: Operand, dtype: str, packed: int = 1) -> Iterator[tuple[Region, Floats]]:
    """The elements of a box, a few rows at a time: which, and their values, in memory of their own or read-only."""
    import numpy as np

    from ms_ckpt_ext.core.computing.arithmetic import decoded

    width = 1 if packed > 1 else DTYPES[dtype].bits // 8
    held = np.frombuffer(operand.bytes, np.uint8).reshape((*operand.region.shape, width))
    for part in _parts(box):
        stored = _stored(part, packed).relative_to(operand.region.start)
        values = decoded(memoryview(np.ascontiguousarray(held[stored.slices])).cast("B"), dtype)
        if packed > 1:
            skip = part.start[-1] % packed
            rows = values.reshape(*stored.shape[:-1], packed * stored.shape[-1])
            values = rows[..., skip : skip + part.shape[-1]]
        yield part, values.reshape(part.shape)


def _part(out: memoryview, box: Region, part: Region) -> memoryview:
    """Where a part of a box, whole rows of it, lies in its bytes."""
    width = len(out) // box.size
    number = 0
    for low, first, extent in zip(part.start, box.start, box.shape):
        number = number * extent + low - first
    return out[number * width : (number + part.size) * width]

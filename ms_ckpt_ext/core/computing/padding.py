"""Axes made longer with one value, or cut off: vocabularies that do not divide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Optional

from ms_ckpt_ext.core.computing.operations import Fill
from ms_ckpt_ext.core.computing.rules import computed
from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape
from ms_ckpt_ext.core.planning.joining import axis_of, unsaid_count
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta
from ms_ckpt_ext.core.planning.recipes import Block, Computation, made_of
from ms_ckpt_ext.core.planning.rule import Names, Rule, checked_int, only_one, set_fields
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError


@dataclass(frozen=True)
class Pad(Rule):
    """The source with elements of one `value` behind it, so that `axis` has `size` indices: vocabularies.

    `source_size`, the indices before, is checked, and needed for the inverse, which is `Crop`.
    """

    size: int
    axis: int
    value: float
    source_size: Optional[int]

    takes = ("source",)

    def __init__(
        self,
        sources: Names,
        target: str,
        size: int,
        axis: int = 0,
        value: float = 0.0,
        source_size: Optional[int] = None,
    ) -> None:
        super().__init__(sources, target)
        _set_fields(self, size, axis, value, source_size)
        if self.source_size is not None and self.source_size > self.size:
            raise UsageError(f"rule for {target!r}: Pad makes {size} indices of {source_size}; use Crop")

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = only_one(name, members)
        shape, dtype = tensor.meta.shape, tensor.meta.dtype
        at = axis_of(name, self.axis, len(shape))
        _check_extent(name, shape, at, self.source_size)
        if shape[at] > self.size:
            raise LayoutMismatchError(f"{name!r}: axis {at} of {list(shape)} is longer than {self.size}; use Crop")
        if dtype.bits % 8:
            raise LayoutMismatchError(f"{name!r} is {dtype.name}, narrower than a byte, and cannot be padded")
        whole = (*shape[:at], self.size, *shape[at + 1 :])
        axes, start = tuple(range(len(shape))), (0,) * len(shape)
        blocks = [Block(tensor, Region.whole(shape), axes, start)]
        if shape[at] < self.size:
            rest = (*shape[:at], self.size - shape[at], *shape[at + 1 :])
            fill = computed(
                TensorMeta(name, dtype, rest), Computation(Fill(_element(name, self.value, dtype.name)), ())
            )
            blocks.append(Block(fill, Region.whole(rest), axes, (*start[:at], shape[at], *start[at + 1 :])))
        return made_of(name, whole, whole, blocks)

    def inverse(self) -> Rule:
        """See `Rule`."""
        assert self.source_size is not None
        (source,) = self.sources
        return Crop(self.target, source, self.source_size, self.axis, self.size, self.value)

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return _unsaid(self, self.source_size)


@dataclass(frozen=True)
class Crop(Rule):
    """The first `size` indices of the source along `axis`: a vocabulary without its padding.

    `source_size`, the indices before, is checked, and needed for the inverse, which is `Pad` with `value`: what was cut
    off does not come back.
    """

    size: int
    axis: int
    source_size: Optional[int]
    value: float

    takes = ("source",)

    def __init__(
        self,
        sources: Names,
        target: str,
        size: int,
        axis: int = 0,
        source_size: Optional[int] = None,
        value: float = 0.0,
    ) -> None:
        super().__init__(sources, target)
        _set_fields(self, size, axis, value, source_size)
        if self.source_size is not None and self.source_size < self.size:
            raise UsageError(f"rule for {target!r}: Crop makes {size} indices of {source_size}; use Pad")

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = only_one(name, members)
        shape = tensor.meta.shape
        at = axis_of(name, self.axis, len(shape))
        _check_extent(name, shape, at, self.source_size)
        if shape[at] < self.size:
            raise LayoutMismatchError(f"{name!r}: axis {at} of {list(shape)} is shorter than {self.size}; use Pad")
        whole = (*shape[:at], self.size, *shape[at + 1 :])
        block = Block(tensor, Region.whole(whole), tuple(range(len(shape))), (0,) * len(shape))
        return made_of(name, whole, whole, [block])

    def inverse(self) -> Rule:
        """See `Rule`."""
        assert self.source_size is not None
        (source,) = self.sources
        return Pad(self.target, source, self.source_size, self.axis, self.value, self.size)

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return _unsaid(self, self.source_size)


def _set_fields(rule: Rule, size: int, axis: int, value: float, source_size: Optional[int]) -> None:
    if not isinstance(value, Real) or not _in_range(value):
        raise UsageError(f"rule for {rule.target!r}: value must be a number that F64 can hold, got {value!r:.60}")
    set_fields(
        rule,
        size=checked_int(rule, "size", size, 1),
        axis=checked_int(rule, "axis", axis),
        value=value,
        source_size=None if source_size is None else checked_int(rule, "source_size", source_size, 1),
    )


def _in_range(value: float) -> bool:
    try:
        float(value)
    except OverflowError:  # an int that no float holds
        return False
    return True


def _unsaid(rule: Rule, source_size: Optional[int]) -> str:
    return unsaid_count(rule) or (
        "" if source_size else "it does not say how many indices its source has: give source_size="
    )


def _check_extent(name: str, shape: Shape, axis: int, known: Optional[int]) -> None:
    if known is not None and shape[axis] != known:
        raise LayoutMismatchError(
            f"{name!r}: axis {axis} of {list(shape)} does not have {known} indices, as source_size says"
        )


def _element(name: str, value: float, dtype: str) -> bytes:
    """One element of this value. Raises LayoutMismatchError: the dtype has none."""
    if str(float(value)) == "0.0" and dtype != "F8_E8M0":  # which has powers of two only
        return bytes(DTYPES[dtype].bits // 8)
    from ms_ckpt_ext.core.computing.arithmetic import element

    try:
        return element(value, dtype)
    except LayoutMismatchError as error:
        raise LayoutMismatchError(f"{name!r} cannot be padded with {value!r}: {error}") from error

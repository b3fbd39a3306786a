"""Rules that compute: block-quantised weights as floats, scaling, adapters.

They are declared as any other, and any layout can be cut from what they make: a rank reads the bytes of its own slice,
and the scales of the blocks that it touches. Elements are computed where they land, tile by tile.

A rule that computes is applied in its place among the others: it takes what the rules before it make, and the rules
behind it take what it makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import frexp, isfinite, isinf
from typing import Optional, Union

from ms_ckpt_ext.core.computing.operations import AddedProduct, Dequantized, Scaled
from ms_ckpt_ext.core.geometry.array import DTYPES, Shape
from ms_ckpt_ext.core.planning.joining import unsaid_count
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta
from ms_ckpt_ext.core.planning.recipes import Computation, joined_axes, packed_as_bytes, seen_as
from ms_ckpt_ext.core.planning.rule import Names, Rule, checked_ints, only_one, set_fields, shapes_of
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError

_OUTPUTS = ("BF16", "F16", "F32", "F64")
_QUANTISED = ("F8_E4M3", "F8_E5M2", "F4", "I8", "U8")
_NEEDY = _QUANTISED[:3]
"""Dtypes of elements that mean nothing without scales; integers may be meant as such."""
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Normal numbers of F32."""
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def _checked_dtype(rule: Rule, dtype: str, known: Sequence[str]) -> str:
    if dtype not in known:
        raise UsageError(f"rule for {rule.target!r}: dtype must be one of {', '.join(known)}, got {dtype!r}")
    return dtype


def _check_factor(name: str, factor: float, dtype: str) -> None:
    """Refuse a factor that F32 cannot hold, for what is computed in F32."""
    if dtype != "F64" and factor and not _LEAST <= abs(factor) <= _MOST:
        raise LayoutMismatchError(f"{name!r} is {dtype}, and {factor} is no normal number in F32")


def _checked_factor(rule: Rule, factor: float, zero: bool = True) -> float:
    try:
        if isinstance(factor, (int, float)) and not isinstance(factor, bool) and isfinite(factor) and (factor or zero):
            return float(factor)
    except OverflowError:  # an int that no float holds
        pass
    wanted = "a finite number" if zero else "a finite number other than 0"
    raise UsageError(f"rule for {rule.target!r}: factor must be {wanted}, got {factor!r}")


def _of_groups(scales: Shape, elements: Shape) -> bool:
    """Whether scales are of groups along the last axis of the elements, rather than a single one for all of them."""
    single = all(extent == 1 for extent in scales)
    return scales == elements[:-1] if scales and single else not single and len(scales) == len(elements) - 1


def computed(meta: TensorMeta, computation: Computation) -> SourceTensor:
    return SourceTensor(meta, "", (), computation)


@dataclass(frozen=True)
class Dequantize(Rule):
    """A weight that is stored in blocks with a scale each, as floats: element times scale, rounded to `dtype`.

    Sources are the elements and their scales. Elements: F8_E4M3, F8_E5M2, or FP4 (E2M1), two in a byte (I8, U8, F4),
    the first in its low bits; the last axis of the result is twice as long then, and where the scales lack the last
    axis of the elements (MXFP4, `X_blocks` of shape (…, groups, 16)) that is joined with the one before. Scales: F32,
    BF16, F16 or powers of two (F8_E8M0, U8), of which 255 is NaN.

    `block` is the extent of a block along the last axes, 0 for a whole axis, and one along the axes before; at the end
    of an axis blocks may reach over it. DeepSeek-V3 has (128, 128), MXFP4 (32,). A single scale is for all elements.

    The product is computed in F32 and rounded to the nearest, ties to even. With `{*}` in its names a rule is for all
    weights that have scales; what is stored in a quantised dtype must have them.
    """

    block: tuple[int, ...]
    dtype: str

    takes = ("elements", "scales")
    computes = True

    def __init__(
        self, sources: Names, target: str, block: Union[int, Sequence[int]] = (128, 128), dtype: str = "BF16"
    ) -> None:
        super().__init__(sources, target)
        extents = block if isinstance(block, Iterable) else (block,)
        set_fields(self, block=checked_ints(self, "block", extents, 0), dtype=_checked_dtype(self, dtype, _OUTPUTS[:3]))

    def members(self, tensors: Mapping[str, SourceTensor]) -> dict[str, list[list[SourceTensor]]]:
        """See `Rule`. Raises CoverageError: quantised elements lack their scales, or scales their elements."""
        found: dict[str, list[list[SourceTensor]]] = {}
        for name, slots in self.slots(tensors).items():
            elements, scales = slots
            if not scales and all(tensor.meta.dtype.name not in _NEEDY for tensor in elements.values()):
                continue  # not quantised
            found[name] = self.complete(name, slots)
        return found

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        elements, scales = (only_one(name, [tensors]) for tensors in members)
        told = shapes_of([elements, scales])
        stored, factors = elements.meta.dtype.name, scales.meta.dtype.name
        if stored not in _QUANTISED or factors not in _SCALES:
            raise LayoutMismatchError(
                f"{name!r} is to be dequantised of {stored} elements and {factors} scales ({told}); elements are one "
                f"of {', '.join(_QUANTISED)}, scales one of {', '.join(_SCALES)}"
            )
        packed = stored in ("F4", "I8", "U8")
        if stored == "F4":
            elements = packed_as_bytes(elements)
        if packed and _of_groups(scales.meta.shape, elements.meta.shape):
            elements = joined_axes(elements)
        shape = elements.meta.shape
        if packed and shape:
            shape = (*shape[:-1], 2 * shape[-1])
        block = self._block(name, shape, scales, told)
        operation = Dequantized(
            "F4" if packed else stored, "F8_E8M0" if factors == "U8" else factors, self.dtype, block
        )
        if len(scales.meta.shape) != len(shape):  # one for all
            scales = seen_as(scales, (1,) * len(shape))
        return computed(TensorMeta(name, DTYPES[self.dtype], shape), Computation(operation, (elements, scales)))

    def _block(self, name: str, shape: Shape, scales: SourceTensor, told: str) -> Shape:
        """The extent of a block along every axis."""
        held = scales.meta.shape
        if shape and all(extent == 1 for extent in held):
            return shape
        block = ((1,) * len(shape) + self.block)[-len(shape) :] if shape else ()
        block = tuple(extent or whole for extent, whole in zip(block, shape))
        if not shape or tuple(-(-whole // extent) for whole, extent in zip(shape, block)) != held:
            wanted = [-(-whole // extent) for whole, extent in zip(shape, block)]
            raise LayoutMismatchError(
                f"{name!r} of shape {list(shape)} in blocks of {list(block)} has scales of shape {wanted}, but they "
                f"are {list(held)} ({told}): give block= as the checkpoint's config has it"
            )
        return block

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return (
            "elements were rounded when they were quantised, and which scales were chosen is not known: what it makes "
            f"is written as {self.dtype}; leave the rule out on the way back"
        )


@dataclass(frozen=True)
class Scale(Rule):
    """The source times `factor`, rounded to `dtype` (BF16, F16, F32 or F64; by default that of the source).

    The factor is rounded to F32 and the product computed in F32 (F64 for a source of F64), then rounded to the nearest,
    ties to even. A factor of 1 with another `dtype` is a cast.
    """

    factor: float
    dtype: Optional[str]

    takes = ("source",)
    computes = True

    def __init__(self, sources: Names, target: str, factor: float = 1.0, dtype: Optional[str] = None) -> None:
        super().__init__(sources, target)
        set_fields(self, factor=_checked_factor(self, factor, zero=False))
        set_fields(self, dtype=None if dtype is None else _checked_dtype(self, dtype, _OUTPUTS))

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = only_one(name, members)
        source = tensor.meta.dtype.name
        if source not in _OUTPUTS:
            raise LayoutMismatchError(
                f"{name!r} is made of {source} elements ({shapes_of([tensor])}), and only those of "
                f"{', '.join(_OUTPUTS)} can be scaled"
            )
        _check_factor(name, self.factor, source)
        output = self.dtype or source
        meta = TensorMeta(name, DTYPES[output], tensor.meta.shape)
        return computed(meta, Computation(Scaled(self.factor, source, output), (tensor,)))

    def inverse(self) -> Rule:
        """See `Rule`."""
        (source,) = self.sources
        return Scale(self.target, source, 1 / self.factor)

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        if self.dtype is not None:
            return f"it rounds to {self.dtype}, and from which dtype is not known"
        if abs(frexp(self.factor)[0]) != 0.5 or isinf(1 / self.factor):
            return f"products with {self.factor} are rounded; only powers of two can be divided out exactly"
        return unsaid_count(self)


@dataclass(frozen=True)
class AddProduct(Rule):
    """A matrix plus `factor` times the product of two others: an adapter (LoRA) merged into its weight, W + s · B A.

    Sources are W of shape (m, n), B (m, r) and A (r, n). Computed in F32 (F64 where W is), the product summed up index
    by index along r; rounded to `dtype` (by default that of W), to the nearest, ties to even. A W without adapters
    stays as it is, so with placeholders, or `{*}`, a rule is for all that have them.
    """

    factor: float
    dtype: Optional[str]

    takes = ("W", "B", "A")
    computes = True

    def __init__(self, sources: Names, target: str, factor: float = 1.0, dtype: Optional[str] = None) -> None:
        super().__init__(sources, target)
        set_fields(self, factor=_checked_factor(self, factor))
        set_fields(self, dtype=None if dtype is None else _checked_dtype(self, dtype, _OUTPUTS))

    def members(self, tensors: Mapping[str, SourceTensor]) -> dict[str, list[list[SourceTensor]]]:
        """See `Rule`. Raises CoverageError: half of an adapter is there, or an adapter without its weight."""
        slots = self.slots(tensors).items()
        return {name: self.complete(name, held) for name, held in slots if held[1] or held[2]}

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        held = [only_one(name, [tensors]) for tensors in members]
        shapes = [tensor.meta.shape for tensor in held]
        dtypes = [tensor.meta.dtype.name for tensor in held]
        if any(dtype not in _OUTPUTS for dtype in dtypes):
            raise LayoutMismatchError(
                f"{name!r} is made of {', '.join(dtypes)} ({shapes_of(held)}), and only {', '.join(_OUTPUTS)} can be "
                "multiplied"
            )
        w, b, a = shapes
        if not len(w) == len(b) == len(a) == 2 or b[0] != w[0] or a != (b[1], w[1]):
            raise LayoutMismatchError(
                f"{name!r} is W + B A of {shapes_of(held)}, whose shapes must be (m, n), (m, r) and (r, n): check the "
                "order of the sources, and that an adapter is of this model"
            )
        _check_factor(name, self.factor, dtypes[0])
        output = self.dtype or dtypes[0]
        operation = AddedProduct(self.factor, (dtypes[0], dtypes[1], dtypes[2]), b[1], output)
        return computed(TensorMeta(name, DTYPES[output], w), Computation(operation, tuple(held)))

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return "a weight and the adapter that was added to it cannot be told apart again"

"""Weight rules: parameters of the target, made of tensors of the source.

A rule is declarative: names with placeholders, and how the sources are arranged. Applied to what a checkpoint holds it
gives parameters that planning treats like stored ones: any layout can be cut from them, a rank reads only the bytes of
its own slice, and fusing happens where the pieces land. Nothing is computed: a rule moves elements. Those that compute
are in `core.computing.rules`.

A placeholder, `{layer}` or just `{}`, stands for digits, `{*}` for any text. What only a source has counts: its values
0, 1, 2, … are the members of a stack; where several count, every value of one is there with every value of the others.

`source_shapes` says what shapes the sources of a target have; with it `rule_inverses` turns every rule round.

>>> rule = QKV(["h.{i}.q", "h.{i}.k", "h.{i}.v"], "blocks.{i}.qkv", groups=8)
>>> rule.sources
('h.{i}.q', 'h.{i}.k', 'h.{i}.v')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Optional

from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.core.planning.joining import (
    axis_of,
    block_of,
    checked_shares,
    joined_in_groups,
    require_shares,
    taken_apart,
    unsaid_count,
    unsaid_shares,
    widths_of,
)
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.recipes import Block, made_of
from ms_ckpt_ext.core.planning.rule import (
    Names,
    Rule,
    all_of,
    checked_int,
    checked_ints,
    only_one,
    set_fields,
    shapes_of,
)
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError, true_or_false


class Rename(Rule):
    """The source under another name."""

    takes = ("source",)

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = only_one(name, members)
        return SourceTensor(tensor.meta._replace(name=name), tensor.stored_name, tensor.placements, tensor.recipe)

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        return [[shape]]


class Duplicate(Rename):
    """A second copy of a parameter that another rule makes: it is not read, and written on the way back."""

    def members(self, tensors: Mapping[str, SourceTensor]) -> dict[str, list[list[SourceTensor]]]:
        """Nothing: see `Rule`."""
        return {}


@dataclass(frozen=True)
class Concat(Rule):
    """Sources one after another along `axis`, as `numpy.concatenate`.

    `shares` says how wide the sources are against each other, (4, 1, 1) for instance: it is checked, and needed only
    to take the target apart again.
    """

    axis: int
    shares: Optional[tuple[int, ...]]

    def __init__(self, sources: Names, target: str, axis: int = 0, shares: Optional[Sequence[int]] = None) -> None:
        super().__init__(sources, target)
        set_fields(self, axis=checked_int(self, "axis", axis), shares=checked_shares(self, shares))

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        return joined_in_groups(name, all_of(members), 1, self.axis, self.shares)

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        return taken_apart(self, name, shape, 1, self.axis, self.shares)

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return unsaid_shares(self, self.shares) or unsaid_count(self)


@dataclass(frozen=True)
class QKV(Rule):
    """Sources cut into `groups` equal parts along `axis` and joined group by group: grouped query attention.

    With `groups` the number of key/value heads (query groups), rows become [queries of a group; its key; its value],
    …, as MindFormers and Megatron train; with `groups` the number of tensor-parallel ranks, every rank's slice is
    [q; k; v], as fused inference kernels want it. Biases (one axis) work alike. `shares`, as of `Concat`: (query heads
    a group, 1, 1).
    """

    groups: int
    axis: int
    shares: Optional[tuple[int, ...]]

    def __init__(
        self, sources: Names, target: str, groups: int, axis: int = 0, shares: Optional[Sequence[int]] = None
    ) -> None:
        super().__init__(sources, target)
        set_fields(self, groups=checked_int(self, "groups", groups, 1), axis=checked_int(self, "axis", axis))
        set_fields(self, shares=checked_shares(self, shares))

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        return joined_in_groups(name, all_of(members), self.groups, self.axis, self.shares)

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        return taken_apart(self, name, shape, self.groups, self.axis, self.shares)

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return unsaid_shares(self, self.shares) or unsaid_count(self)


@dataclass(frozen=True)
class Interleave(Rule):
    """Sources of one shape, alternating every `rows` indices along `axis`: gate and up projections, row by row."""

    axis: int
    rows: int

    def __init__(self, sources: Names, target: str, axis: int = 0, rows: int = 1) -> None:
        super().__init__(sources, target)
        set_fields(self, axis=checked_int(self, "axis", axis), rows=checked_int(self, "rows", rows, 1))

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensors = all_of(members)
        shape = _same_shape(name, tensors)
        extent = shape[axis_of(name, self.axis, len(shape))]
        if extent % self.rows:
            raise LayoutMismatchError(f"{name!r}: axis {self.axis} of {list(shape)} is no multiple of {self.rows} rows")
        return joined_in_groups(name, tensors, extent // self.rows, self.axis)

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        at = axis_of(name, self.axis, len(shape))
        if shape[at] % (self.rows * len(self.sources)):
            raise LayoutMismatchError(
                f"{name!r}: axis {at} of {list(shape)} is no multiple of {self.rows} rows of "
                f"{len(self.sources)} sources"
            )
        return taken_apart(self, name, shape, 1, self.axis, None)

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return unsaid_count(self)


@dataclass(frozen=True)
class Stack(Rule):
    """Sources of one shape along a new `axis`, as `numpy.stack`: experts, by a counting placeholder."""

    axis: int

    def __init__(self, sources: Names, target: str, axis: int = 0) -> None:
        super().__init__(sources, target)
        set_fields(self, axis=checked_int(self, "axis", axis))

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensors = all_of(members)
        shape = _same_shape(name, tensors)
        at = axis_of(name, self.axis, len(shape) + 1)
        whole = (*shape[:at], len(tensors), *shape[at:])
        axes = tuple(axis + (axis >= at) for axis in range(len(shape)))
        starts = (tuple(n if axis == at else 0 for axis in range(len(whole))) for n in range(len(tensors)))
        return made_of(name, whole, whole, [block_of(tensor, axes, start) for tensor, start in zip(tensors, starts)])

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        at = axis_of(name, self.axis, len(shape))
        each, rest = divmod(shape[at], len(self.sources))
        if rest or (each != 1 and not self.counts):
            raise LayoutMismatchError(
                f"{name!r}: axis {at} of {list(shape)} does not hold {len(self.sources)} sources, one an index"
            )
        return [[(*shape[:at], *shape[at + 1 :])] * each for _ in self.sources]


@dataclass(frozen=True)
class Transpose(Rule):
    """The source with its axes permuted by `axes`, as `numpy.transpose`; None reverses them."""

    axes: Optional[tuple[int, ...]]

    takes = ("source",)

    def __init__(self, sources: Names, target: str, axes: Optional[Sequence[int]] = None) -> None:
        super().__init__(sources, target)
        order = None if axes is None else checked_ints(self, "axes", axes)
        set_fields(self, axes=order)
        if order is not None and sorted(order) != [*range(len(order))]:
            raise UsageError(f"rule for {target!r}: axes {list(order)} do not permute {len(order)} axes")

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = only_one(name, members)
        shape = tensor.meta.shape
        order = self._order(name, shape)
        whole = tuple(shape[axis] for axis in order)
        place = tuple(order.index(axis) for axis in range(len(shape)))
        return made_of(name, whole, whole, [block_of(tensor, place, (0,) * len(shape))])

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        order = self._order(name, shape)
        return [[tuple(shape[order.index(axis)] for axis in range(len(shape)))]]

    def _order(self, name: str, shape: Shape) -> Shape:
        order = tuple(reversed(range(len(shape)))) if self.axes is None else self.axes
        if len(order) != len(shape):
            raise LayoutMismatchError(f"{name!r}: axes {list(order)} do not permute those of shape {list(shape)}")
        return order


@dataclass(frozen=True)
class Experts(Rule):
    """Matrices of experts, stacked by a counting placeholder; several sources (gate, up) side by side.

    Sources of shape (f, h) become (experts, h, f) when `transpose`, else (experts, f, h); several are joined along f.
    With `merge` the first two axes are one: (experts * h, f), as MindFormers trains grouped matrix multiplications.
    `experts`, their number, and `shares`, as of `Concat`, are checked, and needed to take the target apart again: the
    first with `merge`, the second with several sources.
    """

    transpose: bool
    merge: bool
    experts: Optional[int]
    shares: Optional[tuple[int, ...]]

    def __init__(
        self,
        sources: Names,
        target: str,
        transpose: bool = True,
        merge: bool = True,
        experts: Optional[int] = None,
        shares: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__(sources, target)
        set_fields(
            self,
            transpose=true_or_false(transpose, f"rule for {target!r}: transpose"),
            merge=true_or_false(merge, f"rule for {target!r}: merge"),
            experts=None if experts is None else checked_int(self, "experts", experts, 1),
            shares=checked_shares(self, shares),
        )

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        if any(len(tensor.meta.shape) != 2 for tensor in all_of(members)):
            raise LayoutMismatchError(f"{name!r}: experts must be matrices, got {shapes_of(all_of(members))}")
        widths, inners = zip(*(_same_shape(name, tensors) for tensors in members))
        require_shares(name, widths, self.shares, all_of(members))
        offsets = [0, *accumulate(widths)]
        experts, inner = max(map(len, members)), max(inners)
        if self.experts not in (None, experts):
            raise LayoutMismatchError(f"{name!r}: the rule speaks of {self.experts} experts, but there are {experts}")
        view = (experts, inner, offsets[-1]) if self.transpose else (experts, offsets[-1], inner)
        axes = (2, 1) if self.transpose else (1, 2)
        blocks = [
            block_of(tensor, axes, (number, 0, offset) if self.transpose else (number, offset, 0))
            for tensors, offset in zip(members, offsets)
            for number, tensor in enumerate(tensors)
        ]
        return made_of(name, (view[0] * view[1], view[2]) if self.merge else view, view, blocks)

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """See `Rule`."""
        if len(shape) != (2 if self.merge else 3):
            raise LayoutMismatchError(f"{name!r} of shape {list(shape)} does not hold experts as the rule says")
        experts = shape[0] if self.experts is None else self.experts
        view = (experts, shape[0] // experts, shape[1]) if self.merge else shape
        if view[0] != experts or prod(view) != prod(shape):
            raise LayoutMismatchError(f"{name!r} of shape {list(shape)} does not hold {experts} experts")
        inner, width = (view[1], view[2]) if self.transpose else (view[2], view[1])
        return [[(rows, inner)] * experts for rows in widths_of(self, name, width, self.shares)]

    @property
    def ambiguity(self) -> str:
        """See `Rule`."""
        return unsaid_shares(self, self.shares) or (
            "it does not say how many experts there are: give experts=" if self.merge and self.experts is None else ""
        )


@dataclass(frozen=True)
class Part(Rule):
    """Part `number` of `parts` equal parts of the source along `axis`: to take a fused tensor apart."""

    number: int
    parts: int
    axis: int

    takes = ("source",)

    def __init__(self, sources: Names, target: str, number: int, parts: int, axis: int = 0) -> None:
        super().__init__(sources, target)
        set_fields(self, number=checked_int(self, "number", number), parts=checked_int(self, "parts", parts))
        set_fields(self, axis=checked_int(self, "axis", axis))
        if not 0 <= self.number < self.parts:
            raise UsageError(f"rule for {target!r}: part {number} of {parts}; parts count from 0")

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = only_one(name, members)
        shape = list(tensor.meta.shape)
        at = axis_of(name, self.axis, len(shape))
        if shape[at] % self.parts:
            raise LayoutMismatchError(f"{name!r}: axis {at} of {shape} cannot be cut into {self.parts} equal parts")
        shape[at] //= self.parts
        start = tuple(self.number * shape[at] if axis == at else 0 for axis in range(len(shape)))
        region = Region(start, tuple(low + extent for low, extent in zip(start, shape)))
        block = Block(tensor, region, tuple(range(len(shape))), (0,) * len(shape))
        return made_of(name, tuple(shape), tuple(shape), [block])


def _same_shape(name: str, tensors: Sequence[SourceTensor]) -> Shape:
    shape, *others = {tensor.meta.shape for tensor in tensors}
    if others:
        raise LayoutMismatchError(f"{name!r}: its sources must have one shape, but they are {shapes_of(tensors)}")
    return shape

"""Weight rules: parameters of the target, made of tensors of the source.

A rule is declarative: names with placeholders, and how the sources are arranged. Applied to what a checkpoint holds it
gives parameters that planning treats like stored ones: any layout can be cut from them, a rank reads only the bytes of
its own slice, and fusing happens where the pieces land. Nothing is computed: a rule moves elements.

A placeholder, `{layer}` or just `{}`, stands for digits. One that a source has and the target has not counts: its
values 0, 1, 2, … are the members of a stack.

>>> rule = QKV(["h.{i}.q", "h.{i}.k", "h.{i}.v"], "blocks.{i}.qkv", groups=8)
>>> rule.sources
('h.{i}.q', 'h.{i}.k', 'h.{i}.v')
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Optional, Union

from ms_ckpt_ext.core.geometry.region import Region, Shape
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.pieces import Block, SourceTensor
from ms_ckpt_ext.core.planning.recipes import made_of, seen_as
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, UsageError

Names = Union[str, Sequence[str]]


@dataclass(frozen=True)
class Rule(ABC):
    """One or more sources that make one target.

    Attributes:
        sources: names in the checkpoint.
        target: name in the network.
    """

    sources: tuple[str, ...]
    target: str

    def __init__(self, sources: Names, target: str) -> None:
        object.__setattr__(self, "sources", (sources,) if isinstance(sources, str) else tuple(sources))
        object.__setattr__(self, "target", target)
        if not self.sources or not all(isinstance(name, str) and name for name in (*self.sources, target)):
            raise UsageError(f"a rule needs the names of its sources and of its target, got {sources!r} and {target!r}")

    @abstractmethod
    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """The target called `name`; `members` are the tensors of every source pattern, in the order of their counter.

        Raises LayoutMismatchError when shapes do not fit.
        """


def _set(rule: Rule, **fields: object) -> None:
    for name, value in fields.items():
        object.__setattr__(rule, name, value)


class Rename(Rule):
    """The source under another name."""

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = _only(name, members)
        return SourceTensor(tensor.meta._replace(name=name), tensor.stored_name, tensor.placements, tensor.recipe)


@dataclass(frozen=True)
class Concat(Rule):
    """Sources one after another along `axis`, as `numpy.concatenate`."""

    axis: int = 0

    def __init__(self, sources: Names, target: str, axis: int = 0) -> None:
        super().__init__(sources, target)
        _set(self, axis=axis)

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        return _grouped(name, _flat(members), 1, self.axis)


@dataclass(frozen=True)
class QKV(Rule):
    """Sources cut into `groups` equal parts along `axis` and joined group by group: grouped query attention.

    With `groups` the number of key/value heads (query groups), rows become [queries of a group; its key; its value],
    …, as MindFormers and Megatron train; with `groups` the number of tensor-parallel ranks, every rank's slice is
    [q; k; v], as fused inference kernels want it. Biases (one axis) work alike.
    """

    groups: int = 1
    axis: int = 0

    def __init__(self, sources: Names, target: str, groups: int, axis: int = 0) -> None:
        super().__init__(sources, target)
        _set(self, groups=groups, axis=axis)
        if groups < 1:
            raise UsageError(f"rule for {target!r}: groups must be at least 1, got {groups}")

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        return _grouped(name, _flat(members), self.groups, self.axis)


@dataclass(frozen=True)
class Interleave(Rule):
    """Sources of one shape, alternating every `rows` indices along `axis`: gate and up projections, row by row."""

    axis: int = 0
    rows: int = 1

    def __init__(self, sources: Names, target: str, axis: int = 0, rows: int = 1) -> None:
        super().__init__(sources, target)
        _set(self, axis=axis, rows=rows)

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensors = _flat(members)
        _same_shape(name, tensors)
        shape = tensors[0].meta.shape
        extent = shape[_axis(name, self.axis, len(shape))]
        if self.rows < 1 or extent % self.rows:
            raise LayoutMismatchError(f"{name!r}: axis {self.axis} of {list(shape)} is no multiple of {self.rows} rows")
        return _grouped(name, tensors, extent // self.rows, self.axis)


@dataclass(frozen=True)
class Stack(Rule):
    """Sources of one shape along a new axis, as `numpy.stack`: experts, by a counting placeholder."""

    axis: int = 0

    def __init__(self, sources: Names, target: str, axis: int = 0) -> None:
        super().__init__(sources, target)
        _set(self, axis=axis)

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensors = _flat(members)
        _same_shape(name, tensors)
        shape = tensors[0].meta.shape
        at = _axis(name, self.axis, len(shape) + 1)
        whole = (*shape[:at], len(tensors), *shape[at:])
        axes = tuple(axis + (axis >= at) for axis in range(len(shape)))
        starts = (tuple(n if axis == at else 0 for axis in range(len(whole))) for n in range(len(tensors)))
        return made_of(name, whole, whole, [_block(tensor, axes, start) for tensor, start in zip(tensors, starts)])


@dataclass(frozen=True)
class Transpose(Rule):
    """The source with its axes permuted, as `numpy.transpose`; None reverses them."""

    axes: Optional[tuple[int, ...]] = None

    def __init__(self, sources: Names, target: str, axes: Optional[Sequence[int]] = None) -> None:
        super().__init__(sources, target)
        _set(self, axes=None if axes is None else tuple(axes))

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = _only(name, members)
        shape = tensor.meta.shape
        order = tuple(reversed(range(len(shape)))) if self.axes is None else self.axes
        if sorted(order) != list(range(len(shape))):
            raise LayoutMismatchError(f"{name!r}: axes {list(order)} do not permute those of shape {list(shape)}")
        whole = tuple(shape[axis] for axis in order)
        place = tuple(order.index(axis) for axis in range(len(shape)))
        return made_of(name, whole, whole, [_block(tensor, place, (0,) * len(shape))])


@dataclass(frozen=True)
class Experts(Rule):
    """Matrices of experts, stacked by a counting placeholder; several sources (gate, up) side by side.

    Sources of shape (f, h) become (experts, h, f) when `transpose`, else (experts, f, h); several are joined along f.
    With `merge` the first two axes are one: (experts * h, f), as MindFormers trains grouped matrix multiplications.
    """

    transpose: bool = True
    merge: bool = True

    def __init__(self, sources: Names, target: str, transpose: bool = True, merge: bool = True) -> None:
        super().__init__(sources, target)
        _set(self, transpose=transpose, merge=merge)

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        if any(len(tensor.meta.shape) != 2 for tensor in _flat(members)):
            raise LayoutMismatchError(f"{name!r}: experts must be matrices, got {_shapes(_flat(members))}")
        widths = [tensors[0].meta.shape[0] for tensors in members]
        offsets = [0, *accumulate(widths)]
        experts, inner = len(members[0]), members[0][0].meta.shape[1]
        view = (experts, inner, offsets[-1]) if self.transpose else (experts, offsets[-1], inner)
        axes = (2, 1) if self.transpose else (1, 2)
        blocks = [
            _block(tensor, axes, (number, 0, offset) if self.transpose else (number, offset, 0))
            for tensors, offset in zip(members, offsets)
            for number, tensor in enumerate(tensors)
        ]
        return made_of(name, (view[0] * view[1], view[2]) if self.merge else view, view, blocks)


@dataclass(frozen=True)
class Part(Rule):
    """Part `number` of `parts` equal parts of the source along `axis`: to take a fused tensor apart."""

    number: int = 0
    parts: int = 1
    axis: int = 0

    def __init__(self, sources: Names, target: str, number: int, parts: int, axis: int = 0) -> None:
        super().__init__(sources, target)
        _set(self, number=number, parts=parts, axis=axis)
        if not 0 <= number < parts:
            raise UsageError(f"rule for {target!r}: part {number} of {parts}; parts count from 0")

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        tensor = _only(name, members)
        shape = list(tensor.meta.shape)
        at = _axis(name, self.axis, len(shape))
        if shape[at] % self.parts:
            raise LayoutMismatchError(f"{name!r}: axis {at} of {shape} cannot be cut into {self.parts} equal parts")
        shape[at] //= self.parts
        start = tuple(self.number * shape[at] if axis == at else 0 for axis in range(len(shape)))
        region = Region(start, tuple(low + extent for low, extent in zip(start, shape)))
        block = Block(tensor, region, tuple(range(len(shape))), (0,) * len(shape))
        return made_of(name, tuple(shape), tuple(shape), [block])


def apply_rules(tensors: Mapping[str, SourceTensor], rules: Iterable[Rule]) -> dict[str, SourceTensor]:
    """What a checkpoint holds, under the names and shapes of the target; what no rule uses keeps its name.

    A rule none of whose sources is there makes nothing.

    Raises:
        CoverageError: some sources of a target are there and others are not.
        LayoutMismatchError: shapes do not fit.
        UsageError: two rules make one target.
    """
    made: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for rule in rules:
        for name, members in _groups(rule, tensors).items():
            if name in made:
                raise UsageError(f"two rules make {name!r}; the second one is {rule}")
            flat = _flat(members)
            if len(flat) > 1 and any(tensor.recipe is not None for tensor in flat):
                raise UsageError(f"the rule for {name!r} needs stored tensors, but some are made by another rule")
            made[name] = _made(rule, name, members)
            used.update(tensor.meta.name for tensor in flat)
    kept = {name: tensor for name, tensor in tensors.items() if name not in used and name not in made}
    return {**made, **kept}


def _made(rule: Rule, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
    """`rule.make`, whose errors name the sources."""
    flat = _flat(members)
    empty = [tensor for tensor in flat if not all(tensor.meta.shape)]
    if empty and not isinstance(rule, Rename):
        raise LayoutMismatchError(
            f"{name!r} is made of {_shapes(empty)}, which has no elements: such a parameter can only be renamed; "
            "check the names of the rule, or leave this one out"
        )
    try:
        return rule.make(name, members)
    except LayoutMismatchError as error:
        if any(repr(tensor.meta.name) in str(error) for tensor in flat):
            raise
        raise LayoutMismatchError(f"{error}; it is made of {_shapes(flat)}") from error


def sources_among(names: Iterable[str], rules: Iterable[Rule]) -> list[str]:
    """Those of the names that are a source of one of the rules."""
    patterns = [Pattern(source) for rule in rules for source in rule.sources]
    return [name for name in names if any(pattern.match(name) is not None for pattern in patterns)]


def _groups(rule: Rule, tensors: Mapping[str, SourceTensor]) -> dict[str, list[list[SourceTensor]]]:
    """target name -> for every source pattern its tensors, by their counter."""
    target = Pattern(rule.target)
    found: dict[str, list[dict[tuple[int, ...], SourceTensor]]] = {}
    for number, source in enumerate(rule.sources):
        pattern = Pattern(source)
        for name, tensor in tensors.items():
            values = pattern.match(name)
            if values is None:
                continue
            slots = found.setdefault(target.fill(values), [{} for _ in rule.sources])
            counter = tuple(int(value) for key, value in values.items() if key not in target.keys)
            slots[number][counter] = tensor
    return {name: _complete(rule, name, slots) for name, slots in found.items()}


def _complete(rule: Rule, name: str, slots: list[dict[tuple[int, ...], SourceTensor]]) -> list[list[SourceTensor]]:
    wanted = sorted({counter for slot in slots for counter in slot})
    if len(wanted[0]) == 1:
        wanted = [(number,) for number in range(max(wanted)[0] + 1)]
    for source, slot in zip(rule.sources, slots):
        absent = [counter for counter in wanted if counter not in slot]
        if absent:
            which = f" for {', '.join(str(counter[0]) for counter in absent[:5])}" if any(absent) else ""
            raise CoverageError(
                f"{name!r} is made of {len(rule.sources)} sources, but the checkpoint has nothing called {source!r}"
                f"{which}: check that it is complete and that the rule's names are those of this model"
            )
    return [[slot[counter] for counter in wanted] for slot in slots]


def _only(name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
    tensors = _flat(members)
    if len(tensors) != 1:
        raise UsageError(f"the rule for {name!r} takes one source, but {len(tensors)} match: {_shapes(tensors)}")
    return tensors[0]


def _flat(members: Sequence[Sequence[SourceTensor]]) -> list[SourceTensor]:
    return [tensor for tensors in members for tensor in tensors]


def _block(tensor: SourceTensor, axes: tuple[int, ...], start: Shape) -> Block:
    return Block(tensor, Region.whole(tensor.meta.shape), axes, start)


def _grouped(name: str, tensors: Sequence[SourceTensor], groups: int, axis: int) -> SourceTensor:
    """Sources cut into groups along an axis and joined group by group."""
    shape = tensors[0].meta.shape
    at = _axis(name, axis, len(shape))
    outer, inner = shape[:at], shape[at + 1 :]
    for tensor in tensors:
        other = tensor.meta.shape
        if (other[:at], other[at + 1 :]) != (outer, inner) or other[at] % groups:
            raise LayoutMismatchError(
                f"{name!r}: {_shapes(tensors)} cannot be joined along axis {at}"
                + (f" in {groups} equal groups" if groups > 1 else "")
            )
    rows = [tensor.meta.shape[at] // groups for tensor in tensors]
    offsets = [0, *accumulate(rows)]
    blocks = []
    for tensor, width, offset in zip(tensors, rows, offsets):
        seen = seen_as(tensor, (*outer, groups, width, *inner))
        start = tuple(offset if number == at + 1 else 0 for number in range(len(shape) + 1))
        blocks.append(_block(seen, tuple(range(len(shape) + 1)), start))
    return made_of(name, (*outer, groups * offsets[-1], *inner), (*outer, groups, offsets[-1], *inner), blocks)


def _axis(name: str, axis: int, count: int) -> int:
    if not -count <= axis < count:
        raise LayoutMismatchError(f"{name!r}: there is no axis {axis} among {count}")
    return axis % count


def _same_shape(name: str, tensors: Sequence[SourceTensor]) -> None:
    if len({tensor.meta.shape for tensor in tensors}) > 1:
        raise LayoutMismatchError(f"{name!r}: its sources must have one shape, but they are {_shapes(tensors)}")


def _shapes(tensors: Sequence[SourceTensor]) -> str:
    told = [f"{tensor.meta.name!r} {list(tensor.meta.shape)}" for tensor in tensors[:4]]
    return ", ".join(told) + (", …" if len(tensors) > 4 else "")

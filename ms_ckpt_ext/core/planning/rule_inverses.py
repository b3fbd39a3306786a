"""Weight rules turned round: from a network's parameters back to the tensors that made them.

A rule lays its sources as boxes into a view of its target. The inverse takes a source to be a box of that view, with
the axes permuted back, so a rule that has shapes for its sources (`Rule.source_shapes`) has an inverse: nothing else
is written twice. The way back is exact, whatever the layout of the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.core.planning.recipes import Block, Recipe, made_of, seen_as
from ms_ckpt_ext.core.planning.rule import Rule, all_of, set_fields
from ms_ckpt_ext.core.planning.weight_rules import Concat, Part
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, UsageError


def invert(rules: Iterable[Rule]) -> list[Rule]:
    """The rules for the way back: what they make becomes what they are made of.

    `Part`s of one tensor are joined again. Where a rule leaves open what the way back needs (how wide the sources of a
    `Concat` are), it must say so: `shares=`, `experts=`, `source_size=`. Where rules compute, the way back goes through
    them from the last to the first.

    Raises:
        ArgumentTypeError: there is something else among the rules.
        UsageError: a rule has no inverse, or two rules have one source, which the way back would make twice; says
            which and why.

    >>> from ms_ckpt_ext.rules import Rename, Stack
    >>> [rule.sources for rule in invert([Rename("a", "b"), Stack("e.{n}", "all")])]
    [('b',), ('all',)]
    """
    given = list(rules) if isinstance(rules, Iterable) else [None]
    if not all(isinstance(rule, Rule) for rule in given):
        raise ArgumentTypeError("rules must be a list of rules from ms_ckpt_ext.rules")
    _refuse_twice(given)
    parts: dict[tuple[tuple[str, ...], int, int], dict[int, Part]] = {}
    back: list[Rule] = []
    for rule in given:
        if isinstance(rule, Part):
            parts.setdefault((rule.sources, rule.parts, rule.axis), {})[rule.number] = rule
        elif isinstance(rule, Inverse):
            back.append(rule.rule)
        elif rule.ambiguity:
            raise UsageError(f"{type(rule).__name__} to {rule.target!r} cannot be inverted: {rule.ambiguity}")
        else:
            back.append(rule.inverse() or Inverse(rule))
    back += [_joined(source, axis, found, count) for (source, count, axis), found in parts.items()]
    return back[::-1] if any(rule.computes for rule in given) else back


def _refuse_twice(rules: Sequence[Rule]) -> None:
    """Refuse to make one tensor in two ways. Parts of one tensor may differ in number only."""
    made: dict[str, list[Rule]] = {}
    for rule in rules:
        if isinstance(rule, Inverse):
            continue
        for source in dict.fromkeys(rule.sources):
            before = made.setdefault(source, [])
            if not all(_are_two_parts(rule, other) for other in before):
                raise UsageError(
                    f"{source!r} is used twice, so that it could come from two parameters ({rule.target!r} is one): "
                    "leave one of the rules out"
                )
            before.append(rule)
        if rule.computes:
            made.pop(rule.target, None)  # from here on it is what this rule makes


def _are_two_parts(one: Rule, other: Rule) -> bool:
    if not isinstance(one, Part) or not isinstance(other, Part):
        return False
    return (one.parts, one.axis) == (other.parts, other.axis) and one.number != other.number


def _joined(sources: tuple[str, ...], axis: int, found: Mapping[int, Part], count: int) -> Rule:
    (source,), absent = sources, next(number for number in itertools.count() if number not in found)
    if absent < count:
        raise UsageError(
            f"Part of {source!r} cannot be inverted: nothing takes part {absent} of {count}, so it would be lost"
        )
    return Concat([found[number].target for number in range(count)], source, axis=axis, shares=(1,) * count)


class _Origin(NamedTuple):
    """A source of a rule as a box of the rule's target.

    Attributes:
        shape: of the source.
        view: the source's shape, its axes split, with an axis of one for every axis of the target's view it lacks.
        region: the box in the target's view.
        axes: for every axis of the target's view that of `view`.
        start: where the box lies in `view`.
    """

    shape: Shape
    view: Shape
    region: Region
    axes: tuple[int, ...]
    start: Shape


class _Plan(NamedTuple):
    """What a rule makes a target of: the target's view (None: it is only renamed), and (source, counter) -> its box."""

    view: Optional[Shape]
    origins: Mapping[tuple[int, int], _Origin]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Inverse(Rule):
    """A rule turned round: its target's tensor makes what were its sources."""

    rule: Rule

    def __init__(self, rule: Rule) -> None:
        set_fields(self, sources=(rule.target,), target=rule.sources[0], rule=rule)

    def members(self, tensors: Mapping[str, SourceTensor]) -> dict[str, list[list[SourceTensor]]]:
        """See `Rule`."""
        pattern = Pattern(self.rule.target)
        found: dict[str, list[list[SourceTensor]]] = {}
        for name, tensor in tensors.items():
            values = pattern.match(name)
            if values is None:
                continue
            plan = _plan(self.rule, tensor.meta.shape)
            origin = [[tensor]] if plan.view is None else [[tensor], [seen_as(tensor, plan.view)]]
            for made in _names(self.rule, values, plan.counts):
                if made in found:
                    raise UsageError(f"the inverse of the rule for {self.rule.target!r} makes {made!r} twice")
                found[made] = origin
        return found

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`; the members are the tensor as it is, and as the forward rule sees it."""
        tensor, *others = all_of(members)
        if not others:
            return SourceTensor(tensor.meta._replace(name=name), tensor.stored_name, tensor.placements, tensor.recipe)
        (seen,), origin = others, _plan(self.rule, tensor.meta.shape).origins[self._which(name)]
        return made_of(name, origin.shape, origin.view, [Block(seen, origin.region, origin.axes, origin.start)])

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """Not defined: `invert` gives back the rule itself."""
        raise UsageError(f"the inverse of an inverse, for {name!r}, is the rule itself: use `invert`")

    def _which(self, name: str) -> tuple[int, int]:
        known = Pattern(self.rule.target).keys
        for number, source in enumerate(self.rule.sources):
            values = Pattern(source).match(name)
            if values is not None:
                return number, next((int(value) for key, value in values.items() if key not in known), 0)
        raise UsageError(f"{name!r} is no source of the rule for {self.rule.target!r}")


def _names(rule: Rule, values: Mapping[str, str], counts: Sequence[int]) -> Iterator[str]:
    """Names of the sources of one target, whose placeholders have these values."""
    for source, count in zip(rule.sources, counts):
        pattern = Pattern(source)
        counter = [key for key in pattern.keys if key not in values]
        if len(counter) > 1 or (count != 1 and not counter):
            raise UsageError(f"the rule for {rule.target!r} cannot be inverted: {source!r} does not say how it counts")
        for number in range(count):
            yield pattern.fill({**values, **{key: str(number) for key in counter}})


@lru_cache(maxsize=256)
def _plan(rule: Rule, shape: Shape) -> _Plan:
    """What a rule makes a target of this shape of, found by applying it to sources that are shapes only."""
    shapes = rule.source_shapes(rule.target, shape)
    counts = tuple(map(len, shapes))
    dtype = DTYPES["U8"]
    sources = [
        [stored_whole(TensorMeta(f"{n} {at}", dtype, one), ()) for at, one in enumerate(alike)]
        for n, alike in enumerate(shapes)
    ]
    made = rule.make(rule.target, sources)
    if made.meta.shape != shape:
        raise LayoutMismatchError(f"{rule.target!r} of shape {list(shape)} is not what {type(rule).__name__} makes")
    if not isinstance(made.recipe, Recipe):
        return _Plan(None, {}, counts)
    origins = {}
    for block, box in zip(made.recipe.blocks, made.recipe.arrangement.boxes):
        number, at = map(int, block.tensor.meta.name.split())
        origins[number, at] = _origin(shapes[number][at], block, box, made.recipe.view)
    return _Plan(made.recipe.view, origins, counts)


def _origin(shape: Shape, block: Block, box: Region, view: Shape) -> _Origin:
    """A block of a rule's recipe, turned round."""
    missing = [axis for axis in range(len(view)) if axis not in block.axes]
    extra = {axis: len(block.axes) + number for number, axis in enumerate(missing)}
    axes = tuple(block.axes.index(axis) if axis in block.axes else extra[axis] for axis in range(len(view)))
    if not shape:
        raise LayoutMismatchError("single values cannot be taken out of a stack: leave the rule out, and stack by hand")
    ones = (1,) * len(missing)
    start = (*block.region.start, *(0 for _ in missing))
    return _Origin(shape, (*block.tensor.meta.shape, *ones), box, axes, start)

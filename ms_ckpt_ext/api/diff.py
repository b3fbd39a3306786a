"""What changes for each parameter between two strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.api.arguments import as_strategy, path_of
from ms_ckpt_ext.api.source import Filter, Globs
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.describe import LayoutInfo, StrategyInfo, describe, describe_strategy
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.errors import FormatError, LayoutMismatchError, UsageError
from ms_ckpt_ext.storage.reader import read_json


class Side(NamedTuple):
    """A parameter in one strategy: its layout on every stage that has it, and the shape of its slices if known."""

    layouts: tuple[LayoutInfo, ...]
    slice_shape: Optional[Shape]

    def __str__(self) -> str:
        words = " / ".join(dict.fromkeys(map(str, self.layouts)))
        stages = [str(info.stage) for info in self.layouts]
        return words if stages == ["0"] else f"{words}; stage {' and '.join(stages)}"


class Change(NamedTuple):
    """A parameter whose layout is not the same.

    Attributes:
        a, b: before and after.
        what: what changes: "stage", "device matrix", "split", "optimizer shard", "copies".
        same_slices: True when every rank nevertheless holds the same slice in both.
    """

    name: str
    shape: Optional[Shape]
    a: Side
    b: Side
    what: tuple[str, ...]
    same_slices: bool


@dataclass(frozen=True)
class StrategyDiff:
    """Two strategies compared.

    Attributes:
        a, b: the strategies as a whole.
        changes: parameters whose layout changes, by name.
        unchanged: how many have the same layout in both.
        only_a, only_b: parameters that only one strategy lists.
    """

    a: StrategyInfo
    b: StrategyInfo
    changes: tuple[Change, ...]
    unchanged: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when both say the same about the same parameters for the same number of ranks."""
        worlds = (self.a.world, self.a.stages) == (self.b.world, self.b.stages)
        return worlds and not (self.changes or self.only_a or self.only_b)


def diff_strategy(a: Any, b: Any, *, shapes: Any = None, match: Globs = (), exclude: Globs = ()) -> StrategyDiff:
    """Compare two strategies: what changes for each parameter.

    Args:
        a, b: strategies in any form that `as_strategy` takes: a file, a directory with one per stage, a layout dict.
        shapes: whole shapes of parameters, which a strategy does not know: name -> {"dtype": "F32", "shape": [2, 3]},
            or the path of a JSON file with that. They give the shapes of slices.
        match, exclude: shell-style globs of parameter names.

    Returns:
        The parameters whose layout differs, how, and those that only one side lists; its `ok` is True where nothing
        differs.

    Raises:
        UsageError: globs that leave nothing to compare.
        StrategyError: a strategy cannot be read.
        LayoutMismatchError: a shape cannot be cut as a strategy says.
        FormatError, StorageError: the file with shapes cannot be read.
    """
    if a is None or b is None:
        raise UsageError("two strategies are compared: give both")
    one, two = as_strategy(a, argument="a"), as_strategy(b, argument="b")
    wanted = Filter(match, exclude)
    assert one is not None  # as_strategy gives None for None only
    assert two is not None
    wanted.check((*one.layouts, *two.layouts))
    known = _shapes(shapes)
    first, second = _names(one, wanted), _names(two, wanted)
    changes, unchanged = [], 0
    for name in sorted(first & second):
        change = _change(name, one, two, known.get(name))
        unchanged += change is None
        changes += [] if change is None else [change]
    return StrategyDiff(
        describe_strategy(one),
        describe_strategy(two),
        tuple(changes),
        unchanged,
        tuple(sorted(first - second)),
        tuple(sorted(second - first)),
    )


def _names(strategy: Strategy, wanted: Filter) -> set[str]:
    return {n for n in strategy.layouts if wanted(n) and not n.startswith(ACCUMULATED_GRADIENT_PREFIX)}


def _change(name: str, a: Strategy, b: Strategy, shape: Optional[Shape]) -> Optional[Change]:
    before, after = a.layouts[name], b.layouts[name]
    if dict(before) == dict(after):
        return None
    sides = [_side(name, strategy, shape) for strategy in (a, b)]
    return Change(name, shape, sides[0], sides[1], _what(sides[0].layouts, sides[1].layouts), _same(name, a, b))


def _side(name: str, strategy: Strategy, shape: Optional[Shape]) -> Side:
    stages = strategy.layouts[name]
    layouts = tuple(describe(layout, stage) for stage, layout in sorted(stages.items()))
    return Side(layouts, None if shape is None else _slice(name, next(iter(stages.values())), shape, strategy))


def _slice(name: str, layout: Layout, shape: Shape, strategy: Strategy) -> Shape:
    try:
        return layout.over(len(shape)).slice_shape(shape)
    except LayoutMismatchError as error:
        raise LayoutMismatchError(f"parameter {name!r} under {strategy.origin}: {error}") from error


def _what(a: Sequence[LayoutInfo], b: Sequence[LayoutInfo]) -> tuple[str, ...]:
    aspects = {
        "stage": lambda info: info.stage,
        "device matrix": lambda info: info.device_matrix,
        "split": lambda info: info.split,
        "optimizer shard": lambda info: info.optimizer_shard,
        "copies": lambda info: info.copies,
    }
    return tuple(word for word, aspect in aspects.items() if {*map(aspect, a)} != {*map(aspect, b)})


def _same(name: str, a: Strategy, b: Strategy) -> bool:
    """Whether every rank holds the same slice: a device matrix may be written in several ways."""
    if (a.world, a.devices_per_stage) != (b.world, b.devices_per_stage):
        return False
    before, after = a.layouts[name], b.layouts[name]
    return before.keys() == after.keys() and all(
        (before[stage].parts, before[stage].cells) == (after[stage].parts, after[stage].cells) for stage in before
    )


def _shapes(value: Any) -> dict[str, Shape]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return _read_shapes(value, "shapes")
    path = path_of(value, "shapes")
    return _read_shapes(read_json(path, "shapes"), repr(path))


def _read_shapes(content: Any, origin: str) -> dict[str, Shape]:
    try:
        found = {name: tuple(entry["shape"]) for name, entry in content.items()}
        if all(type(extent) is int and extent >= 0 for shape in found.values() for extent in shape):
            return found
    except (AttributeError, KeyError, TypeError):
        pass
    raise FormatError(f'{origin} must map parameter names to {{"dtype": "F32", "shape": [2, 3]}}')

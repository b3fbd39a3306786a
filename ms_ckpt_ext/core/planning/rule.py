"""What a weight rule is: one or more sources, by names with placeholders, that make one target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import ClassVar, Optional, Union

from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.planning.name_patterns import ANY, Pattern
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.errors import ArgumentTypeError, CoverageError, UsageError, integer

_SHOWN = 5
"""Of what is absent, in a message."""

Names = Union[str, Sequence[str]]


@dataclass(frozen=True)
class Rule(ABC):
    """One or more sources that make one target.

    Attributes:
        sources: names in the checkpoint.
        target: name in the network.
        takes: what every source is, where their number is fixed; empty where any number will do.
        computes: elements are computed, and rules behind it in a list take what it makes.

    Raises:
        UsageError: at birth, for arguments that the rule cannot have.
        LayoutMismatchError: where it is applied, for shapes or dtypes that do not fit it; names target and sources.
        CoverageError: where it is applied, for a source that the checkpoint lacks.
    """

    sources: tuple[str, ...]
    target: str
    takes: ClassVar[tuple[str, ...]] = ()
    computes: ClassVar[bool] = False

    def __init__(self, sources: Names, target: str) -> None:
        names = (sources,) if isinstance(sources, str) else tuple(sources) if isinstance(sources, Iterable) else ()
        set_fields(self, sources=names, target=target)
        if not self.sources or not all(isinstance(name, str) and name for name in (*self.sources, target)):
            raise UsageError(f"a rule needs the names of its sources and of its target, got {sources!r} and {target!r}")
        if self.takes and len(names) != len(self.takes):
            told = "one source" if len(self.takes) == 1 else f"{len(self.takes)} sources ({', '.join(self.takes)})"
            raise UsageError(f"rule for {target!r}: {type(self).__name__} takes {told}, got {sources!r}")
        keys = Pattern(target).keys
        for name in names:
            known = Pattern(name).keys
            if ANY in known and ANY not in keys:
                raise UsageError(
                    f"a source of the rule for {target!r} has {{*}} (any text), so the target must have it, too"
                )
            absent = [key for key in keys if key not in known]
            if absent:
                raise UsageError(
                    f"the target {target!r} has the placeholder {absent[0].lstrip('_')!r}, which its source {name!r} "
                    "does not have"
                )

    @abstractmethod
    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """The target called `name`; `members` are the tensors of every source pattern, in the order of their counter.

        Raises LayoutMismatchError when shapes do not fit.
        """

    def members(self, tensors: Mapping[str, SourceTensor]) -> dict[str, list[list[SourceTensor]]]:
        """Name of every target that can be made -> for every source pattern its tensors, by their counter.

        Raises CoverageError when some sources of a target are there and others are not.
        """
        return {name: self.complete(name, slots) for name, slots in self.slots(tensors).items()}

    def slots(self, tensors: Mapping[str, SourceTensor]) -> dict[str, list[dict[tuple[int, ...], SourceTensor]]]:
        """Name of every target of which a source is there -> for every source pattern counter -> tensor."""
        return _slots(self, tensors)

    def complete(self, name: str, slots: list[dict[tuple[int, ...], SourceTensor]]) -> list[list[SourceTensor]]:
        """The members of a target. Raises CoverageError when one is not there."""
        return _complete(self, name, slots)

    def inverse(self) -> Rule | None:
        """The rule for the way back, where it is one of another kind; None where that follows from `source_shapes`."""
        return None

    def source_shapes(self, name: str, shape: Shape) -> list[list[Shape]]:
        """The inverse of `make` in shapes: what makes a target of this shape, for every source pattern by its counter.

        Raises:
            LayoutMismatchError: nothing makes this shape.
            UsageError: the rule does not say enough, or is of a kind that has no inverse.
        """
        raise UsageError(f"{type(self).__name__} to {name!r} has no inverse: its class does not define `source_shapes`")

    @property
    def ambiguity(self) -> str:
        """What the rule leaves open that its inverse needs, and how to say it; "" when nothing."""
        return ""

    @property
    def counts(self) -> bool:
        """Whether a source has a placeholder that the target has not."""
        known = set(Pattern(self.target).keys)
        return any(not known.issuperset(Pattern(source).keys) for source in self.sources)


def _slots(rule: Rule, tensors: Mapping[str, SourceTensor]) -> dict[str, list[dict[tuple[int, ...], SourceTensor]]]:
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
            other = slots[number].setdefault(counter, tensor)
            if other is not tensor:
                which = f"number {' '.join(map(str, counter))} of what {target.text!r} is made of"
                raise UsageError(f"{other.meta.name!r} and {name!r} are both {which}: rename one, or leave it out")
    return found


def _complete(rule: Rule, name: str, slots: list[dict[tuple[int, ...], SourceTensor]]) -> list[list[SourceTensor]]:
    counters = {counter for slot in slots for counter in slot}
    values: list[Sequence[int]] = [sorted(set(column)) for column in zip(*counters)]
    if len(values) == 1:
        values = [range(min(values[0][-1] + 1, len(counters) + _SHOWN))]
    wanted = list(islice(product(*values), len(counters) + _SHOWN))  # of more, as many are absent as are shown
    for source, slot in zip(rule.sources, slots):
        absent = [counter for counter in wanted if counter not in slot]
        if absent:
            told = ", ".join(" ".join(map(str, counter)) for counter in absent[:_SHOWN])
            which = f" for {told}" if told else ""
            raise CoverageError(
                f"{name!r} is made of {len(rule.sources)} sources, but the checkpoint has nothing called {source!r}"
                f"{which}: check that it is complete and that the rule's names are those of this model"
            )
    return [[slot[counter] for counter in wanted] for slot in slots]


def all_of(members: Sequence[Sequence[SourceTensor]]) -> list[SourceTensor]:
    return [tensor for tensors in members for tensor in tensors]


def shapes_of(tensors: Sequence[SourceTensor]) -> str:
    told = [f"{tensor.meta.name!r} {list(tensor.meta.shape)}" for tensor in tensors[:4]]
    return ", ".join(told) + (", …" if len(tensors) > 4 else "")


def only_one(name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
    """The one source of a rule. Raises UsageError when there are more."""
    tensors = all_of(members)
    if len(tensors) != 1:
        raise UsageError(f"the rule for {name!r} takes one source, but {len(tensors)} match: {shapes_of(tensors)}")
    return tensors[0]


def checked_int(rule: Rule, name: str, value: object, least: Optional[int] = None) -> int:
    """An argument of a rule that is a whole number. Raises UsageError."""
    return integer(value, f"rule for {rule.target!r}: {name}", least)


def checked_ints(rule: Rule, name: str, values: object, least: Optional[int] = None) -> tuple[int, ...]:
    """An argument of a rule that is several whole numbers. Raises UsageError."""
    if not isinstance(values, Iterable):
        raise ArgumentTypeError(f"rule for {rule.target!r}: {name} must be whole numbers, got {values!r:.60}")
    return tuple(checked_int(rule, name, value, least) for value in values)


def set_fields(rule: Rule, /, **fields: object) -> None:
    """Set fields of a rule at its birth."""
    for name, value in fields.items():
        object.__setattr__(rule, name, value)

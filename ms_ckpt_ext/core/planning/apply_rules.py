"""Weight rules applied to what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.recipes import Recipe
from ms_ckpt_ext.core.planning.rule import Rule, all_of, shapes_of
from ms_ckpt_ext.core.planning.weight_rules import Duplicate, Rename
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError


def apply_rules(tensors: Mapping[str, SourceTensor], rules: Iterable[Rule]) -> dict[str, SourceTensor]:
    """What a checkpoint holds, under the names and shapes of the target; what no rule uses keeps its name.

    A rule none of whose sources is there makes nothing. Rules take what the checkpoint holds. One that computes is
    applied in its place: it takes what the rules before it make as well, and those behind it take what it makes.

    Raises:
        CoverageError: some sources of a target are there and others are not.
        LayoutMismatchError: shapes do not fit.
        UsageError: two rules make one target; or a rule that computes comes after one that moves what it takes.
    """
    return _Application(tensors).of(rules)


class _Application:
    """Rules being applied.

    Attributes:
        made: name -> what a rule made, and nothing that computes has taken since.
        computed: those of them that rules behind take.
        moved: names in the checkpoint that a rule took as they are.
    """

    def __init__(self, tensors: Mapping[str, SourceTensor]) -> None:
        self._tensors = tensors
        self._visible = dict(tensors)
        self._made: dict[str, SourceTensor] = {}
        self._computed: set[str] = set()
        self._moved: dict[str, Rule] = {}
        self._used: set[str] = set()

    def of(self, rules: Iterable[Rule]) -> dict[str, SourceTensor]:
        for rule in rules:
            self._apply(rule)
        kept = {n: tensor for n, tensor in self._tensors.items() if n not in self._used and n not in self._made}
        return {**self._made, **kept}

    def _apply(self, rule: Rule) -> None:
        if isinstance(rule, Duplicate):
            self._used.update(sources_among(self._tensors, [rule]))
        groups = rule.members({**self._visible, **self._made} if rule.computes else self._visible)
        taken = {tensor.meta.name for members in groups.values() for tensor in all_of(members)}
        before = {name: self._made[name] for name in taken if name in self._made}
        if rule.computes:
            self._refuse_moved(rule, [name for name in taken if name not in before])
        found: dict[str, SourceTensor] = {}
        for name, members in groups.items():
            if name in found or (name in self._made and name not in before):
                raise UsageError(f"two rules make {name!r}; the second one is {rule}")
            flat = all_of(members)
            if len(flat) > 1 and any(isinstance(tensor.recipe, Recipe) for tensor in flat) and not rule.computes:
                raise UsageError(f"the rule for {name!r} needs stored tensors, but some are made by another rule")
            found[name] = _made(rule, name, members)
        for name in before if rule.computes else self._computed.intersection(before):
            del self._made[name]
        self._made.update(found)
        self._used |= taken
        if rule.computes:
            self._computed.update(found)
            self._visible.update(found)
        else:
            self._moved.update(dict.fromkeys(taken - self._computed, rule))

    def _refuse_moved(self, rule: Rule, taken: Iterable[str]) -> None:
        for name in taken:
            if name in self._moved and name not in self._computed:
                mover = self._moved[name]
                raise UsageError(
                    f"{type(rule).__name__} for {rule.target!r} takes {name!r}, which {type(mover).__name__} for "
                    f"{mover.target!r} has moved as it is stored: put the rule that computes before it"
                )


def _made(rule: Rule, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
    """`rule.make`, whose errors name the sources."""
    flat = all_of(members)
    empty = [tensor for tensor in flat if not all(tensor.meta.shape)]
    if empty and not isinstance(rule, Rename):
        raise LayoutMismatchError(
            f"{name!r} is made of {shapes_of(empty)}, which has no elements: such a parameter can only be renamed; "
            "check the names of the rule, or leave this one out"
        )
    try:
        return rule.make(name, members)
    except LayoutMismatchError as error:
        if any(repr(tensor.meta.name) in str(error) for tensor in flat):
            raise
        raise LayoutMismatchError(f"{error}; it is made of {shapes_of(flat)}") from error


def sources_among(names: Iterable[str], rules: Iterable[Rule]) -> list[str]:
    """Those of the names that are a source of one of the rules."""
    patterns = [Pattern(source) for rule in rules for source in rule.sources]
    return [name for name in names if any(pattern.match(name) is not None for pattern in patterns)]

"""Weight rules applied to what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.rule import Rule, all_of, shapes_of
from ms_ckpt_ext.core.planning.weight_rules import Duplicate, Rename
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError


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
        if isinstance(rule, Duplicate):
            used.update(sources_among(tensors, [rule]))
        for name, members in rule.members(tensors).items():
            if name in made:
                raise UsageError(f"two rules make {name!r}; the second one is {rule}")
            flat = all_of(members)
            if len(flat) > 1 and any(tensor.recipe is not None for tensor in flat):
                raise UsageError(f"the rule for {name!r} needs stored tensors, but some are made by another rule")
            made[name] = _made(rule, name, members)
            used.update(tensor.meta.name for tensor in flat)
    kept = {name: tensor for name, tensor in tensors.items() if name not in used and name not in made}
    return {**made, **kept}


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

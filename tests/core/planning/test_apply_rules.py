"""Which tensors a rule takes, and what is left when it has been applied."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.rules import Rename, Rule, Scale, Transpose

HELD = {name: stored_whole(TensorMeta(name, DTYPES["F32"], (4, 6)), (0,)) for name in "abc"}


def origins(*rules: Rule) -> dict[str, list[str]]:
    """Name of a parameter -> the stored tensors that it is made of."""
    return {name: [each.meta.name for each in made.stored()] for name, made in apply_rules(HELD, rules).items()}


def test_rules_that_move_take_what_is_stored() -> None:
    """Also where another rule makes one of that name: names may be exchanged."""
    assert origins(Transpose("a", "b"), Transpose("b", "a")) == {"b": ["a"], "a": ["b"], "c": ["c"]}


def test_a_rule_that_computes_takes_what_rules_before_it_made() -> None:
    """What was taken is no parameter of its own any more."""
    assert origins(Transpose("a", "moved"), Scale("moved", "t", 2.0)) == {"t": ["a"], "b": ["b"], "c": ["c"]}
    assert origins(Transpose("a", "b"), Scale("b", "t", 2.0)) == {"t": ["a"], "c": ["c"]}, "not what was stored as b"


def test_rules_take_what_was_computed_before() -> None:
    assert origins(Scale("a", "s", 2.0), Transpose("s", "t")) == {"t": ["a"], "b": ["b"], "c": ["c"]}
    assert origins(Scale("a", "a", 2.0), Rename("a", "t"), Scale("t", "u", 2.0)) == {
        "u": ["a"],
        "b": ["b"],
        "c": ["c"],
    }


def test_what_was_moved_as_it_is_stored_is_not_computed_with() -> None:
    """It would be there twice: as it was, and as it is computed."""
    with pytest.raises(UsageError, match="Scale for 't' takes 'a', which Transpose for 'm' has moved as it is stored"):
        apply_rules(HELD, [Transpose("a", "m"), Scale("a", "t", 2.0)])
    with pytest.raises(UsageError, match="Scale for 't' takes 'b', which Rename for 'm' has moved"):
        apply_rules(HELD, [Rename("a", "n"), Rename("b", "m"), Scale("b", "t", 2.0)])

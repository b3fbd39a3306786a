"""Names with placeholders."""

from __future__ import annotations

from typing import Optional

import pytest

from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.errors import UsageError


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("l.{n}.w", "l.7.w", {"n": "7"}),
        ("l.{n}.w", "l.7.w.b", None),
        ("l.{n}.w", "l.x.w", None),
        ("l.{n}.w", "lx7.w", None),  # a dot is a dot
        ("l.{}.e.{}.w", "l.7.e.12.w", {"_0": "7", "_1": "12"}),
        ("l.{}.e.{n}.f.{}", "l.7.e.12.f.3", {"_0": "7", "n": "12", "_1": "3"}),
        ("{*}.w", "a.b.w", {"*": "a.b"}),
        ("{*}.w", ".w", None),
        ("l.{n<3}.w", "l.2.w", {"n": "2"}),
        ("l.{n<3}.w", "l.3.w", None),
        ("l.{2<=n}.w", "l.2.w", {"n": "2"}),
        ("l.{2<=n}.w", "l.1.w", None),
        ("l.{2<=n<4}.w", "l.3.w", {"n": "3"}),
        ("l.{2<=n<4}.w", "l.4.w", None),
        ("l.{0<=n<1}.w", "l.0.w", {"n": "0"}),
        ("l.{n<3}.w", "l.0.w", {"n": "0"}),
        ("l.{n}.w", "l.123456789012345678.w", {"n": "123456789012345678"}),
        ("l.{n}.w", "l.1234567890123456789.w", None),  # more digits than a number of layers has
        ("w", "w", {}),
    ],
)
def test_what_a_name_matches(pattern: str, name: str, found: Optional[dict[str, str]]) -> None:
    assert Pattern(pattern).match(name) == found
    if found is not None:
        assert Pattern(pattern).fill(found) == name


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.{n<3}", [("a.0", ("0",)), ("a.1", ("1",)), ("a.2", ("2",))]),
        ("a.{1<=n<3}.b", [("a.1.b", ("1",)), ("a.2.b", ("2",))]),
        ("a.{n<2}.{1<=m<3}", [(f"a.{n}.{m}", (str(n), str(m))) for n in (0, 1) for m in (1, 2)]),
        ("a.{n}", []),
        ("a.{n<0}", []),
        ("a.{2<=n<2}", []),
        ("a.{3<=n<2}", []),
        ("a.{n<2}.{m}", []),
        ("a", [("a", ())]),
    ],
)
def test_every_name(pattern: str, names: list[tuple[str, tuple[str, ...]]]) -> None:
    assert list(Pattern(pattern).every()) == names
    assert Pattern(pattern).count() == len(names)


def test_more_names_than_can_be_told_are_counted() -> None:
    assert Pattern("a.{n<100000}.{m<100000}").count() == 10**10


@pytest.mark.parametrize("text", ["a.{n}{m}", "a.{n}{}.w", "{n}1{m}", "{n<3}00{m<4}", "a.{n}.{m}7{k}"])
def test_numbers_that_run_together(text: str) -> None:
    """`{n}{m}` of 123 has two readings; of many digits and placeholders, more than can be tried."""
    with pytest.raises(UsageError, match="ends and .* begins is not told"):
        Pattern(text)


@pytest.mark.parametrize("text", ["{n}.{m}", "{n}1x1{m}", "{*}{n}", "{n}{*}", "1{n}1.{m}1"])
def test_numbers_that_do_not(text: str) -> None:
    values = dict.fromkeys(Pattern(text).keys, "5")
    assert Pattern(text).match(Pattern(text).fill(values)) == values


def test_a_placeholder_without_a_value_is_told_by_name() -> None:
    with pytest.raises(UsageError, match="has the placeholder 'm', which its sources do not have"):
        Pattern("a.{n}.{m}").fill({"n": "1"})
    with pytest.raises(UsageError, match="has the placeholder '0'"):
        Pattern("a.{}").fill({})
    with pytest.raises(UsageError, match="names a placeholder twice"):
        Pattern("a.{n}.{n}")

"""What a rule cannot do it refuses when it is made; one that is made can be applied and inverted, or says why not."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest

from ms_ckpt_ext import rules
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import TensorMeta, locate, stored_whole
from ms_ckpt_ext.errors import CheckpointError, UsageError
from ms_ckpt_ext.rules import Concat, Crop, Experts, Pad, Rule, Scale, Transpose

KINDS = {name: kind for name in rules.__all__ if isinstance(kind := getattr(rules, name), type) and kind is not Rule}
NAMES = {"Dequantize": ["a", "b"], "AddProduct": ["a", "b", "c"]}
SEVERAL = {"Concat", "QKV", "Interleave", "Stack", "Experts"}
NEEDED: dict[str, dict[str, Any]] = {
    "QKV": {"groups": 2},
    "Part": {"number": 0, "parts": 2},
    "Pad": {"size": 6},
    "Crop": {"size": 2},
}
INTEGERS = {
    **{("Part", name): None for name in ("number", "parts", "axis")},
    **{(kind, "axis"): None for kind in ("Concat", "QKV", "Interleave", "Stack", "Pad", "Crop")},
    ("QKV", "groups"): 1,
    ("Interleave", "rows"): 1,
    ("Experts", "experts"): 1,
    ("Dequantize", "block"): 0,
    **{(kind, name): 1 for kind in ("Pad", "Crop") for name in ("size", "source_size")},
}
"""Arguments that are whole numbers, and the least they may be."""
ODD = [
    "2",
    "",
    "{n}",
    1.5,
    True,
    False,
    -1,
    -7,
    0,
    2**70,
    10**400,
    math.nan,
    math.inf,
    (),
    (0, 0),
    [1.5],
    {"x": 1},
    b"2",
]
SHAPES = [(), (4,), (4, 4), (4, 4, 4)]


def made(kind: str, **arguments: Any) -> Rule:
    return KINDS[kind](**{"sources": NAMES.get(kind, "a"), "target": "t", **NEEDED.get(kind, {}), **arguments})


def arguments_of(kind: str) -> list[str]:
    return [name for name in inspect.signature(KINDS[kind]).parameters if name not in ("sources", "target")]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in arguments_of(kind)])
def test_any_value_of_an_argument_is_refused_at_birth_or_means_something(kind: str, name: str) -> None:
    for value in ODD:
        try:
            rule = made(kind, **{name: value})
        except UsageError as error:
            assert "rule for 't': " in str(error)
            continue
        assert hash(rule) == hash(made(kind, **{name: value}))
        for shape in SHAPES:
            for dtype in ("F32", "BF16", "I8", "U8", "F4", "F8_E4M3", "F8_E8M0", "BOOL", "C64"):
                held = {n: stored_whole(TensorMeta(n, DTYPES[dtype], shape), (0,)) for n in "abc"}
                try:
                    tensor = apply_rules(held, [rule])["t"]
                    assert locate(tensor, Region.whole(tensor.meta.shape))
                except CheckpointError:
                    continue
        try:
            assert rules.invert([rule])
        except UsageError as error:
            assert "cannot be inverted" in str(error) or "nothing takes part" in str(error)


@pytest.mark.parametrize(("kind", "name"), INTEGERS)
def test_whole_numbers(kind: str, name: str) -> None:
    least = INTEGERS[kind, name]
    for value in (1.0, "1", True, [1.0], *([] if least is None else [least - 1])):
        with pytest.raises(UsageError, match=f"rule for 't': {name} must be"):
            made(kind, **{name: value})
    if least is not None:
        given = {"source_size": least} if name == "size" else {"size": least} if name == "source_size" else {}
        assert getattr(made(kind, **{**given, name: least}), name) in (least, (least,))


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_sources(kind: str) -> None:
    """As many as a rule takes: more are not left out without a word."""
    for count in range(1, 5):
        sources = [f"s{number}" for number in range(count)]
        if kind in SEVERAL or count == len(NAMES.get(kind, "a")):
            assert made(kind, sources=sources).sources == tuple(sources)
            continue
        wanted = "one source, got" if kind not in NAMES else rf"{len(NAMES[kind])} sources \(.*\), got"
        with pytest.raises(UsageError, match=f"rule for 't': {kind} takes {wanted}"):
            made(kind, sources=sources)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_has_no_placeholder_that_a_source_lacks(kind: str) -> None:
    counted = [f"{name}.{{i}}" for name in NAMES.get(kind, "a")]
    assert made(kind, sources=counted, target="t.{i}").target == "t.{i}"
    for key, target in (("j", "t.{i}.{j}"), ("i", "t.{i}"), ("*", "t.{*}"), ("0", "t.{}")):
        names = [*counted[:-1], "last"] if key == "i" else counted
        with pytest.raises(UsageError) as caught:
            made(kind, sources=names, target=target)
        lacking = "last" if key == "i" else names[0]
        assert f"the target {target!r} has the placeholder {key!r}, which its source {lacking!r}" in str(caught.value)


@pytest.mark.parametrize("names", [None, 5, [], [""], "", ["a", None], b"ab", [["a"]]])
def test_names_are_texts(names: Any) -> None:
    for kind in KINDS:
        with pytest.raises(UsageError, match="a rule needs the names of its sources and of its target"):
            made(kind, sources=names)
        if not isinstance(names, (bytes, list)) or not names:
            with pytest.raises(UsageError, match="a rule needs the names"):
                made(kind, target=names)


def test_what_a_rule_is_told_besides() -> None:
    for axes in ((0, 0), (1, 2), (-1, 0), (0, 2)):
        with pytest.raises(UsageError, match="rule for 't': axes .* do not permute 2 axes"):
            Transpose("a", "t", axes)
    for told in ({"transpose": 1}, {"merge": "no"}, {"merge": None}):
        with pytest.raises(UsageError, match=f"rule for 't': {next(iter(told))} must be True or False"):
            Experts("e.{n}", "t", **told)  # type: ignore[arg-type]
    for shares in (5, {2: 3}, (True, 1)):
        with pytest.raises(UsageError, match="shares must be 2 whole numbers"):
            Concat(["a", "b"], "t", shares=shares)  # type: ignore[arg-type]
    for value in ("1", None, 1j, 10**400, [0.0]):
        for kind in ("Pad", "Crop"):
            with pytest.raises(UsageError, match="rule for 't': value must be a number that F64 can hold"):
                made(kind, value=value)
    for dtype in ("", 0, False, "I8", ["F32"]):
        for kind in ("Scale", "AddProduct", "Dequantize"):
            with pytest.raises(UsageError, match="rule for 't': dtype must be one of BF16, F16, F32"):
                made(kind, dtype=dtype)
    for factor in (10**400, "2", None):
        for kind in ("Scale", "AddProduct"):
            with pytest.raises(UsageError, match="rule for 't': factor must be a finite number"):
                made(kind, factor=factor)


def test_a_count_that_is_not_known_has_no_inverse() -> None:
    """Which of `e.{n}` a tensor goes back to is not told; and a factor without a reciprocal cannot be divided out."""
    for rule in (Pad("e.{n}", "t", 8, source_size=5), Crop("e.{n}", "t", 5, source_size=8), Scale("e.{n}", "t", 2.0)):
        with pytest.raises(UsageError, match="cannot be inverted: a placeholder of its sources counts"):
            rules.invert([rule])
    with pytest.raises(UsageError, match="cannot be inverted: products with 5e-324 are rounded"):
        rules.invert([Scale("a", "t", 2.0**-1074)])

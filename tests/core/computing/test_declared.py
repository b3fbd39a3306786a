"""How rules that compute are declared, combined and turned round, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from ms_ckpt_ext.core.computing.operations import AddedProduct
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.core.planning.recipes import Computation, Recipe
from ms_ckpt_ext.errors import CheckpointError, CoverageError, LayoutMismatchError, UsageError
from ms_ckpt_ext.rules import (
    QKV,
    AddProduct,
    Concat,
    Crop,
    Dequantize,
    Experts,
    Interleave,
    Pad,
    Part,
    Rename,
    Rule,
    Scale,
    Stack,
    Transpose,
    invert,
)


def held(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, SourceTensor]:
    named = {name.replace("__", "."): kind for name, kind in tensors.items()}
    return {name: stored_whole(TensorMeta(name, DTYPES[dtype], shape), (0,)) for name, (dtype, shape) in named.items()}


def kinds(tensors: dict[str, SourceTensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.meta.dtype.name, tensor.meta.shape) for name, tensor in tensors.items()}


FOLDER = held(
    e__0__w__weight=("F8_E4M3", (256, 300)),
    e__0__w__weight_scale_inv=("F32", (2, 3)),
    e__1__w__weight=("F8_E4M3", (256, 300)),
    e__1__w__weight_scale_inv=("F32", (2, 3)),
    norm__weight=("BF16", (300,)),
)
PACKED = held(packed=("F4", (4, 6)), matrix=("F32", (2, 2)), value=("F32", ()))
ALL = Dequantize(["{*}.weight", "{*}.weight_scale_inv"], "{*}.weight")


def test_one_rule_is_for_all_weights_that_have_scales() -> None:
    assert kinds(apply_rules(FOLDER, [ALL])) == {
        "e.0.w.weight": ("BF16", (256, 300)),
        "e.1.w.weight": ("BF16", (256, 300)),
        "norm.weight": ("BF16", (300,)),
    }


def test_rules_behind_take_what_is_computed() -> None:
    made = apply_rules(FOLDER, [ALL, Stack("e.{n}.w.weight", "all"), Rename("norm.weight", "n")])
    assert kinds(made) == {"all": ("BF16", (2, 256, 300)), "n": ("BF16", (300,))}
    made = apply_rules(FOLDER, [ALL, Scale("e.0.w.weight", "e.0.w.weight", 2.0), Stack("e.{n}.w.weight", "all")])
    assert kinds(made) == {"all": ("BF16", (2, 256, 300)), "norm.weight": ("BF16", (300,))}


def test_an_adapter_is_added_to_what_is_dequantised_and_rules_behind_take_the_sum() -> None:
    tensors = {**FOLDER, **held(e__0__w__B=("F32", (256, 2)), turned=("F32", (300, 2)))}
    added = AddProduct(["{*}.weight", "{*}.B", "{*}.A"], "{*}.weight")
    made = apply_rules(tensors, [ALL, Transpose("turned", "e.0.w.A"), added, Stack("e.{n}.w.weight", "all")])
    assert kinds(made) == {"all": ("BF16", (2, 256, 300)), "norm.weight": ("BF16", (300,))}
    assert isinstance(made["all"].recipe, Recipe)
    first, second = (block.tensor.recipe for block in made["all"].recipe.blocks)
    assert isinstance(first, Computation)
    assert isinstance(second, Computation)
    assert first.operation == AddedProduct(1.0, ("BF16", "F32", "F32"), 2, "BF16")
    weight = first.operands[0].recipe
    assert isinstance(weight, Computation)
    assert weight.operation == second.operation


def test_what_a_rule_that_computes_takes_of_one_that_moves_is_no_result() -> None:
    made = apply_rules(held(a=("F32", (2, 2)), b=("F32", (3, 2))), [Concat(["a", "b"], "ab"), Scale("ab", "c", 3.0)])
    assert kinds(made) == {"c": ("F32", (5, 2))}


def test_groups_of_fp4_are_joined() -> None:
    tensors = held(w_blocks=("U8", (2, 6, 3, 16)), w_scales=("U8", (2, 6, 3)))
    made = apply_rules(tensors, [Dequantize(["w_blocks", "w_scales"], "w", block=32, dtype="F16")])
    assert kinds(made) == {"w": ("F16", (2, 6, 96))}


def test_weights_without_adapters_stay() -> None:
    tensors = held(a=("BF16", (4, 6)), a__B=("F32", (4, 2)), a__A=("F32", (2, 6)), b=("BF16", (4, 6)))
    tensors = {name if "." in name else f"{name}.w": tensor for name, tensor in tensors.items()}
    named = {name: tensor._replace(meta=tensor.meta._replace(name=name)) for name, tensor in tensors.items()}
    rule = AddProduct(["{*}.w", "{*}.B", "{*}.A"], "{*}.w", factor=2.0)
    assert kinds(apply_rules(named, [rule])) == {"a.w": ("BF16", (4, 6)), "b.w": ("BF16", (4, 6))}
    for lost in ("a.A", "a.B"):
        with pytest.raises(CoverageError, match=re.escape(f"nothing called '{{*}}.{lost[-1]}'")):
            apply_rules({name: tensor for name, tensor in named.items() if name != lost}, [rule])


REFUSED: Sequence[tuple[list[Rule], type[CheckpointError], str]] = [
    ([Stack("e.{n}.w.weight", "all"), ALL], UsageError, "put the rule that computes before it"),
    ([Dequantize(["e.0.w.weight", "norm.weight"], "t")], LayoutMismatchError, "has scales of shape [2, 3]"),
    (
        [Dequantize(["e.0.w.weight", "e.0.w.weight_scale_inv"], "t", block=(64, 128))],
        LayoutMismatchError,
        "give block=",
    ),
    ([Dequantize(["norm.weight", "e.0.w.weight"], "t")], LayoutMismatchError, "of BF16 elements and F8_E4M3 scales"),
    ([Dequantize(["e.0.w.weight", "norm.weight"], "t", block=128)], LayoutMismatchError, "has scales of shape"),
    ([Dequantize(["e.0.w.weight", "e.1.w.weight"], "t")], LayoutMismatchError, "and F8_E4M3 scales"),
    ([Dequantize(["{*}.weight", "{*}.scale"], "{*}.weight")], CoverageError, "nothing called '{*}.scale'"),
    ([Scale("e.0.w.weight", "t", 2.0)], LayoutMismatchError, "made of F8_E4M3 elements"),
    ([AddProduct(["norm.weight"] * 3, "t")], LayoutMismatchError, "must be (m, n), (m, r) and (r, n)"),
    ([AddProduct(["e.0.w.weight"] * 3, "t")], LayoutMismatchError, "can be multiplied"),
    ([AddProduct(["matrix", "value", "matrix"], "t")], LayoutMismatchError, "must be (m, n), (m, r) and (r, n)"),
    ([Scale("norm.weight", "t", 1e300)], LayoutMismatchError, "no normal number in F32"),
    ([Pad("norm.weight", "t", 200)], LayoutMismatchError, "longer than 200; use Crop"),
    ([Pad("norm.weight", "t", 400, source_size=301)], LayoutMismatchError, "does not have 301 indices"),
    ([Crop("norm.weight", "t", 200, source_size=301)], LayoutMismatchError, "does not have 301 indices"),
    ([AddProduct(["e.0.w.weight_scale_inv"] * 3, "t")], LayoutMismatchError, "must be (m, n), (m, r) and (r, n)"),
    ([Crop("norm.weight", "t", 400)], LayoutMismatchError, "shorter than 400; use Pad"),
    ([Pad("e.0.w.weight", "t", 257, value=1000.0)], LayoutMismatchError, "F8_E4M3 has no value 1000.0"),
    ([Pad("packed", "t", 400)], LayoutMismatchError, "narrower than a byte"),
    ([Pad("norm.weight", "t", 400), Pad("norm.weight", "t", 400)], UsageError, "two rules make 't'"),
]


@pytest.mark.parametrize(("rules", "error", "told"), REFUSED)
def test_what_does_not_fit_is_refused(rules: list[Rule], error: type[CheckpointError], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        apply_rules({**FOLDER, **PACKED}, rules)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Rename("", "t"), "needs the names of its sources and of its target"),
        (lambda: Rename("a", ""), "needs the names"),
        (lambda: Stack([], "t"), "needs the names"),
        (lambda: Stack(["a", 5], "t"), "needs the names"),  # type: ignore[list-item]
        (lambda: Dequantize("a", "t"), "takes 2 sources \\(elements, scales\\)"),
        (lambda: Dequantize(["a", "b"], "t", dtype="F64"), "dtype must be one of BF16, F16, F32"),
        (lambda: Dequantize(["a", "b"], "t", block=(-1,)), "block must be at least 0"),
        (lambda: Dequantize(["{*}.a", "{*}.b"], "t"), "\\(any text\\), so the target must have it"),
        (lambda: AddProduct(["a", "b"], "t"), "takes 3 sources \\(W, B, A\\)"),
        (lambda: AddProduct(["a", "b", "c"], "t", float("nan")), "factor must be a finite number"),
        (lambda: AddProduct(["a", "b", "c"], "t", True), "factor must be a finite number"),
        (lambda: Scale("a", "t", 0), "finite number other than 0"),
        (lambda: Scale("a", "t", float("inf")), "finite number other than 0"),
        (lambda: Scale("a", "t", dtype="I8"), "dtype must be one of"),
        (lambda: Pad("a", "t", 0), "size must be at least 1"),
        (lambda: Pad("a", "t", 4, source_size=5), "use Crop"),
        (lambda: Crop("a", "t", 6, source_size=5), "use Pad"),
    ],
)
def test_what_means_nothing_is_refused_at_birth(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(UsageError, match=told):
        make()


def test_inverses() -> None:
    assert invert([Pad("a", "b", 8, 1, value=2.0, source_size=5)]) == [Crop("b", "a", 5, 1, source_size=8, value=2.0)]
    assert invert([Crop("b", "a", 5, 1, source_size=8, value=2.0)]) == [Pad("a", "b", 8, 1, value=2.0, source_size=5)]
    assert invert([Scale("a", "b", -0.25)]) == [Scale("b", "a", -4.0)]
    assert invert([Scale("a", "b", 2.0**-1023)]) == [Scale("b", "a", 2.0**1023)]
    back = invert([Scale("a", "a", 0.5), Concat(["a", "b"], "t", shares=(1, 1))])
    assert [(rule.sources, rule.target) for rule in back] == [(("t",), "a"), (("a",), "a")]
    assert back[1] == Scale("a", "a", 2.0)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (ALL, "rounded when they were quantised"),
        (AddProduct(["w", "b", "a"], "t"), "cannot be told apart again"),
        (Scale("a", "b", 3.0), "only powers of two"),
        (Scale("a", "b", 2.0**-1024), "only powers of two"),  # 2 ** 1024 is infinite
        (Scale("a", "b", 2.0, dtype="BF16"), "it rounds to BF16"),
        (Pad("a", "b", 8), "give source_size="),
        (Crop("a", "b", 8), "give source_size="),
    ],
)
def test_what_has_no_inverse_says_why(rule: Rule, why: str) -> None:
    with pytest.raises(UsageError, match=f"{type(rule).__name__} to .* cannot be inverted: .*{why}"):
        invert([rule])


def test_experts_are_stacked_as_floats() -> None:
    tensors = held(
        e__0__g__weight=("F8_E4M3", (4, 6)),
        e__0__g__weight_scale_inv=("F32", (1, 1)),
        e__1__g__weight=("F8_E4M3", (4, 6)),
        e__1__g__weight_scale_inv=("F32", (1, 1)),
    )
    made = apply_rules(tensors, [ALL, Experts("e.{n}.g.weight", "w1")])
    assert kinds(made) == {"w1": ("BF16", (12, 4))}


def test_one_scale_for_all() -> None:
    tensors = held(w=("F8_E4M3", (4, 6)), s=("F32", ()))
    made = apply_rules(tensors, [Dequantize(["w", "s"], "t", block=(4, 6))])["t"]
    assert made.meta.shape == (4, 6)


@pytest.mark.parametrize(
    ("elements", "scales", "shape"),
    [
        ((4,), (), (8,)),
        ((4,), (1,), (8,)),
        ((2, 3), (), (2, 6)),
        ((2, 3), (1,), (2, 6)),  # were it of a group, there were two
        ((2, 3), (1, 1), (2, 6)),
        ((2, 1, 3), (1, 1), (2, 1, 6)),
        ((1, 16), (1,), (32,)),  # a group
        ((1, 1, 16), (1, 1), (1, 32)),
        ((3, 16), (3,), (96,)),
        ((2, 3, 16), (2, 3), (2, 96)),
        ((2, 4, 8), (2, 2), (2, 64)),  # two groups a scale
    ],
)
def test_a_single_scale_is_no_scale_of_a_group(
    elements: tuple[int, ...], scales: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    tensors = held(w=("U8", elements), s=("F32", scales))
    made = apply_rules(tensors, [Dequantize(["w", "s"], "t", block=32)])["t"]
    assert made.meta.shape == shape
    assert isinstance(made.recipe, Computation)
    stored, factors = made.recipe.operation.takes(Region.whole(shape))
    assert [stored.shape, factors.shape] == [operand.meta.shape for operand in made.recipe.operands]


def test_what_is_stored_as_floats_or_integers_needs_no_scales() -> None:
    """Whatever comes first; what has four or eight bits of a float must have them."""
    quantised = {"e__w": ("F8_E4M3", (4, 6)), "e__s": ("F32", (1, 1))}
    rule = Dequantize(["{*}.w", "{*}.s"], "{*}.w")
    for kind in ("BF16", "F32", "I8", "U8", "I64"):
        made = apply_rules(held(a__w=(kind, (4, 6)), **quantised), [rule])
        assert kinds(made) == {"a.w": (kind, (4, 6)), "e.w": ("BF16", (4, 6))}
    for kind in ("F8_E4M3", "F8_E5M2", "F4"):
        with pytest.raises(CoverageError, match=r"'a\.w' is made of 2 sources, .* nothing called '\{\*\}\.s'"):
            apply_rules(held(a__w=(kind, (4, 6)), **quantised), [rule])
    with pytest.raises(CoverageError, match=r"nothing called '\{\*\}\.w'"):
        apply_rules(held(a__s=("F32", (1, 1)), **quantised), [rule])


def test_a_product_is_of_three_dtypes() -> None:
    tensors = held(w=("BF16", (4, 6)), b=("F32", (4, 2)), a=("F16", (2, 6)))
    made = apply_rules(tensors, [AddProduct(["w", "b", "a"], "t", factor=0.5)])["t"]
    assert isinstance(made.recipe, Computation)
    assert made.recipe.operation == AddedProduct(0.5, ("BF16", "F32", "F16"), 2, "BF16")
    for shapes in (
        *(((4, 6), (3, 2), (2, 6)), ((4, 6), (4, 2), (3, 6)), ((4, 6), (4, 2), (2, 5))),
        *(((4, 6, 5), (4, 2), (2, 6)), ((4, 6), (4, 2, 1), (2, 6)), ((4, 6), (4, 2), (2, 6, 1)), ((4,), (4, 2), (2,))),
    ):
        wrong = held(**{name: ("F32", shape) for name, shape in zip("wba", shapes)})
        with pytest.raises(LayoutMismatchError, match="must be"):
            apply_rules(wrong, [AddProduct(["w", "b", "a"], "t")])


@pytest.mark.parametrize(
    ("kind", "needed", "said"),
    [
        (Concat, {}, {"axis": 0, "shares": None}),
        (QKV, {"groups": 2}, {"axis": 0, "shares": None}),
        (Interleave, {}, {"axis": 0, "rows": 1}),
        (Stack, {}, {"axis": 0}),
        (Transpose, {}, {"axes": None}),
        (Experts, {}, {"transpose": True, "merge": True, "experts": None, "shares": None}),
        (Part, {"number": 1, "parts": 2}, {"axis": 0}),
        (Dequantize, {}, {"block": (128, 128), "dtype": "BF16"}),
        (Scale, {}, {"factor": 1.0, "dtype": None}),
        (AddProduct, {}, {"factor": 1.0, "dtype": None}),
        (Pad, {"size": 8}, {"axis": 0, "value": 0.0, "source_size": None}),
        (Crop, {"size": 8}, {"axis": 0, "source_size": None, "value": 0.0}),
    ],
)
def test_what_a_rule_means_that_says_little(kind: type[Rule], needed: dict[str, Any], said: dict[str, Any]) -> None:
    """Arguments that are needed come first, in this order; what else there is has these values by default."""
    sources = [f"s{number}" for number in range(len(kind.takes) or 1)]
    short = kind(sources, "t", *needed.values())
    assert short == kind(sources, "t", *needed.values(), *said.values()) == kind(sources, "t", **needed, **said)
    for name, value in {**needed, **said}.items():
        assert getattr(short, name) == value


def test_one_expert_has_all() -> None:
    assert Experts("a", "t", experts=1).source_shapes("t", (3, 2)) == [[(2, 3)]]


def test_the_ends_of_what_is_allowed() -> None:
    """No longer than it is; and the largest and least normal numbers of F32."""
    assert Pad("a", "t", 5, source_size=5).size == Crop("a", "t", 5, source_size=5).size == 5
    single, three = held(w=("F32", (4,))), held(w=("BF16", (4, 6)), b=("F32", (4, 2)), a=("F16", (2, 6)))
    for factor in (float(2**127 * (2 - 2**-23)), 2.0**-126):
        assert apply_rules(single, [Scale("w", "t", factor)])["t"].is_computed
        assert apply_rules(three, [AddProduct(["w", "b", "a"], "t", -factor)])["t"].is_computed
    for factor in (2.0**128, 2.0**-127, 2.0**127 * (2 - 2.0**-24)):  # the last one is rounded to infinity
        with pytest.raises(LayoutMismatchError, match="no normal number in F32"):
            apply_rules(single, [Scale("w", "t", factor)])
        with pytest.raises(LayoutMismatchError, match="no normal number in F32"):
            apply_rules(three, [AddProduct(["w", "b", "a"], "t", factor)])
    assert apply_rules(three, [AddProduct(["w", "b", "a"], "t", 0.0)])["t"].is_computed
    doubles = held(w=("F64", (4, 6)), b=("F32", (4, 2)), a=("F16", (2, 6)))
    assert apply_rules(doubles, [AddProduct(["w", "b", "a"], "t", 2.0**128)])["t"].is_computed

"""Weight rules turned round: what they make goes back to what made it, from any layout and under any."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta, locate, stored_whole
from ms_ckpt_ext.core.planning.recipes import Block, box_of_stored, made_of
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, UsageError
from ms_ckpt_ext.rules import QKV, Concat, Experts, Interleave, Part, Rename, Rule, Scale, Stack, Transpose, invert
from tests.core.planning.test_weight_rules import Case, cases, layout_for, strategy
from tests.support.checkpoints import cut


def said(case: Case) -> Rule:
    """The rule, with what its inverse needs."""
    rule, sources = case.rule, case.sources
    if isinstance(rule, Concat):
        return Concat(rule.sources, "t", rule.axis, [sources[n].shape[rule.axis] for n in rule.sources])
    if isinstance(rule, QKV):
        return QKV(rule.sources, "t", rule.groups, rule.axis, [sources[n].shape[rule.axis] for n in rule.sources])
    if isinstance(rule, Experts):
        widths = [sources[n.replace("{e}", "0")].shape[0] for n in rule.sources]
        return Experts(rule.sources, "t", rule.transpose, rule.merge, len(sources) // len(widths), widths)
    return rule


@given(cases(), st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
def test_the_way_there_and_back(case: Case, data: st.DataObject) -> None:
    assume(not isinstance(case.rule, Part))
    rule = said(case)
    devices = data.draw(st.sampled_from([1, 2, 4]))
    cutting = strategy({"t": data.draw(layout_for(case.expected.shape, devices))})
    with tempfile.TemporaryDirectory() as root:
        directory = cut(cutting, {"t": np.ascontiguousarray(case.expected)}, Path(root) / "in")
        try:
            ms_ckpt_ext.merge(directory, Path(root) / "out", strategy=cutting, rules=invert([rule]))
        except LayoutMismatchError as error:
            assume("are no boxes" not in str(error))
            raise
        with ms_ckpt_ext.load(Path(root) / "out") as found:
            got = {name: array.copy() for name, array in found.arrays().items()}
    assert {n: (a.shape, a.tobytes()) for n, a in got.items()} == {
        n: (a.shape, a.tobytes()) for n, a in case.sources.items()
    }


def test_a_layer_goes_back_to_hugging_face(tmp_path: Path) -> None:
    """Grouped queries, rows of gate and up, experts; what no rule names stays. Cut for four ranks."""
    rng = np.random.default_rng(5)
    held = {f"h.{i}.{n}": rng.standard_normal((r, 6), np.float32) for i in range(2) for n, r in zip("qkv", (16, 4, 4))}
    held |= {f"h.1.e.{e}.{n}": rng.standard_normal((3, 8), np.float32) for e in range(4) for n in ("gate", "up")}
    held |= {f"h.0.{n}": rng.standard_normal((8, 6), np.float32) for n in ("gate", "up")}
    held["norm"] = np.arange(6, dtype=np.float32)
    (tmp_path / "hf").mkdir()
    save_file(held, tmp_path / "hf/model.safetensors", {"format": "pt"})
    rules = [
        QKV([f"h.{{i}}.{n}" for n in "qkv"], "l.{i}.qkv", groups=4, shares=(4, 1, 1)),
        Interleave(["h.{i}.gate", "h.{i}.up"], "l.{i}.fc1"),
        Experts(["h.{}.e.{}.gate", "h.{}.e.{}.up"], "l.{}.experts", experts=4, shares=(1, 1)),
    ]
    ms_ckpt_ext.merge(tmp_path / "hf", tmp_path / "whole", rules=rules)
    with ms_ckpt_ext.load(tmp_path / "whole") as found:
        whole = {name: array.copy() for name, array in found.arrays().items()}
    rows = Layout((4,), ((0,), ()))
    trained = strategy({name: rows for name in whole if name != "norm"} | {"norm": Layout((4,), ((),))})
    cut(trained, whole, tmp_path / "ranks")
    back = invert(rules)
    ms_ckpt_ext.merge(tmp_path / "ranks", tmp_path / "back", strategy=trained, naming="huggingface", rules=back)
    got = {n: a for file in (tmp_path / "back").glob("*.safetensors") for n, a in load_file(file).items()}
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in held.items()}


def test_parts_are_joined_again() -> None:
    (back,) = invert([Part("fused", name, n, 2, axis=1) for n, name in ((1, "up"), (0, "gate"))])
    assert back == Concat(["gate", "up"], "fused", axis=1, shares=(1, 1))
    assert invert([Part("fused", name, n, 2, axis=1) for n, name in ((0, "gate"), (1, "up"))]) == [back]
    with pytest.raises(UsageError, match="nothing takes part 0 of 2"):
        invert([Part("fused", "up", 1, 2)])
    others = [Part("other", "o", 0, 1), Part("fused", "gate", 0, 2, axis=1), Part("fused", "up", 1, 2, axis=1)]
    assert invert(others) == [Concat(["o"], "other", shares=(1,)), back]
    with pytest.raises(UsageError, match="nothing takes part 1 of 3"):
        invert([Part("fused", "gate", 0, 3), Part("fused", "up", 2, 3)])


def test_rules_that_compute_go_back_from_the_last_to_the_first() -> None:
    """Each takes what the one before it made, be it of the same name."""
    named, *scaled = invert([Scale("a", "a", 2.0), Scale("a", "b", 4.0), Rename("b", "c")])
    assert (named.sources, named.target) == (("c",), "b")
    assert scaled == [Scale("b", "a", 0.25), Scale("a", "a", 0.5)]
    moved = [Stack(["a", "b"], "t"), Rename("c", "s")]
    assert [(rule.sources, rule.target) for rule in invert(moved)] == [(("t",), "a"), (("s",), "c")]
    with pytest.raises(UsageError, match="'a' is used twice"):
        invert([*invert([Rename("x", "y")]), Rename("a", "a"), Rename("a", "t")])


class Grid(Rule):
    """Four vectors of three as the rows of a grid: sources that lack two axes of their target."""

    def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
        """See `Rule`."""
        corners = [(row, column, 0) for row in range(2) for column in range(2)]
        blocks = [Block(tensor, Region.whole((3,)), (2,), at) for (tensor,), at in zip(members, corners)]
        return made_of(name, (2, 2, 3), (2, 2, 3), blocks)

    def source_shapes(self, name: str, shape: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
        """See `Rule`."""
        return [[(3,)]] * 4


def test_a_source_may_lack_several_axes() -> None:
    held = {"t": stored_whole(TensorMeta("t", DTYPES["F32"], (2, 2, 3)), (0,))}
    made = apply_rules(held, invert([Grid(["a", "b", "c", "d"], "t")]))
    assert {name: tensor.meta.shape for name, tensor in made.items()} == dict.fromkeys("abcd", (3,))
    assert box_of_stored(made["c"]) == (held["t"], Region((1, 0, 0), (2, 1, 3)))
    (piece,) = locate(made["b"], Region((1,), (3,)))
    assert piece.piece.in_source == Region((0, 1, 1), (1, 2, 3))


def test_twice_inverted_is_the_rule() -> None:
    rules = [Rename("a", "b"), Stack("e.{n}", "all"), Transpose("w", "v", (1, 0))]
    assert invert(invert(rules)) == rules


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ([Concat(["a", "b"], "t")], "Concat to 't' cannot be inverted: it does not say how wide .* shares="),
        ([QKV(["q", "k", "v"], "t", groups=2)], "QKV to 't' .* shares="),
        ([Experts("e.{n}.w", "t")], "how many experts .* experts="),
        ([Experts(["e.{n}.g", "e.{n}.u"], "t", experts=2)], "shares="),
        ([Interleave("h.{n}", "t")], "how far is not known"),
        ([Rename("a", "t"), Rename("a", "s")], "'a' is used twice"),
        ([Part("a", "t", 0, 2), Part("a", "s", 0, 2)], "'a' is used twice"),
        ([Part("a", "t", 1, 2), Part("a", "s", 1, 2)], "'a' is used twice"),
        ([Part("a", "t", 0, 2), Part("a", "s", 1, 2, axis=1)], "'a' is used twice"),
        ([Part("a", "t", 0, 2), Part("a", "s", 1, 3)], "'a' is used twice"),
        ([Part("a", "t", 0, 2), Part("a", "s", 1, 2), Part("a", "u", 1, 2)], "'a' is used twice, .*'u' is one"),
        ([Part("a", "t", 0, 2), Rename("a", "s")], "'a' is used twice, .*'s' is one"),
        ([Rename("a", "s"), Part("a", "t", 0, 2)], "'a' is used twice, .*'t' is one"),
        ([Stack(["a", "b"], "s"), Rename("b", "t")], "'b' is used twice"),
    ],
)
def test_what_has_no_inverse_says_why(rules: list[Rule], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        invert(rules)


@pytest.mark.parametrize(
    ("rule", "shape", "told"),
    [
        (Concat(["a", "b"], "t", shares=(2, 1)), (4, 2), "4 rows cannot be shared out as"),
        (QKV(["a", "b"], "t", groups=3, shares=(1, 1)), (4, 2), "does not fall into 3 equal groups"),
        (Experts("e.{n}", "t", experts=3), (4, 2), "does not hold 3 experts"),
        (Experts("e.{n}", "t", merge=False), (4, 2), "does not hold experts"),
        (Stack(["a", "b"], "t"), (3, 2), "does not hold 2 sources"),
        (Stack(["a", "b"], "t"), (4, 2), "does not hold 2 sources"),
        (Transpose("a", "t", (0, 1, 2)), (3, 2), "do not permute"),
        (Interleave(["a", "b"], "t", rows=3), (4, 2), "no multiple of 3 rows of 2 sources"),
        (Stack("e.{n}", "t"), (3,), "single values"),
    ],
)
def test_a_shape_that_a_rule_cannot_have_made(rule: Rule, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(LayoutMismatchError, match=told):
        apply_rules({"t": stored_whole(TensorMeta("t", DTYPES["F32"], shape), (0,))}, invert([rule]))


def test_shares_and_numbers_are_held_against_the_sources() -> None:
    held = {
        n: stored_whole(TensorMeta(n, DTYPES["F32"], (r, 4)), (0,))
        for n, r in (("a", 4), ("b", 2), ("e.0", 2), ("f.0", 2))
    }
    for rule, told in [
        (Concat(["a", "b"], "t", shares=(1, 1)), "not as wide as the shares"),
        (QKV(["a", "b"], "t", groups=2, shares=(3, 1)), "not as wide as the shares"),
        (Experts("e.{n}", "t", experts=2), "speaks of 2 experts, but there are 1"),
        (Experts(["e.{n}", "f.{n}"], "t", shares=(1, 2)), "not as wide as the shares"),
    ]:
        with pytest.raises(LayoutMismatchError, match=told):
            apply_rules(held, [rule])
    for shares in ((1,), (1, 1, 1), (1, 0), (-1, 1), (1, 1.0), ("1", 1)):
        with pytest.raises(UsageError, match="shares must be 2 whole numbers"):
            Concat(["a", "b"], "t", shares=shares)  # type: ignore[arg-type]


def test_one_source_needs_no_shares() -> None:
    assert Concat("a", "t").source_shapes("t", (4, 2)) == [[(4, 2)]]
    assert QKV("a", "t", groups=2).source_shapes("t", (4, 2)) == [[(4, 2)]]
    assert Stack(["a", "b"], "t").source_shapes("t", (2, 4)) == [[(4,)], [(4,)]]
    assert Stack("e.{n}", "t", axis=1).source_shapes("t", (4, 3)) == [[(4,)] * 3]
    assert Concat(["a", "b"], "t", axis=1, shares=(4, 2)).source_shapes("t", (4, 6)) == [[(4, 4)], [(4, 2)]]
    assert Interleave("a", "t").source_shapes("t", (3, 2)) == [[(3, 2)]]
    assert Interleave(["a", "b"], "t", axis=1, rows=2).source_shapes("t", (3, 8)) == [[(3, 4)], [(3, 4)]]
    assert Experts("e.{n}", "t", merge=False).source_shapes("t", (2, 3, 4)) == [[(4, 3)] * 2]
    assert Experts("e.{n}", "t", transpose=False, merge=False).source_shapes("t", (2, 3, 4)) == [[(3, 4)] * 2]
    assert Experts(["e.{n}", "f.{n}"], "t", experts=2).source_shapes("t", (6, 4)) == [[(2, 3)] * 2] * 2


@pytest.mark.parametrize("rules", [None, 5, "Rename", [Rename("a", "b"), "c"], Rename("a", "b")])
def test_what_is_no_list_of_rules_cannot_be_inverted(rules: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="must be a list of rules"):
        invert(rules)

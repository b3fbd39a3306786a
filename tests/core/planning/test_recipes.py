"""Parameters made of others: what they say of themselves, and what they are refused for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ms_ckpt_ext.core.geometry.array import DTYPES, Region, View
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.assembly import assembled
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta, locate, require, stored_whole
from ms_ckpt_ext.core.planning.recipes import (
    Block,
    box_of_stored,
    joined_axes,
    made_of,
    packed_as_bytes,
    seen_as,
)
from ms_ckpt_ext.core.planning.rule import shapes_of
from ms_ckpt_ext.core.planning.weight_rules import Duplicate
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, UsageError
from ms_ckpt_ext.rules import AddProduct, Concat, Interleave, Part, Rename, Rule, Scale, Stack, Transpose, invert


def tensor(name: str, *shape: int, dtype: str = "F32", parts: Sequence[int] = ()) -> SourceTensor:
    """Whole in file 0; or in slices, of which only the first is there."""
    meta = TensorMeta(name, DTYPES[dtype], shape)
    if not parts:
        return stored_whole(meta, (0,))
    first = {(0,) * len(shape): (0,)}
    return SourceTensor(meta, name, (Placement(tuple(parts), first, first),))


HELD = {name: tensor(name, 4, 6) for name in "abc"}
MADE = apply_rules(HELD, [Transpose("a", "moved"), Scale("b", "scaled", 2.0), Stack(["c"], "stacked")])


@pytest.mark.parametrize(
    ("shape", "parts", "view", "cut"),
    [
        ((4, 6), (), (2, 2, 6), (1, 1, 1)),
        ((4, 6), (2, 1), (2, 2, 6), (2, 1, 1)),
        ((4, 6), (4, 1), (2, 2, 6), (2, 2, 1)),
        ((4, 6), (1, 3), (4, 3, 2), (1, 3, 1)),
        ((4, 6), (1, 6), (4, 3, 2), (1, 3, 2)),
        ((4, 6), (), (24,), (1,)),
        ((4, 6), (2, 1), (4, 6), (2, 1)),
    ],
)
def test_slices_that_are_boxes_in_another_shape(
    shape: tuple[int, ...], parts: tuple[int, ...], view: tuple[int, ...], cut: tuple[int, ...]
) -> None:
    seen = seen_as(tensor("w", *shape, parts=parts), view)
    assert (seen.meta.shape, seen.placements[0].parts, seen.stored_name) == (view, cut, "w")
    assert seen.placements[0].holders == seen.placements[0].expected == {(0,) * len(view): (0,)}


def test_places_among_slices_are_split_as_well() -> None:
    cells = {(n, m): (4 * m + n,) for n in range(4) for m in range(2)}
    source = tensor("w", 4, 6)._replace(placements=(Placement((4, 2), cells, cells),))
    (seen,) = seen_as(source, (2, 2, 2, 3)).placements
    assert seen.parts == (2, 2, 2, 1)
    assert seen.holders == {(n // 2, n % 2, m, 0): files for (n, m), files in cells.items()}


@pytest.mark.parametrize(
    ("source", "view", "told"),
    [
        (tensor("w", 4, 6), (5, 5), "'w' of shape [4, 6] cannot be seen as [5, 5]"),
        (tensor("w", 4, 6, parts=(1, 2)), (24,), "are no boxes"),
        (tensor("w", 6, parts=(2,)), (3, 2), "2 slices do not fall between [3, 2]"),
        (MADE["moved"], (3, 2, 4), "'moved', which is made by a rule"),
        (MADE["scaled"], (24,), "'scaled', which is made by a rule"),
    ],
)
def test_shapes_in_which_a_tensor_cannot_be_seen(source: SourceTensor, view: tuple[int, ...], told: str) -> None:
    with pytest.raises(LayoutMismatchError) as caught:
        seen_as(source, view)
    assert told in str(caught.value)


def test_the_last_two_axes_become_one() -> None:
    cells = {(n, 0, 0): (n,) for n in range(2)}
    found = joined_axes(tensor("w", 4, 3, 2)._replace(placements=(Placement((2, 1, 1), cells, cells),)))
    assert (found.meta.shape, found.placements[0].parts) == ((4, 6), (2, 1))
    assert found.placements[0].holders == found.placements[0].expected == {(0, 0): (0,), (1, 0): (1,)}
    for refused in (tensor("w", 4, 3, 2, parts=(1, 1, 2)), MADE["moved"]):
        with pytest.raises(LayoutMismatchError, match="cut along the last one, or made by another rule"):
            joined_axes(refused)


def test_four_bits_are_seen_as_bytes() -> None:
    found = packed_as_bytes(tensor("w", 4, 6, dtype="F4"))
    assert (found.meta.shape, found.meta.dtype.name) == ((4, 3), "U8")
    assert packed_as_bytes(tensor("w", 4, 8, dtype="F4", parts=(1, 2))).meta.shape == (4, 4)
    assert packed_as_bytes(tensor("w", 8, dtype="F4", parts=(2,))).meta.shape == (4,)
    for refused in (tensor("w", 4, 5, dtype="F4"), tensor("w", 4, 6, dtype="F4", parts=(1, 2))):
        with pytest.raises(LayoutMismatchError, match="is cut inside one"):
            packed_as_bytes(refused)


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        ([(0, 0)], "not filled exactly by its 1 sources"),
        ([(0, 0), (5, 0)], "not filled exactly"),
        ([(0, 0), (4, 1)], "not filled exactly"),
        ([(0, 0), (4, 0), (0, 0)], "not filled exactly by its 3 sources"),
        ([(0, 0)] * 5, "not filled exactly by its 5 sources"),
    ],
)
def test_blocks_fill_a_parameter_exactly(starts: Sequence[tuple[int, int]], told: str) -> None:
    blocks = [Block(HELD["a"], Region.whole((4, 6)), (0, 1), start) for start in starts]
    with pytest.raises(LayoutMismatchError, match=told) as caught:
        made_of("t", (8, 6), (8, 6), blocks)
    assert str(caught.value).count("'a' [4, 6]") == min(4, len(blocks)), "four are told"


def test_what_a_parameter_is_made_of_in_the_end() -> None:
    deep = apply_rules(MADE, [Scale("moved", "t", 2.0)])["t"]
    assert [source.meta.name for source in deep.stored()] == ["a"]
    assert [tensor.is_computed for tensor in (MADE["moved"], MADE["scaled"], deep)] == [False, True, True]
    split = seen_as(MADE["scaled"], (2, 2, 6))
    assert split.is_computed
    assert [source.meta.name for source in split.stored()] == ["b"]
    assert len({MADE["moved"].recipe.how, MADE["scaled"].recipe.how, split.recipe.how}) == 3  # type: ignore[union-attr]


def test_the_same_is_made_of_other_tensors() -> None:
    split = seen_as(MADE["scaled"], (2, 2, 6))
    deep = apply_rules(MADE, [Scale("moved", "t", 2.0)])["t"]
    for made in (*MADE.values(), split, deep, HELD["a"]):
        other = made.remade(lambda stored: stored._replace(stored_name="other"))
        assert {source.stored_name for source in other.stored()} == {"other"}
        assert other.meta == made.meta
        assert made.remade(lambda stored: stored) == made


@pytest.mark.parametrize(
    ("rule", "box"),
    [
        (Part("a", "t", 1, 2), Region((2, 0), (4, 6))),
        (Rename("a", "t"), None),
        (Transpose("a", "t"), None),
        (Stack("a", "t", axis=2), Region.whole((4, 6))),
        (Concat(["a", "b"], "t"), None),
        (Scale("a", "t", 2.0), None),
        (Transpose("scaled", "t", (0, 1)), None),
    ],
)
def test_a_box_that_has_the_same_bytes(rule: Rule, box: Region | None) -> None:
    found = box_of_stored(apply_rules({**MADE, **HELD}, [rule])["t"])
    assert found == (None if box is None else (HELD["a"], box))


def test_a_row_that_is_transposed_has_the_same_bytes() -> None:
    made = apply_rules({"a": tensor("a", 1, 6)}, [Transpose("a", "t")])["t"]
    assert box_of_stored(made) == (tensor("a", 1, 6), Region.whole((1, 6)))


def test_what_is_computed_or_moved_may_have_more_axes() -> None:
    """A box of it is located as that of the tensor is: in one piece where it is computed, seen as it lies."""
    (found,) = locate(seen_as(MADE["scaled"], (2, 2, 6)), Region((1, 0, 0), (2, 2, 6)))
    assert found.computed is not None
    assert found.computed.box == Region((2, 0), (4, 6))
    assert found.piece.view == View(0, (6, 1))
    one = apply_rules({"s": tensor("s", 3)}, [Part("s", "s1", 1, 3)])["s1"]
    (found,) = locate(seen_as(one, (1, 1)), Region.whole((1, 1)))
    assert found.piece.in_source == Region((1,), (2,))
    assert (found.piece.in_target.size, found.piece.view) == (1, View(0, (1,)))


def test_a_second_copy_is_not_read() -> None:
    assert list(apply_rules(HELD, [Rename("a", "t"), Duplicate("b", "t")])) == ["t", "c"]


def test_what_a_rule_made_is_not_moved_again() -> None:
    with pytest.raises(UsageError, match="'t' needs stored tensors, but some are made by another rule"):
        apply_rules(MADE, [Concat(["moved", "moved"], "t")])
    renamed = apply_rules(MADE, [Rename("moved", "t")])["t"]
    assert (renamed.meta.name, renamed.recipe) == ("t", MADE["moved"].recipe)


@pytest.mark.parametrize("rule", [Interleave(["a", "row"], "t"), Stack(["a", "row"], "t")])
def test_sources_of_one_shape(rule: Rule) -> None:
    with pytest.raises(LayoutMismatchError, match="'t': its sources must have one shape"):
        apply_rules({**HELD, "row": tensor("row", 2, 6)}, [rule])


def test_which_operands_are_needed_whole() -> None:
    """Any but the first; and the first where its pieces are no boxes of it."""
    held = {name: tensor(name, *shape) for name, shape in (("w", (4, 6)), ("b", (4, 2)), ("a", (2, 6)))}
    added, moved = AddProduct(["w", "b", "a"], "t"), Scale("moved", "t", 2.0)
    for made, kept in (
        (apply_rules(held, [added])["t"], [False, False, True, True]),
        (apply_rules(MADE, [moved])["t"], [False, True]),
        (apply_rules(HELD, [Scale("a", "t", 2.0)])["t"], [False, False]),
    ):
        every = [*assembled(made, Region.whole(made.meta.shape)).every()]
        assert [(each.number, each.kept) for each in every] == list(enumerate(kept))


def test_what_is_moved_stands_beside_what_is_computed() -> None:
    """In either order, whatever comes first in the box."""
    for names in (["scaled", "a"], ["a", "scaled"]):
        made = apply_rules({**HELD, "scaled": MADE["scaled"]}, [Concat(names, "t")])["t"]
        found = assembled(made, Region.whole((8, 6)))
        assert [sourced.stored_name for sourced in found.moved] == ["a"]
        assert [step.piece.in_target.shape for step in found.steps] == [(4, 6)]


def test_what_is_computed_of_an_absent_slice_is_missing() -> None:
    made = apply_rules({"h": tensor("h", 4, 6, parts=(2, 1))}, [Scale("h", "t", 2.0)])["t"]
    assert len(locate(made, Region((0, 0), (2, 6)))) == 1
    with pytest.raises(CoverageError, match="'h': no file holds region"):
        locate(made, Region((1, 0), (3, 6)))


def test_a_view_splits_the_axes_of_its_parameter() -> None:
    with pytest.raises(ValueError, match="does not split the axes"):
        made_of("t", (6, 4), (4, 6), [Block(HELD["a"], Region.whole((4, 6)), (0, 1), (0, 0))])


def test_rules_without_inverse_say_so() -> None:
    class Own(Rule):
        """A rule of somebody's that does not say what it is made of."""

        def make(self, name: str, members: Sequence[Sequence[SourceTensor]]) -> SourceTensor:
            """See `Rule`."""
            raise NotImplementedError

    with pytest.raises(UsageError, match="Own to 't' has no inverse"):
        Own("a", "t").source_shapes("t", (4,))
    with pytest.raises(UsageError, match="does not say how it counts"):
        apply_rules({"t": tensor("t", 4, 6)}, invert([Stack("e.{n}.{m}", "t")]))
    (back,) = invert([Stack("e.{n}", "t")])
    with pytest.raises(UsageError, match="the inverse of an inverse, for 't'"):
        back.source_shapes("t", (4,))


@pytest.mark.parametrize(("count", "told"), [(4, "'w' [2], 'w' [2], 'w' [2], 'w' [2]"), (5, ", 'w' [2], …")])
def test_shapes_of_four_are_told(count: int, told: str) -> None:
    found = shapes_of([tensor("w", 2)] * count)
    assert found.endswith(told)
    assert found.count("'w'") == 4


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (["e.0", "e.2"], "'e.{n}' for 1:"),
        (["e.1"], "'e.{n}' for 0:"),
        (["e.900"], "'e.{n}' for 0, 1, 2, 3, 4:"),
        (["e.0", "f.0", "e.1"], "'f.{n}' for 1:"),
        (["g", "e.0"], "'e.{n}':"),  # one counts, the other does not
        (["d.0.1", "c.0.1", "d.0.2"], "'c.{n}.{m}' for 0 2:"),
        (["e.3.0", "e.3.1", "e.4.1"], "'e.{n}.{m}' for 4 0:"),  # where two count, every value of one with every other's
        ([f"e.{n}.{n}" for n in range(9)], "'e.{n}.{m}' for 0 1, 0 2, 0 3, 0 4, 0 5:"),
    ],
)
def test_what_a_rule_lacks_is_told_by_number(names: list[str], absent: str) -> None:
    sources = ["e.{n}", "f.{n}"] if "f.0" in names else ["e.{n}", "g"] if "g" in names else ["e.{n}"]
    sources = ["d.{n}.{m}", "c.{n}.{m}"] if "d.0.1" in names else sources
    sources = ["e.{n}.{m}"] if names[-1].count(".") == 2 and len(sources) == 1 else sources
    with pytest.raises(CoverageError) as caught:
        apply_rules({name: tensor(name, 2) for name in names}, [Stack(sources, "t")])
    assert f"is made of {len(sources)} sources, but the checkpoint has nothing called {absent}" in str(caught.value)


def test_two_placeholders_count_from_any_number() -> None:
    names = ["e.3.1", "e.3.0", "e.4.0", "e.4.1"]
    found = apply_rules({name: tensor(name, 2) for name in names}, [Stack("e.{n}.{m}", "t")])
    assert found["t"].meta.shape == (4, 2)
    assert found["t"].recipe is not None
    assert [block.tensor.meta.name for block in found["t"].recipe.blocks] == sorted(names)


def test_what_is_required_is_looked_for_where_a_slice_is_absent() -> None:
    whole, half = tensor("w", 4), tensor("w", 4, parts=(2,))
    require(half, [Region((0,), (2,))])
    with pytest.raises(CoverageError, match="'w': no file holds region"):
        require(half, [Region((0,), (2,)), Region((1,), (3,))])
    with pytest.raises(CoverageError, match="it should be in the file of rank 0"):
        locate(stored_whole(whole.meta, ()), Region((0,), (4,)))
    asked = iter([Region((0,), (4,))])
    require(whole, asked)
    assert next(asked), "nobody asked where all is there"

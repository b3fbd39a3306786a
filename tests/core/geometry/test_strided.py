"""Copies of boxes as runs of bytes: what numpy copies, in the fewest runs."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import StridedCopy, copy_box, strides_of
from ms_ckpt_ext.errors import LayoutMismatchError


def carried_out(copies: list[StridedCopy], source: np.ndarray, size: int) -> np.ndarray:
    """What copies make of a target of `size` zero bytes; each of them is written once."""
    target, times = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for copy in copies:
        runs = list(copy.runs())
        assert copy.nbytes == copy.run * len(runs)
        assert copy.source_span == max(at for at, _ in runs) + copy.run - copy.source
        assert copy.target_span == max(at for _, at in runs) + copy.run - copy.target
        for start, stop in runs:
            target[stop : stop + copy.run] = source[start : start + copy.run]
            times[stop : stop + copy.run] += 1
    assert times.max(initial=0) <= 1
    return target


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Shape, Region, Shape, Region]:
    """Equal boxes of two arrays."""
    extents = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 4)))]
    sides = []
    for _ in range(2):
        low = tuple(draw(st.integers(0, 2)) for _ in extents)
        high = tuple(a + b for a, b in zip(low, extents))
        sides += [tuple(b + draw(st.integers(0, 1)) for b in high), Region(low, high)]
    return tuple(sides)  # type: ignore[return-value]


@given(boxes(), st.sampled_from(["U8", "F32"]), st.sampled_from([1, 8, 32, 1 << 20]))
def test_a_box_is_copied(case: tuple[Shape, Region, Shape, Region], dtype: str, most: int) -> None:
    """Whole, in parts that span little, and one contiguous stretch of the source at a time."""
    source_shape, in_source, target_shape, in_target = case
    width = DTYPES[dtype].bits // 8
    source = np.arange(1, 1 + prod(source_shape) * width, dtype=np.uint16).astype(np.uint8)
    expected = np.zeros((*target_shape, width), np.uint8)
    expected[in_target.slices] = source.reshape(*source_shape, width)[in_source.slices]
    copy = copy_box(source_shape, in_source, target_shape, in_target, DTYPES[dtype])
    assert carried_out([copy], source, expected.size).tobytes() == expected.tobytes()
    parts = list(copy.bounded(most))
    assert carried_out(parts, source, expected.size).tobytes() == expected.tobytes()
    assert all(part.source_span <= most or not part.counts for part in parts)
    assert len(parts) == 1 or copy.source_span > most
    assert copy.form.at(copy.source, copy.target) == copy
    axes = [*zip(copy.counts, copy.source_strides, copy.target_strides), (copy.run, 1, 1)]
    for (_, *outer), (count, *inner) in zip(axes, axes[1:]):
        assert outer != [count * stride for stride in inner], "what is contiguous on both sides is one axis"
    inner, starts = copy.form.apart(copy.source, copy.target)
    pieces = [inner.at(*start) for start in starts]
    assert carried_out(pieces, source, expected.size).tobytes() == expected.tobytes()
    assert all(piece.source_span == inner.nbytes == copy.nbytes // len(starts) for piece in pieces)
    lying = sorted(start for start, _ in starts)
    gaps = {b - a - inner.nbytes for a, b in zip(lying, lying[1:])}
    assert copy.form.gap() == min(gaps, default=0)
    assert 0 not in gaps, "what is contiguous is one stretch"


def test_axes_that_are_contiguous_on_both_sides_are_one() -> None:
    whole = Region.whole((2, 3, 4))
    assert copy_box((2, 3, 4), whole, (2, 3, 4), whole, DTYPES["F32"]) == StridedCopy(96, (), 0, (), 0, ())
    columns = Region((0, 0, 1), (2, 3, 3))
    found = copy_box((2, 3, 4), columns, (2, 3, 2), Region.whole((2, 3, 2)), DTYPES["F32"])
    assert found == StridedCopy(8, (6,), 4, (16,), 0, (8,))
    rows = Region((0, 1, 0), (2, 3, 4))
    found = copy_box((2, 3, 4), rows, (2, 3, 4), Region((0, 0, 0), (2, 2, 4)), DTYPES["U8"])
    assert found == StridedCopy(8, (2,), 4, (12,), 0, (12,))
    thin = Region((1, 0, 2), (2, 3, 3))
    found = copy_box((2, 3, 4), thin, (1, 3, 1), Region.whole((1, 3, 1)), DTYPES["U8"])
    assert found == StridedCopy(1, (3,), 14, (4,), 0, (1,))


def test_axes_inside_which_others_lie_apart_are_one_as_well() -> None:
    """The two outer ones of four, whatever the inner ones are."""
    found = copy_box(
        (2, 3, 4, 6), Region((0, 0, 1, 1), (2, 3, 3, 4)), (2, 3, 3, 5), Region((0, 0, 1, 2), (2, 3, 3, 5)), DTYPES["U8"]
    )
    assert found == StridedCopy(3, (6, 2), 7, (24, 6), 7, (15, 5))
    turned = copy_box(
        (2, 3, 4), Region.whole((2, 3, 4)), (4, 6), Region.whole((2, 3, 4)), DTYPES["U8"], View(0, (3, 1, 6))
    )
    assert turned == StridedCopy(1, (6, 4), 0, (4, 1), 0, (1, 6))


@pytest.mark.parametrize(
    ("copy", "most", "counts"),
    [
        (StridedCopy(4, (10,), 0, (16,), 0, (4,)), 36, [(3,), (3,), (3,), (1,)]),
        (StridedCopy(4, (10,), 0, (16,), 0, (4,)), 35, [(2,)] * 5),
        (StridedCopy(4, (3,), 0, (16,), 0, (4,)), 3, [()] * 3),
        (StridedCopy(4, (3, 4), 0, (100, 10), 0, (16, 4)), 234, [(3, 4)]),
        (StridedCopy(4, (3, 4), 0, (100, 10), 0, (16, 4)), 233, [(2, 4), (1, 4)]),
        (StridedCopy(4, (3, 4), 0, (100, 10), 0, (16, 4)), 133, [(4,)] * 3),
        (StridedCopy(4, (3, 4), 0, (100, 10), 0, (16, 4)), 33, [(3,), (1,)] * 3),
    ],
)
def test_parts_are_as_large_as_they_may_be(copy: StridedCopy, most: int, counts: list[Shape]) -> None:
    parts = list(copy.bounded(most))
    assert [part.counts for part in parts] == counts
    assert [run for part in parts for run in part.runs()] == list(copy.runs())


def test_a_view_of_the_target() -> None:
    """Every other row, and columns for rows."""
    whole = Region.whole((2, 3))
    found = copy_box((2, 3), whole, (4, 3), whole, DTYPES["BF16"], View(3, (6, 1)))
    assert found == StridedCopy(6, (2,), 0, (6,), 6, (12,))
    found = copy_box((2, 3), whole, (3, 2), whole, DTYPES["BF16"], View(0, (1, 2)))
    assert found == StridedCopy(2, (2, 3), 0, (6, 2), 0, (2, 4))
    part = Region((1, 1), (2, 3))
    found = copy_box((2, 3), part, (3, 2), part, DTYPES["BF16"], View(0, (1, 2)))
    assert found == StridedCopy(2, (2,), 8, (2,), 6, (4,))


def test_a_copy_made_several_times() -> None:
    run, rows = StridedCopy(4, (), 8, (), 0, ()), StridedCopy(4, (2,), 8, (16,), 0, (4,))
    assert run.repeated(1, 9, 9) == run
    assert run.repeated(3, 4, 4) == StridedCopy(12, (), 8, (), 0, ())
    assert run.repeated(3, 4, 8) == StridedCopy(4, (3,), 8, (4,), 0, (8,))
    assert run.repeated(3, 8, 4) == StridedCopy(4, (3,), 8, (8,), 0, (4,))
    assert list(run.repeated(3, 0, 4).runs()) == [(8, 0), (8, 4), (8, 8)], "one source in three places"
    assert rows.repeated(3, 4, 4) == StridedCopy(4, (3, 2), 8, (4, 16), 0, (4, 4))


@pytest.mark.parametrize(
    ("shape", "box", "copied"),
    [
        ((2, 8), Region((0, 2), (2, 6)), StridedCopy(2, (2,), 1, (4,), 0, (2,))),
        ((2, 8), Region((1, 0), (2, 8)), StridedCopy(4, (), 4, (), 0, ())),
        ((2, 3, 8), Region((1, 1, 2), (2, 3, 4)), StridedCopy(1, (2,), 17, (4,), 0, (1,))),
        ((8,), Region((2,), (6,)), StridedCopy(2, (), 1, (), 0, ())),
        ((2, 40), Region((0, 4), (2, 38)), StridedCopy(17, (2,), 2, (20,), 0, (17,))),
        ((2, 8), Region((0, 1), (2, 5)), None),
        ((2, 8), Region((0, 2), (2, 5)), None),
        ((2, 7), Region((0, 2), (2, 6)), None),
        ((), Region((), ()), None),
    ],
)
def test_elements_of_four_bits_are_copied_by_whole_bytes(shape: Shape, box: Region, copied: StridedCopy) -> None:
    whole = Region.whole(box.shape)
    if copied is None:
        with pytest.raises(LayoutMismatchError, match="inside a byte"):
            copy_box(shape, box, box.shape, whole, DTYPES["F4"])
        return
    assert copy_box(shape, box, box.shape, whole, DTYPES["F4"]) == copied
    with pytest.raises(LayoutMismatchError, match="cannot be fused or transposed"):
        copy_box(shape, box, box.shape, whole, DTYPES["F4"], View(0, strides_of(box.shape)))

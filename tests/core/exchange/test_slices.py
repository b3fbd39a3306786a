"""What is needed of a slice, cut into boxes."""

from __future__ import annotations

from math import prod
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid
from ms_ckpt_ext.core.exchange.slices import Placing, cuts_of, cutting_of
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.rules import QKV, Concat, Stack


def test_what_lies_between_is_no_part() -> None:
    """Of rows that are longer than a part only the pieces that someone wants."""
    need = Placing(Region((0, 0), (2, 8)), Region((0, 0), (2, 8)), (2, 8), None, 0)
    cuts = cuts_of((2, 64), (need,), 1, True, DTYPES["F64"], ExchangeLimits(bucket=1024, chunk=128))
    assert [(cut.offset, cut.nbytes) for cut in cuts] == [(0, 128), (512, 128)]
    assert sum(share.nbytes for cut in cuts for share in cut.shares) == 2 * 8 * 8


KIB = 1 << 10
LARGE = ExchangeLimits(bucket=64 << 20, chunk=4 << 20)


def rows_wanted(*spans: tuple[int, int]) -> tuple[Placing, ...]:
    """Boxes of rows of a slice of (1, 1024, 128) float64, a KiB each."""
    boxes = [Region((0, low, 0), (1, high, 128)) for low, high in spans]
    return tuple(Placing(box, box, (1, 1024, 128), None, 0) for box in boxes)


@pytest.mark.parametrize(
    ("spans", "starts"),
    [
        ([(0, 512), (512, 1024)], [0, 512]),  # at the seam of the two
        ([(0, 512), (64, 1024)], [0, 64, 512]),
        ([(0, 512), (63, 1024)], [0, 512]),  # 63 KiB would be a crumb
        ([(0, 512), (961, 1024)], [0, 512]),
        ([(0, 512), (960, 1024)], [0, 960]),  # nobody wants what lies between
        ([(0, 512), (575, 1024)], [0, 512]),  # too near the seam before
        ([(0, 1024)], [0]),
    ],
)
def test_boxes_end_where_what_others_want_begins(spans: list[tuple[int, int]], starts: list[int]) -> None:
    cuts = cuts_of((1, 1024, 128), rows_wanted(*spans), 2, False, DTYPES["F64"], LARGE)
    assert [cut.offset // KIB for cut in cuts] == starts


@pytest.mark.parametrize(
    ("everyone", "receivers", "spans", "nbytes"),
    [
        (True, 64, [(0, 1024)], 1024 * KIB),  # one copy for all
        (True, 64, [(0, 1024), (0, 1024)], 1024 * KIB),
        (False, 64, [(0, 1024)], 128 * KIB),  # 64 copies must fit an eighth of the bucket
        (True, 64, [(0, 1024), (0, 1023)], 128 * KIB),  # not all want the same
        (False, 1, [(0, 1024)], 1024 * KIB),
    ],
)
def test_copies_of_a_part_fit_a_round(
    everyone: bool, receivers: int, spans: list[tuple[int, int]], nbytes: int
) -> None:
    cuts = cuts_of((1, 1024, 128), rows_wanted(*spans), receivers, everyone, DTYPES["F64"], LARGE)
    assert max(cut.nbytes for cut in cuts) == nbytes


@pytest.mark.parametrize(
    ("sources", "targets", "nbytes"),
    [
        ([0, 0], [0, 512], 512 * KIB),  # one copy for all, wherever it lands
        ([0, 512], [0, 0], 128 * KIB),  # what lands at one place is not the same
    ],
)
def test_needs_are_alike_where_they_take_the_same(sources: list[int], targets: list[int], nbytes: int) -> None:
    boxes = [[Region((0, low, 0), (1, low + 512, 128)) for low in some] for some in (sources, targets)]
    needs = tuple(Placing(source, target, (1, 1024, 128), None, 0) for source, target in zip(*boxes))
    cuts = cuts_of((1, 1024, 128), needs, 64, True, DTYPES["F64"], LARGE)
    assert {cut.nbytes for cut in cuts} == {nbytes}


@st.composite
def long_boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A box, some of whose ends are those of the array."""
    ends = [st.sampled_from([0, 1, extent // 2, extent - 1, extent]) | st.integers(0, extent) for extent in shape]
    spans = [sorted(draw(st.lists(end, min_size=2, max_size=2, unique=True))) for end in ends]
    return Region(tuple(low for low, _ in spans), tuple(high for _, high in spans))


def widened(region: Region, by: int) -> Region:
    """A box whose last axis has so many elements for each."""
    return Region(*((*ends[:-1], ends[-1] * by) for ends in (region.start, region.stop)))


@pytest.mark.parametrize(("dtype", "whole"), [("C128", 1), ("U8", 1), ("F4", 2), ("F6_E2M3", 4)])
@given(st.lists(st.sampled_from([1, 2, 3, 700, 20_000]), min_size=1, max_size=3), st.integers(1, 40), st.data())
@settings(max_examples=30)
def test_parts_are_contiguous_and_bring_all_that_is_needed(
    dtype: str, whole: int, extents: list[int], pieces: int, data: st.DataObject
) -> None:
    """Of slices large enough to be cut at what others need, into about so many pieces. So many elements are whole
    bytes."""
    kind, shape = DTYPES[dtype], widened(Region.whole(tuple(extents)), whole).shape
    boxes = [widened(box, whole) for box in data.draw(st.lists(long_boxes(tuple(extents)), min_size=1, max_size=3))]
    needs = tuple(Placing(box, Region.whole(box.shape), box.shape, None, 0) for box in boxes)
    most = max(16, -(-kind.nbytes(prod(shape)) // pieces))
    cuts = cuts_of(shape, needs, 1, False, kind, ExchangeLimits(8 * most, most))
    brought, stop = [0] * len(needs), 0
    for cut in cuts:
        assert stop <= cut.offset and cut.nbytes == kind.nbytes(prod(cut.shape)) <= most
        stop = cut.offset + cut.nbytes
        start = tuple(map(int, np.unravel_index(cut.offset * 8 // kind.bits, shape)))
        thick = next((axis for axis, extent in enumerate(cut.shape) if extent > 1), len(shape))
        assert cut.shape[thick + 1 :] == shape[thick + 1 :], "contiguous"
        for share in cut.shares:
            low, high = (tuple(map(add, start, end)) for end in (share.in_part.start, share.in_part.stop))
            assert Region(low, high).relative_to(boxes[share.need].start) == share.in_target
            assert Region.whole(share.target_shape).intersect(share.in_target) == share.in_target
            assert Region.whole(cut.shape).intersect(share.in_part) == share.in_part
            assert share.nbytes == kind.nbytes(share.in_part.size)
            brought[share.need] += share.in_part.size
        assert cut.whole == all(share.in_part == Region.whole(cut.shape) for share in cut.shares)
    assert brought == [box.size for box in boxes]


def test_a_row_in_the_middle_is_not_widened() -> None:
    """What lies in one index of an axis is contiguous along the next."""
    box = Region((1, 8), (2, 16))
    (cut,) = cuts_of((4, 64), (Placing(box, box, (4, 64), None, 0),), 1, False, DTYPES["U8"], LARGE)
    assert (cut.shape, cut.offset, cut.nbytes, cut.whole, cut.early) == ((1, 8), 64 + 8, 8, True, False)


@pytest.mark.parametrize(
    ("times", "ranks", "nbytes"),
    [
        (1, (0,), 96),
        (1, (0, 1), 48),  # two copies fit 96 bytes
        (2, (0,), 48),  # one rank takes it twice
        (2, (0, 1), 24),
        (3, (0,), 32),
    ],
)
def test_whoever_takes_a_slice_several_times_counts_as_often(times: int, ranks: tuple[int, ...], nbytes: int) -> None:
    source = {"a": stored_whole(TensorMeta("a", DTYPES["U8"], (192,)), (0,))}
    made = apply_rules(source, [Stack(["a"] * times, "t")])["t"]
    grid = Grid((), {(0, 96, times, 192): ranks}, uneven=True)
    cutting = cutting_of(Demand("t", made, (grid,)), 9, ExchangeLimits(bucket=96 * 8, chunk=1 << 10))
    assert cutting.nbytes.tolist() == [nbytes] * (96 // nbytes)
    assert cutting.offset.tolist() == list(range(96, 192, nbytes))


@pytest.mark.parametrize(("rows", "nbytes"), [(96, 96), (97, 48), (144, 48)])
def test_a_slice_that_is_taken_twice_in_part_counts_twice(rows: int, nbytes: int) -> None:
    """All of it, and some of it again."""
    source = {"a": stored_whole(TensorMeta("a", DTYPES["U8"], (96,)), (0,))}
    made = apply_rules(source, [Concat(["a", "a"], "t", axis=0)])["t"]
    grid = Grid((), {(0, rows): (0,)}, uneven=True)
    cutting = cutting_of(Demand("t", made, (grid,)), 9, ExchangeLimits(bucket=96 * 8))
    assert max(cutting.nbytes) == nbytes


def test_what_a_rank_takes_in_several_pieces_counts_once() -> None:
    """All rows of two groups but the first and the last: of every source some in each group."""
    source = {name: stored_whole(TensorMeta(name, DTYPES["U8"], (4, 16)), (0,)) for name in "abc"}
    made = apply_rules(source, [QKV(["a", "b", "c"], "t", groups=2)])["t"]
    grid = Grid((), {(1, 0, 11, 16): (0,)}, uneven=True)
    cutting = cutting_of(Demand("t", made, (grid,)), 9, ExchangeLimits(bucket=48 * 8))
    assert cutting.nbytes.tolist() == [32] * 6, "groups: one copy of each fits 48 bytes, two do not"
    assert cutting.moved.tolist() == [16, 32, 32, 32, 32, 16]

"""What is needed of a slice, cut into boxes."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid
from ms_ckpt_ext.core.exchange.slices import Placing, cuts_of, cutting_of
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.rules import QKV, Stack


def test_what_lies_between_is_no_part() -> None:
    """Of rows that are longer than a part only the pieces that someone wants."""
    need = Placing(Region((0, 0), (2, 8)), Region((0, 0), (2, 8)), (2, 8), None)
    cuts = cuts_of((2, 64), (need,), 1, True, DTYPES["F64"], ExchangeLimits(bucket=1024, chunk=128))
    assert [(cut.offset, cut.nbytes) for cut in cuts] == [(0, 128), (512, 128)]
    assert sum(share.nbytes for cut in cuts for share in cut.shares) == 2 * 8 * 8


KIB = 1 << 10
LARGE = ExchangeLimits(bucket=64 << 20, chunk=4 << 20)


def rows_wanted(*spans: tuple[int, int]) -> tuple[Placing, ...]:
    """Boxes of rows of a slice of (1, 1024, 128) float64, a KiB each."""
    boxes = [Region((0, low, 0), (1, high, 128)) for low, high in spans]
    return tuple(Placing(box, box, (1, 1024, 128), None) for box in boxes)


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


def test_a_row_in_the_middle_is_not_widened() -> None:
    """What lies in one index of an axis is contiguous along the next."""
    box = Region((1, 8), (2, 16))
    (cut,) = cuts_of((4, 64), (Placing(box, box, (4, 64), None),), 1, False, DTYPES["U8"], LARGE)
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


def test_what_a_rank_takes_in_several_pieces_counts_once() -> None:
    """All rows of two groups but the first and the last: of every source some in each group."""
    source = {name: stored_whole(TensorMeta(name, DTYPES["U8"], (4, 16)), (0,)) for name in "abc"}
    made = apply_rules(source, [QKV(["a", "b", "c"], "t", groups=2)])["t"]
    grid = Grid((), {(1, 0, 11, 16): (0,)}, uneven=True)
    cutting = cutting_of(Demand("t", made, (grid,)), 9, ExchangeLimits(bucket=48 * 8))
    assert cutting.nbytes.tolist() == [32] * 6, "groups: one copy of each fits 48 bytes, two do not"
    assert cutting.moved.tolist() == [16, 32, 32, 32, 32, 16]

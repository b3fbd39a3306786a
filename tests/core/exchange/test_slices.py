"""What is needed of a slice, cut into boxes."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.core.exchange.demand import ExchangeLimits
from ms_ckpt_ext.core.exchange.slices import Placing, cuts_of
from ms_ckpt_ext.core.geometry.array import DTYPES, Region


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

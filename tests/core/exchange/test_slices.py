"""What is needed of a slice, cut into boxes."""

from __future__ import annotations

from ms_ckpt_ext.core.exchange.demand import ExchangeLimits
from ms_ckpt_ext.core.exchange.slices import Placing, cuts_of
from ms_ckpt_ext.core.geometry.array import DTYPES, Region


def test_what_lies_between_is_no_part() -> None:
    """Of rows that are longer than a part only the pieces that someone wants."""
    need = Placing(Region((0, 0), (2, 8)), Region((0, 0), (2, 8)), (2, 8), None)
    cuts = cuts_of((2, 64), (need,), 1, True, DTYPES["F64"], ExchangeLimits(bucket=1024, chunk=128))
    assert [(cut.offset, cut.nbytes) for cut in cuts] == [(0, 128), (512, 128)]
    assert sum(share.nbytes for cut in cuts for share in cut.shares) == 2 * 8 * 8

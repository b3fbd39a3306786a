"""What boxes of an array take of the blocks that fill it, and what of that is kept."""

from __future__ import annotations

from ms_ckpt_ext.core.geometry.arrangement import Arrangement, Setting, arrangement
from ms_ckpt_ext.core.geometry.array import Region, View

STACKED = tuple(Setting(Region.whole((3,)), (1,), (number, 0)) for number in range(4))
"""Rows of four blocks."""


def test_bits_of_a_stack() -> None:
    bits = Arrangement((4, 3), (4, 3), STACKED).bits(Region((1, 1), (3, 3)))
    assert [(bit.block, bit.wanted, bit.view) for bit in bits] == [
        (1, Region((1,), (3,)), View(0, (1,))),
        (2, Region((1,), (3,)), View(2, (1,))),
    ]


def test_a_scalar_is_one_bit() -> None:
    (bit,) = Arrangement((), (), (Setting(Region((), ()), (), ()),)).bits(Region((), ()))
    assert (bit.block, bit.wanted, bit.view) == (0, Region((), ()), View(0, ()))


def test_bits_are_kept_up_to_a_number() -> None:
    """Six bits are kept; with a seventh all are forgotten, and six more are kept from then on."""
    made = Arrangement((4, 3), (4, 3), STACKED, most=6)
    rows = [Region((low, 0), (low + 2, 3)) for low in range(3)]
    for first, other in ((rows, Region((0, 0), (1, 3))), (rows, Region((1, 0), (2, 3)))):
        kept = [made.bits(row) for row in first]
        assert [made.bits(row) for row in first] == kept
        assert all(made.bits(row) is bits for row, bits in zip(first, kept))
        single = made.bits(other)
        assert made.bits(other) is single
        assert made.bits(rows[0]) is not kept[0]
        made = Arrangement((4, 3), (4, 3), STACKED, most=6)


def test_what_layers_have_in_common_is_worked_out_once() -> None:
    rows = [Region((low, 0), (high, 3)) for low in range(4) for high in range(low + 1, 5)]
    kept = {target: arrangement((4, 3), (4, 3), STACKED).bits(target) for target in rows}
    assert all(arrangement((4, 3), (4, 3), STACKED).bits(target) is bits for target, bits in kept.items())


def test_what_is_kept_is_counted_anew() -> None:
    made = Arrangement((4, 3), (4, 3), STACKED, most=4)
    whole, row = Region.whole((4, 3)), Region((0, 0), (1, 3))
    made.bits(whole)
    first = made.bits(row)  # forgets the others
    three = made.bits(Region((0, 0), (3, 3)))
    assert made.bits(row) is first
    assert made.bits(Region((0, 0), (3, 3))) is three
    made.bits(Region((1, 0), (2, 3)))
    assert made.bits(row) is not first

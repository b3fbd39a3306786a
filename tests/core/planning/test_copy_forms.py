"""Copies of pieces are remembered, as many as may be."""

from __future__ import annotations

from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.strided import Form
from ms_ckpt_ext.core.planning.copy_forms import CopyForms, CopyPart, PieceCopy
from ms_ckpt_ext.core.planning.pieces import Piece

U8, F32 = DTYPES["U8"], DTYPES["F32"]


def columns(rows: int) -> Piece:
    """The first two of ten columns."""
    box = Region((0, 0), (rows, 2))
    return Piece((0, 0), (rows, 10), box, box)


def test_the_copy_of_a_piece_is_cut_between_rows() -> None:
    piece, form = columns(5), Form(2, (2,), (10,), (2,), 4)
    rest = Form(2, (1,), (10,), (2,), 2)
    parts = CopyPart(0, 12, 0, form), CopyPart(20, 12, 4, form), CopyPart(40, 2, 8, rest)
    assert CopyForms(12).of(piece, (5, 2), U8) == PieceCopy(piece, parts, 10)


def test_a_piece_that_comes_again_is_known() -> None:
    """As what it is: of this type of element, in an array of this shape."""
    forms, piece = CopyForms(1000), columns(4)
    known = forms.of(piece, (4, 2), U8)
    assert forms.of(piece, (4, 2), U8) is known
    assert forms.of(piece, (4, 2), F32).nbytes == 4 * known.nbytes
    assert forms.of(piece, (4, 3), U8).parts[0].form.target_strides == (3,)
    other = forms.of(columns(4), (4, 2), U8)
    assert other is not known
    assert other.parts[0].form is known.parts[0].form, "equal forms are one object"
    assert forms.of(piece, (4, 2), U8) is known, "still"
    assert forms.run_of(7) is forms.run_of(7) == Form(7, (), (), (), 7)


def test_as_many_pieces_are_known_as_may_be() -> None:
    forms, few = CopyForms(1000, kept=2), [columns(rows) for rows in (2, 3, 4)]
    first, second = (forms.of(piece, (9, 2), U8) for piece in few[:2])
    assert forms.of(few[0], (9, 2), U8) is first
    forms.of(few[2], (9, 2), U8)
    assert forms.of(few[0], (9, 2), U8) is not first
    assert forms.of(few[1], (9, 2), U8) == second

"""The copies of pieces, worked out once for a piece that comes again: those of parameters that are alike do."""

from __future__ import annotations

from typing import NamedTuple

from ms_ckpt_ext.core.geometry.array import DType, Shape
from ms_ckpt_ext.core.geometry.strided import Form, StridedCopy, strided_copy
from ms_ckpt_ext.core.planning.pieces import Piece

_KEPT = 1 << 15
"""Pieces whose copies are kept."""


class CopyPart(NamedTuple):
    """A part of a copy: where it begins in the source slice, how much of that it spans, and where it lands."""

    source: int
    span: int
    target: int
    form: Form


class PieceCopy(NamedTuple):
    """The copy of a piece in parts, and its bytes; the piece is kept so that no other one gets its identity."""

    piece: Piece
    parts: tuple[CopyPart, ...]
    nbytes: int


class CopyForms:
    """The copies of pieces, in parts that span at most `most` bytes of the source where they can be cut.

    Equal forms are one object. `kept`: pieces that it remembers.
    """

    def __init__(self, most: int, kept: int = _KEPT) -> None:
        self._most, self._kept = most, kept
        self._known: dict[tuple[int, Shape, str], PieceCopy] = {}
        self._forms: dict[Form, Form] = {}
        self._runs: dict[int, Form] = {}

    def of(self, piece: Piece, shape: Shape, dtype: DType) -> PieceCopy:
        """The copy that moves a piece into an array of `shape`, cut along its outer axes."""
        key = id(piece), shape, dtype.name
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= self._kept:
                self._known.clear()
            copy = strided_copy(piece, shape, dtype)
            parts = tuple(map(self._part, copy.bounded(self._most)))
            known = self._known[key] = PieceCopy(piece, parts, copy.nbytes)
        return known

    def run_of(self, nbytes: int) -> Form:
        """The form of a copy of one run."""
        found = self._runs.get(nbytes)
        if found is None:
            form = Form(nbytes, (), (), (), nbytes)
            found = self._runs[nbytes] = self._forms.setdefault(form, form)
        return found

    def _part(self, copy: StridedCopy) -> CopyPart:
        form = copy.form
        return CopyPart(copy.source, copy.source_span, copy.target, self._forms.setdefault(form, form))

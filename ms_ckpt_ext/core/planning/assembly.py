"""A box of a parameter as it is put together: what is moved into it, and what is computed into it, from boxes alike.

1. Pieces that are stored are moved into the box, as for any parameter.
2. What is computed is a *step*: an operation, the box of its result, and where that lands. Its operands are boxes to
   be put together in turn.

A parameter that is stored, or made by moving alone, is one assembly without steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.planning.pieces import Piece, Sourced, SourceTensor, locate
from ms_ckpt_ext.core.planning.recipes import Operation, Recipe, SplitAxes


class Step(NamedTuple):
    """What is computed: a box of an operation's result, its operands, and the piece as which it lands."""

    operation: Operation
    box: Region
    operands: tuple[Assembly, ...]
    piece: Piece


class Assembly(NamedTuple):
    """A box of a tensor.

    Attributes:
        number: counts the assemblies of a box that is wanted; that box itself is number 0.
        moved: stored pieces.
        steps: what is computed.
        kept: it is an operand that is needed whole: any but the first, and a first one whose pieces are no boxes of it.
    """

    number: int
    tensor: SourceTensor
    region: Region
    moved: tuple[Sourced, ...]
    steps: tuple[Step, ...]
    kept: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.tensor.meta.dtype.nbytes(self.region.size)

    def every(self) -> Iterator[Assembly]:
        """This one, and all that are needed for it."""
        yield self
        for step in self.steps:
            for operand in step.operands:
                yield from operand.every()


def assembled(tensor: SourceTensor, region: Region) -> Assembly:
    """How a box is put together. Raises CoverageError as `locate`."""
    return _assembled(tensor, region, count())


def _assembled(tensor: SourceTensor, region: Region, numbers: Iterator[int], kept: bool = False) -> Assembly:
    number = next(numbers)
    moved, steps = [], []
    for sourced in locate(tensor, region):
        if sourced.computed is None:
            moved.append(sourced)
            continue
        (operation, operands), box = sourced.computed
        taken = enumerate(zip(operands, operation.takes(box)))
        needed = tuple(
            _assembled(operand, part, numbers, at > 0 or isinstance(operand.recipe, (Recipe, SplitAxes)))
            for at, (operand, part) in taken
        )
        steps.append(Step(operation, box, needed, sourced.piece))
    return Assembly(number, tensor, region, tuple(moved), tuple(steps), kept)

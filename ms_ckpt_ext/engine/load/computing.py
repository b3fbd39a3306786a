"""Parameters of a cooperative load that are computed: what arrives is what they are computed from.

1. The pieces of an operation's first operand are computed with as they arrive, and what comes of it is placed where it
   belongs. The other operands (scales of blocks) are kept whole until the load of the parameter is over. They are read
   first (`core.exchange.rounds`); a piece that comes before them nonetheless waits.
2. A first operand that is itself made by moving is kept whole as well, for its pieces are no boxes of it.
3. What is computed from nothing is computed at the end.

It happens in host memory; where buffers are on a device, the pieces come down and the results go up again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.demand import Demand
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import copy_box
from ms_ckpt_ext.core.planning.assembly import Assembly, Step, assembled
from ms_ckpt_ext.core.planning.io_units import cut
from ms_ckpt_ext.core.planning.recipes import Operand
from ms_ckpt_ext.engine.copying.strides import copy_strided
from ms_ckpt_ext.engine.load.slabs import Mover, SliceSink
from ms_ckpt_ext.transport.base import B, Bytes

_AT_ONCE = 4 << 20
"""Bytes of a result that are computed and placed together."""


class Computing(Generic[B]):
    """A rank's box of a parameter, some of which is computed.

    Args:
        sink: where the box lands.
    """

    def __init__(self, demand: Demand, rank: int, sink: SliceSink[B], mover: Mover[B]) -> None:
        self._sink, self._mover = sink, mover
        self._boxes: dict[int, _Box[B]] = {}
        self._steps: list[_Step[B]] = []
        self._grow(assembled(demand.tensor, _region_of(demand, rank)), None)

    def _grow(self, wanted: Assembly, consumer: Optional[_Step[B]]) -> None:
        box = self._boxes[wanted.number] = _Box(wanted, consumer)
        for step in wanted.steps:
            node = _Step(step, box, self)
            for operand in step.operands:
                self._grow(operand, node)
            node.ready_for([self._boxes[operand.number] for operand in step.operands])
            self._steps.append(node)  # what is computed first comes first

    def place(
        self,
        into: int,
        source: B,
        offset: int,
        shape: Shape,
        box: Region,
        dtype: DType,
        region: Region,
        view: Optional[View],
    ) -> None:
        """Take a box of the array of `shape` at byte `offset` of `source`, that lands in box `into`."""
        whole = Region((0,) * len(shape), shape)
        held = self._mover.fetch(source, offset, dtype.nbytes(whole.size))
        self._boxes[into].land(held, shape, box, region, view)

    def result(self, into: _Box[B], values: Bytes, region: Region, view: Optional[View]) -> None:
        """Take what was computed, for a region of a box."""
        shape = region.shape
        whole = Region((0,) * len(shape), shape)
        if into.consumer is None:
            self._sink.place(self._mover.put(values), 0, shape, whole, region, view)
        else:
            into.land(values, shape, whole, region, view)

    def finish(self) -> None:
        """All pieces have landed: compute what is computed from nothing. Raises ValueError if something is missing."""
        for step in self._steps:
            step.finish()


def computing_of(
    demands: Sequence[Demand], rank: int, sinks: Mapping[int, SliceSink[B]], mover: Mover[B]
) -> dict[int, Computing[B]]:
    """Those of the demands of a rank, by number, of which something is computed."""
    some = [number for number in sinks if demands[number].tensor.is_computed]
    return {number: Computing(demands[number], rank, sinks[number], mover) for number in some}


def _region_of(demand: Demand, rank: int) -> Region:
    for grid in demand.grids:
        for cell, ranks in grid.ranks.items():
            if rank in ranks:
                return grid.region(cell, demand.tensor.meta.shape)
    raise ValueError(f"rank {rank} does not want {demand.name!r}")


class _Box(Generic[B]):
    """A box of an operand (or the box that is wanted, which has no consumer): kept whole, or passed on as it comes."""

    def __init__(self, wanted: Assembly, consumer: Optional[_Step[B]]) -> None:
        self.wanted, self.consumer = wanted, consumer
        self.passes = not wanted.kept
        self.bytes: Optional[Bytes] = np.empty(wanted.nbytes, np.uint8) if wanted.kept else None
        self._missing = wanted.nbytes

    @property
    def complete(self) -> bool:
        return not self._missing

    def land(self, held: Bytes, shape: Shape, box: Region, region: Region, view: Optional[View]) -> None:
        """Take a box of an array, for a region of this one."""
        assert self.consumer is not None
        dtype, here = self.wanted.tensor.meta.dtype, Region.whole(box.shape)
        self._missing -= dtype.nbytes(box.size)
        if self.bytes is not None:
            copy_strided(copy_box(shape, box, self.wanted.region.shape, region, dtype, view), held, self.bytes)
            if self.complete:
                self.consumer.wake()
            return
        values = np.empty(dtype.nbytes(box.size), np.uint8)
        copy_strided(copy_box(shape, box, box.shape, here, dtype), held, values)
        self.consumer.feed(values, _moved(region, self.wanted.region.start))


def _moved(region: Region, by: Shape) -> Region:
    return Region(
        tuple(low + step for low, step in zip(region.start, by)),
        tuple(high + step for high, step in zip(region.stop, by)),
    )


class _Step(Generic[B]):
    """An operation and what has come of it."""

    def __init__(self, step: Step, into: _Box[B], owner: Computing[B]) -> None:
        self._step, self._into, self._owner = step, into, owner
        self._operands: list[_Box[B]] = []
        self._waiting: list[tuple[Bytes, Region]] = []
        self._missing = step.box.size

    def ready_for(self, operands: list[_Box[B]]) -> None:
        self._operands = operands

    def feed(self, values: Bytes, region: Region) -> None:
        """A box of the first operand, in its own indices."""
        self._waiting.append((values, region))
        self.wake()

    def wake(self) -> None:
        """Compute with what has come of the first operand, if all others are there."""
        kept = [box for box in self._operands if not box.passes]
        if not all(box.complete for box in kept):
            return
        if self._operands and not self._operands[0].passes:
            first = self._operands[0]
            assert first.bytes is not None
            self._waiting.append((first.bytes, first.wanted.region))
        waiting, self._waiting = self._waiting, []
        others = [
            Operand(memoryview(box.bytes), box.wanted.region) for box in self._operands[1:] if box.bytes is not None
        ]
        for values, region in waiting:
            box = self._step.operation.gives(region).intersect(self._step.box)
            if box is not None:
                self._compute(box, [Operand(memoryview(values), region), *others])

    def finish(self) -> None:
        if not self._step.operands:
            self._compute(self._step.box, [])
        if self._missing:
            raise ValueError(f"{self._missing} elements of {self._into.wanted.tensor.meta.name!r} were not computed")

    def _compute(self, box: Region, operands: list[Operand]) -> None:
        dtype = self._into.wanted.tensor.meta.dtype
        for part in cut(box, 0, dtype, _AT_ONCE):
            values = np.empty(dtype.nbytes(part.size), np.uint8)
            self._step.operation.compute(part, operands, memoryview(values))
            landing = _moved(part.relative_to(self._step.box.start), self._step.piece.in_target.start)
            self._owner.result(self._into, values, landing, self._step.piece.view)
            self._missing -= part.size

"""How boxes of several arrays fill a view of another one: the geometry that all parameters of one kind share.

Experts of every layer are arranged alike, so what a target takes of which block is worked out once for all of them.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from ms_ckpt_ext.core.geometry.array import Region, Shape, View
from ms_ckpt_ext.core.geometry.view import Frame, frames

_KEPT = 1 << 17
"""Bits that an arrangement keeps."""


class Setting(NamedTuple):
    """A box of an array, the axes of the view along which its axes run, and the corner of its box in the view."""

    region: Region
    axes: tuple[int, ...]
    start: Shape

    @property
    def box(self) -> Region:
        """Its box in the view; one thick along axes that `axes` does not name."""
        thick = dict(zip(self.axes, self.region.shape))
        return Region(self.start, tuple(low + thick.get(axis, 1) for axis, low in enumerate(self.start)))


class Bit:
    """What a target takes of a block: the box of the block's array, and how that lies in the target.

    Attributes:
        block: its number.
    """

    __slots__ = ("block", "known", "view", "wanted")

    def __init__(self, block: int, wanted: Region, view: View) -> None:
        self.block, self.wanted, self.view = block, wanted, view
        self.known: tuple[Any, Any] = (None, None)
        """A piece, and what was made of it last: often the next parameter of its kind gives the same one."""


class Arrangement:
    """Blocks that fill a view of an array of `shape`. Those that are equal are one object, see `arrangement`.

    `most`: bits that it keeps.
    """

    def __init__(self, shape: Shape, view: Shape, settings: tuple[Setting, ...], most: int = _KEPT) -> None:
        self.shape, self.view, self.settings, self._most = shape, view, settings, most
        self.boxes = tuple(setting.box for setting in settings)
        self._bits: dict[Region, tuple[Bit, ...]] = {}
        self._count = 0

    @cached_property
    def text(self) -> str:
        """All of it."""
        return f"{self.shape}, {self.view}, {self.settings}"

    def bits(self, target: Region) -> tuple[Bit, ...]:
        """What a box of the array takes of the blocks."""
        found = self._bits.get(target)
        if found is None:
            found = tuple(bit for frame in frames(self.shape, self.view, target) for bit in self._of(frame))
            if self._count + len(found) > self._most:
                self._bits, self._count = {}, 0
            self._bits[target] = found
            self._count += len(found)
        return found

    def _of(self, frame: Frame) -> list[Bit]:
        found = []
        first, last = (frame.box.start[0], frame.box.stop[0]) if self.view else (0, 1)
        for number, (setting, box) in enumerate(zip(self.settings, self.boxes)):
            if box.start and (box.start[0] >= last or box.stop[0] <= first):
                continue  # most of them, when experts are stacked
            common = box.intersect(frame.box)
            if common is None:
                continue
            shift = [(axis, low - setting.start[axis]) for axis, low in zip(setting.axes, setting.region.start)]
            wanted = Region(
                tuple(common.start[axis] + by for axis, by in shift),
                tuple(common.stop[axis] + by for axis, by in shift),
            )
            inside = common.relative_to(frame.box.start).start
            offset = frame.offset + sum(low * stride for low, stride in zip(inside, frame.strides))
            found.append(Bit(number, wanted, View(offset, tuple(frame.strides[axis] for axis in setting.axes))))
        return found


@lru_cache(maxsize=256)
def arrangement(shape: Shape, view: Shape, settings: tuple[Setting, ...]) -> Arrangement:
    """The arrangement of these blocks."""
    return Arrangement(shape, view, settings)

"""Cutting and landing on the NPU: views of device tensors, and one copy per piece.

A stretch of a staging buffer seen as the element type of a parameter is a view (`narrow`, `view`), and so is a box of
it. `copy_` from one view to another moves the bytes on the device, strided axes included, and casts where the
Parameter has another dtype. A stretch that starts between elements is moved to an aligned buffer first.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple, Optional

import numpy as np
from mindspore import mint

from ms_ckpt_ext.bridge import memory
from ms_ckpt_ext.bridge.match import Match
from ms_ckpt_ext.bridge.memory import (
    ParameterSink,
    contents_of,
    give_device_memory,
)
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import byte_box
from ms_ckpt_ext.core.geometry.view import nests
from ms_ckpt_ext.engine.load.replicas import SliceBytes
from ms_ckpt_ext.transport.base import Bytes, Transport

CARRIERS = {1: ms.int8, 2: ms.int16, 4: ms.int32, 8: ms.int64}
"""Types that carry elements of a width without interpreting them."""
NUMPY_CARRIERS = {ms.int8: np.int8, ms.int16: np.int16, ms.int32: np.int32, ms.int64: np.int64}


class Upload(NamedTuple):
    """A copy under way; what it reads from must stay until it is over."""

    over: Any
    host: Bytes
    source: Any


class DeviceMover:
    """Chunks go up to the device as they are, from pinned memory, on a stream of their own, and are cut there."""

    def __init__(self, transport: Transport[Any]) -> None:
        self._transport = transport
        self._stream = ms.runtime.Stream()
        self._free: list[Bytes] = []
        self._idle: list[Any] = []
        self._going: deque[Upload] = deque()

    def host(self, nbytes: int) -> Bytes:
        """Pinned memory, reused when its upload is over."""
        while self._going and self._going[0].over.query():
            self._free.append(self._going.popleft().host)
        return self._free.pop() if self._free else self._transport.pinned(nbytes)

    def stage(self, host: Bytes, nbytes: int) -> Any:
        """A device buffer into which these bytes are under way; what is launched from now on waits for them."""
        buffer = self._idle.pop() if self._idle else self._transport.allocate(host.nbytes)
        over, source = ms.runtime.Event(), ms.Tensor.from_numpy(host[:nbytes].view(np.int8))
        current = ms.runtime.current_stream()
        self._stream.wait_stream(current)  # the buffer's last cuts are over
        with ms.runtime.StreamCtx(self._stream):
            mint.narrow(buffer, 0, 0, nbytes).copy_(source, non_blocking=True)
            over.record(self._stream)
        current.wait_event(over)
        self._going.append(Upload(over, host, source))
        return buffer

    def release(self, staged: Any) -> None:
        """Let a buffer be uploaded into again."""
        self._idle.append(staged)

    def pack(self, source: Any, offset: int, shape: Shape, box: Region, dtype: DType, target: Any, at: int) -> None:
        """One copy between views."""
        shape, box, carrier, width = _carried(shape, box, dtype, offset, at)
        cut = _cut(_array(source, offset, shape, carrier, width), box)
        _array(target, at, box.shape, carrier, width).copy_(cut)

    def fetch(self, source: Any, offset: int, nbytes: int) -> Bytes:
        """A copy from the device."""
        return fetched(source, offset, nbytes)

    def put(self, host: Bytes) -> Any:
        """A copy on the device."""
        buffer = self._transport.allocate(host.nbytes)
        buffer.copy_(ms.Tensor.from_numpy(host.view(np.int8)))
        return buffer


def fetched(source: Any, offset: int, nbytes: int) -> Bytes:
    """Bytes of a device buffer, in host memory."""
    found: Bytes = mint.narrow(source, 0, offset, nbytes).asnumpy().view(np.uint8)
    return found


class DeviceSink:
    """A Parameter on the device."""

    def __init__(self, match: Match, transport: Transport[Any]) -> None:
        self._parameter, self._offer, self._transport = match.parameter, match.offer, transport
        self._dtype = match.offer.tensor.meta.dtype
        self._begun = False

    def place(self, source: Any, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]) -> None:
        """One copy between views, cast where the Parameter has another dtype."""
        self._begin()
        if self._parameter.dtype != self._offer.dtype:
            self._place_cast(source, offset, shape, box, region, view)
            return
        lying, cut, carrier, width = _carried(shape, box, self._dtype, offset)
        if view is not None:
            if carrier is ms.int8:
                grain = self._dtype.bits // 8
                view = View(view.offset * grain, (*(stride * grain for stride in view.strides), 1))
                region = Region((*region.start, 0), (*region.stop, grain))
            _scatter(
                self._parameter.view(carrier), view, region, _array(source, offset, (*lying, 1), carrier, width), cut
            )
            return
        whole: Shape = self._offer.shape
        if carrier is ms.int8:
            whole, region = byte_box(whole, region, self._dtype)
        target = self._parameter.view(carrier).view(*(whole or (1,)))
        _cut(target, region).copy_(_cut(_array(source, offset, lying, carrier, width), cut))

    def _begin(self) -> None:
        """Before the first piece lands nothing is changed."""
        if not self._begun:
            give_device_memory(self._parameter, self._offer.shape)
            self._begun = True

    def _place_cast(
        self, source: Any, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]
    ) -> None:
        width = self._dtype.bits // 8
        if offset % width:
            nbytes = math.prod(shape) * width
            aligned = self._transport.allocate(nbytes)
            aligned.copy_(mint.narrow(source, 0, offset, nbytes))
            source, offset = aligned, 0
        if view is not None:
            _scatter(self._parameter, view, region, _array(source, offset, (*shape, 1), self._offer.dtype, width), box)
            return
        target = self._parameter.view(*(self._offer.shape or (1,)))
        cut = _cut(_array(source, offset, shape, self._offer.dtype, width), box)
        _cut(target, region).copy_(cut)

    def finish(self) -> None:
        """All pieces have landed."""
        self._begin()
        memory.mark_loaded(self._parameter)

    def contents(self) -> SliceBytes:
        """What the Parameter holds, after any cast."""
        return contents_of(self._parameter)


class KeptSink(ParameterSink):
    """A Parameter that stays in host memory: its pieces come down from the device."""

    def __init__(self, match: Match) -> None:
        super().__init__(match, kept=True)
        self._dtype = match.offer.tensor.meta.dtype

    def place(self, source: Any, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]) -> None:
        """One copy down, one strided copy."""
        super().place(fetched(source, offset, self._dtype.nbytes(math.prod(shape))), 0, shape, box, region, view)


def _carried(shape: Shape, box: Region, dtype: DType, *offsets: int) -> tuple[Shape, Region, Any, int]:
    """Shape, box, type and width under which elements move: their own width when aligned, else single bytes."""
    width = dtype.bits // 8
    if width > 1 and dtype.bits % 8 == 0 and width in CARRIERS and all(offset % width == 0 for offset in offsets):
        return shape, box, CARRIERS[width], width
    return (*byte_box(shape, box, dtype), ms.int8, 1)


def _array(buffer: Any, offset: int, shape: Shape, dtype: Any, width: int) -> Any:
    """An array of `shape` at byte `offset` of a flat int8 buffer, as a view; a scalar has one axis of length 1."""
    flat = mint.narrow(buffer, 0, offset, math.prod(shape) * width)
    return (flat if dtype is ms.int8 else flat.view(dtype)).view(*(shape or (1,)))


def _cut(array: Any, box: Region) -> Any:
    """A box of an array, as a view."""
    for axis, (start, stop) in enumerate(zip(box.start, box.stop)):
        if stop - start != array.shape[axis]:
            array = mint.narrow(array, axis, start, stop - start)
    return array


def _scatter(target: Any, view: View, region: Region, array: Any, box: Region) -> None:
    """Copy a box of an array, which has one more axis of length 1, to a box of a view of a tensor."""
    flat = target.view(-1)
    cut = _cut(array, Region((*box.start, 0), (*box.stop, 1)))
    for nest in nests(flat.shape[0], view, region):
        seen = mint.narrow(flat, 0, nest.start, math.prod(nest.shape)).view(*nest.shape)
        part = Region((*nest.part.start, 0), (*nest.part.stop, 1))
        mint.permute(_cut(seen, nest.box), nest.order).copy_(_cut(cut, part))

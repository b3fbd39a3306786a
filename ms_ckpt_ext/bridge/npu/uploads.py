"""What a rank reads for itself goes up straight into Parameters, from two slabs of pinned memory in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mindspore import mint

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge import memory
from ms_ckpt_ext.bridge.match import Match, Offer, nbytes_of
from ms_ckpt_ext.bridge.memory import give_device_memory
from ms_ckpt_ext.bridge.npu.cutting import CARRIERS, NUMPY_CARRIERS, Upload
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.planning.io_units import cut
from ms_ckpt_ext.transport.base import Bytes
from ms_ckpt_ext.transport.hccl import pinned

_UPLOAD_ALIGNMENT = 64
"""Bytes to which stretches begin in a slab."""


class Tile(NamedTuple):
    """A stretch of a slice: what is read for it, at which byte of the slice it begins, and whether it is the last."""

    match: Match
    offer: Offer
    start: int
    last: bool


def tiles_of(match: Match, most: int) -> Iterator[Tile]:
    """A slice in stretches of at most `most` bytes, in order; for an empty slice one, without bytes."""
    offer, start = match.offer, 0
    dtype = offer.tensor.meta.dtype
    if offer.region is None or not nbytes_of(offer):
        yield Tile(match, offer, 0, True)
        return
    for box in cut(offer.region, 0, dtype, most):
        nbytes = dtype.nbytes(box.size)
        yield Tile(match, offer._replace(region=box, shape=box.shape), start, start + nbytes == nbytes_of(offer))
        start += nbytes


class Uploads:
    """Stretches of slices go up from pinned memory into their Parameters, on a stream of their own.

    There are two slabs of host memory: while one is uploaded, the other is read into.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._stream = ms.runtime.Stream()
        self._slabs: list[Bytes] = []
        self._going: deque[Upload] = deque()

    def slab(self) -> Bytes:
        """Memory to read into. Waits for the upload before the last one."""
        if len(self._slabs) + len(self._going) < 2:
            return pinned(self._nbytes)
        if not self._slabs:
            self._end_one()
        return self._slabs.pop()

    def send(self, slab: Bytes, placed: Sequence[tuple[Tile, int]]) -> None:
        """Start the upload of what was read: tiles, and where in the slab they lie. The slab goes back."""
        over, current, kept = ms.runtime.Event(), ms.runtime.current_stream(), []
        for tile, _ in placed:
            give_device_memory(tile.match.parameter, tile.match.offer.shape)
        self._stream.wait_stream(current)  # what was launched before may still read the Parameters
        with ms.runtime.StreamCtx(self._stream):
            for tile, at in placed:
                kept.append(_send(tile, slab[at : at + nbytes_of(tile.offer)]))
            over.record(self._stream)
        current.wait_event(over)
        self._going.append(Upload(over, slab, kept))
        for tile, _ in placed:
            if tile.last:
                memory.mark_loaded(tile.match.parameter)

    def _end_one(self) -> None:
        upload = self._going.popleft()
        upload.over.synchronize()
        self._slabs.append(upload.host)

    def finish(self) -> None:
        """All uploads are over."""
        while self._going:
            self._end_one()


def _send(tile: Tile, host: Bytes) -> Any:
    """Launch the copies of a stretch; returns what must stay until they are over."""
    parameter, dtype = tile.match.parameter, tile.offer.dtype
    width = tile.offer.tensor.meta.dtype.bits // 8
    elements = host.nbytes // width
    if not elements:
        return None
    carrier = CARRIERS.get(width, ms.int8)
    source = ms.Tensor.from_numpy(host.view(NUMPY_CARRIERS[carrier]))
    flat = parameter.view(*(parameter.shape or (1,))).view(-1)
    target = mint.narrow(flat, 0, tile.start // width, elements)
    if parameter.dtype == dtype:
        target.view(carrier).copy_(source, non_blocking=True)
        return source
    if not tile.start:
        log.warning("parameter %r is cast from %s to %s", parameter.name, dtype, parameter.dtype)
    staged = mint.empty((elements,), dtype=dtype)
    staged.view(carrier).copy_(source, non_blocking=True)
    target.copy_(staged)
    return source, staged


def in_slabs(matches: Sequence[Match], nbytes: int, most: int) -> Iterator[list[tuple[Tile, int]]]:
    """Stretches of slices, each of at most `most` bytes, that fill a slab of `nbytes` together, and where each lies."""
    group: list[tuple[Tile, int]] = []
    at = 0
    for match in matches:
        for tile in tiles_of(match, most):
            size = nbytes_of(tile.offer)
            if group and at + size > nbytes:
                yield group
                group, at = [], 0
            group.append((tile, at))
            at += size + -size % _UPLOAD_ALIGNMENT
    if group:
        yield group

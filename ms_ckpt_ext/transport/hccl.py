"""Ranks of a MindSpore job on Ascend: collectives between device memories.

Buffers are uint8 device tensors; a `mint.narrow` of axis 0 is contiguous and costs nothing, so every stretch is a view.

    all_gather   AllGather when all counts are equal, else AllGatherV. HCCL has no AllGatherV on the first generation
                 (soc version `ascend910`: 910A, 910 Pro): there each rank's part is padded to the longest, gathered,
                 and cut out of a second buffer on the device.
    all_to_all   AlltoAllV.

A handle's `wait()` blocks the host until the bytes are there, and raises if they never come. Both takes two calls in
MindSpore 2.10.0: `Stream.synchronize()` waits without holding the interpreter lock, but only logs a failed collective
and returns (so do `mindspore.runtime.synchronize()` and `Event.query()`); `Event.synchronize()` raises, but holds the
lock, which would stop the threads that read files meanwhile. So the stream first, then the event, which is then over.

Only the given group's communicator is used and none is created: each costs two HCCL buffers of device memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Optional

import mindspore
import numpy as np
from mindspore import mint
from mindspore.mint import distributed

from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.transport.base import (
    Bytes,
    Done,
    Handle,
    Ranks,
    TransportTraits,
    check_counts,
    check_members,
    check_room,
    flat_bytes,
    offsets,
)
from ms_ckpt_ext.transport.control import FIRST_MEETING, ControlPlane, pack_cell, unpack_cell
from ms_ckpt_ext.transport.gather import gather
from ms_ckpt_ext.transport.rendezvous.cells import CELL_BYTES

_WITHOUT_ALL_GATHER_V = ("ascend910",)
"""Soc versions, as MindSpore spells them; `ascend910b` and `ascend910_93` are later generations."""


class Hccl:
    """The ranks of `group`, all of the job by default; the communication was initialized.

    Args:
        timeout: seconds that one call may last while all ranks are alive.
        group: name of an existing group of which this rank is a member.
        padded: whether uneven all-gathers are padded; None decides by the soc version.

    A rank that dies is a PeerError with its number on all others within a second, also while they wait for a
    collective; see `control` for what lingers. A collective that fails by itself is a TransportError.
    """

    traits = TransportTraits(on_device=True, overlaps=True)

    def __init__(self, timeout: float, group: Optional[str] = None, padded: Optional[bool] = None) -> None:
        self._group = group
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        self._padded = _soc_version() in _WITHOUT_ALL_GATHER_V if padded is None else padded
        self._control = ControlPlane(self.rank, self.size, timeout, self._gather)
        self._control.enter(self._announce)

    def allocate(self, nbytes: int) -> mindspore.Tensor:
        """A device tensor of `nbytes` bytes."""
        return mint.empty((nbytes,), dtype=mindspore.uint8)

    def upload(self, host: Bytes, buffer: mindspore.Tensor, offset: int) -> None:
        """Copy `host` into `buffer`."""
        source = flat_bytes(host)
        if offset + source.nbytes > buffer.shape[0]:
            raise UsageError(f"{source.nbytes} bytes at offset {offset} do not fit into a buffer of {buffer.shape[0]}")
        if source.nbytes:
            _front(buffer, source.nbytes, offset).copy_(mindspore.Tensor(source))

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        return self._control.share(payload)

    def free_bytes(self) -> int:
        """Not asked yet."""
        return 0

    def start_all_gather(
        self, send: mindspore.Tensor, nbytes: int, recv: mindspore.Tensor, group: Ranks = ()
    ) -> Handle:
        """See `Transport`; all ranks only."""
        members = check_members("all_gather", group, self.size, self.rank)
        check_room("all_gather", nbytes, "send", send.shape[0])
        check_room("all_gather", nbytes * len(members), "recv", recv.shape[0])
        self._all(members)
        self._control.check("all_gather")
        doing = f"all_gather of {nbytes} bytes each"
        source, target = _front(send, nbytes), _front(recv, nbytes * self.size)
        with self._control.explaining(doing):
            handle = distributed.all_gather_into_tensor(target, source, self._group, async_op=True)
        return _Pending(self._control, handle, doing, (source, target))

    def start_broadcast(self, buffer: mindspore.Tensor, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """See `Transport`; all ranks only."""
        self._all(check_members("broadcast", group, self.size, self.rank, root))
        check_room("broadcast", nbytes, "buffer", buffer.shape[0])
        self._control.check("broadcast")
        doing = f"broadcast of {nbytes} bytes from rank {root}"
        front = _front(buffer, nbytes)
        with self._control.explaining(doing):
            handle = distributed.broadcast(front, root, self._group, async_op=True)
        return _Pending(self._control, handle, doing, (front,))

    def _all(self, members: Ranks) -> None:
        if len(members) != self.size:
            raise UsageError(f"groups of some ranks are not made on Ascend; got {list(members)}")

    def start_uneven_gather(self, send: mindspore.Tensor, counts: Sequence[int], recv: mindspore.Tensor) -> Handle:
        """See `Transport`."""
        check_counts("all_gather", counts, self.size, "recv", recv.shape[0])
        check_counts("all_gather", [counts[self.rank]], 1, "send", send.shape[0])
        self._control.check("all_gather")
        total, mine = sum(counts), counts[self.rank]
        if total == 0:
            return Done()
        doing = f"all_gather of {total} bytes"
        source, target = _front(send, mine), _front(recv, total)
        even = min(counts) == max(counts)
        if self._padded and not even:
            return self._start_padded(source, counts, target, doing)
        with self._control.explaining(doing):
            if even:
                handle = distributed.all_gather_into_tensor(target, source, self._group, async_op=True)
            else:
                handle = distributed.all_gather_into_tensor_uneven(target, source, list(counts), self._group, True)
        return _Pending(self._control, handle, doing, (source, target))

    def start_all_to_all(
        self, send: mindspore.Tensor, send_counts: Sequence[int], recv: mindspore.Tensor, recv_counts: Sequence[int]
    ) -> Handle:
        """See `Transport`."""
        check_counts("all_to_all", send_counts, self.size, "send", send.shape[0])
        check_counts("all_to_all", recv_counts, self.size, "recv", recv.shape[0])
        self._control.check("all_to_all")
        source, target = _front(send, sum(send_counts)), _front(recv, sum(recv_counts))
        doing = f"all_to_all, {sum(send_counts)} bytes sent and {sum(recv_counts)} expected"
        with self._control.explaining(doing):
            handle = distributed.all_to_all_single(
                target, source, list(recv_counts), list(send_counts), self._group, async_op=True
            )
        return _Pending(self._control, handle, doing, (source, target))

    def close(self) -> None:
        """Leave the control plane; the group stays."""
        self._control.close()

    def _gather(self, payload: bytes) -> list[bytes]:
        return gather(self, payload, lambda buffer: np.asarray(buffer.asnumpy()))

    def _start_padded(
        self, source: mindspore.Tensor, counts: Sequence[int], target: mindspore.Tensor, doing: str
    ) -> Handle:
        longest = max(counts)
        padded, gathered = self.allocate(longest), self.allocate(longest * self.size)
        if source.shape[0]:
            _front(padded, source.shape[0]).copy_(source)
        with self._control.explaining(doing):
            handle = distributed.all_gather_into_tensor(gathered, padded, self._group, async_op=True)

        def cut() -> None:
            for rank, (start, count) in enumerate(zip(offsets(counts), counts)):
                if count:
                    _front(target, count, start).copy_(_front(gathered, count, rank * longest))

        return _Pending(self._control, handle, doing, (padded, gathered), cut)

    def _announce(self, payload: bytes) -> list[bytes]:
        """All-gather over HCCL itself, before there is a control plane."""
        cells, mine = self.allocate(CELL_BYTES * self.size), mindspore.Tensor(pack_cell(payload))
        with self._control.explaining(FIRST_MEETING):
            handle = distributed.all_gather_into_tensor(cells, mine, self._group, async_op=True)
        _Pending(self._control, handle, FIRST_MEETING, (cells, mine)).wait()
        return [unpack_cell(cell) for cell in np.split(cells.asnumpy(), self.size)]


class _Pending:
    """A collective in flight; keeps its tensors alive until it has ended."""

    def __init__(
        self,
        control: ControlPlane,
        handle: distributed.CommHandle,
        doing: str,
        tensors: tuple[mindspore.Tensor, ...],
        after: Optional[Callable[[], None]] = None,
    ) -> None:
        self._control = control
        self._handle: Optional[distributed.CommHandle] = handle
        self._doing = doing
        self._tensors = tensors
        self._after = after

    def wait(self) -> None:
        """Block the host until the bytes are there; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with self._control.explaining(self._doing):
            handle.wait()  # orders the device's streams, does not block
            if self._after is not None:
                self._after()
            stream, event = mindspore.runtime.current_stream(), mindspore.runtime.Event()
            event.record(stream)
        tensors, self._tensors = self._tensors, ()

        def blocking(_in_flight: tuple[mindspore.Tensor, ...] = tensors) -> None:
            stream.synchronize()
            event.synchronize()

        self._control.guard(blocking, self._doing)


def _front(buffer: mindspore.Tensor, length: int, start: int = 0) -> mindspore.Tensor:
    return mint.narrow(buffer, 0, start, length)


def _soc_version() -> str:
    from mindspore._c_expression import MSContext

    version: str = MSContext.get_instance().get_ascend_soc_version()
    return version

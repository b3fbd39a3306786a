"""Ranks of a MindSpore job on Ascend: collectives between device memories.

Buffers are int8 device tensors, the type that HCCL lists for every call on every product (uint8 is not listed between
servers). A `mint.narrow` of axis 0 is contiguous and costs nothing, so every stretch is a view.

    all_gather   AllGather of equal shares. AllGatherV, which several products lack, is called nowhere.
    broadcast    Broadcast.
    all_to_all   AlltoAllV; where the product lacks it, see `lacks_all_to_all`, sends and receives between pairs.

A handle's `wait()` blocks the host until the bytes have arrived, and raises if they never do. This takes two calls in
MindSpore 2.10.0: `Stream.synchronize()` waits without holding the interpreter lock, but only logs a failed collective
and returns (so do `mindspore.runtime.synchronize()` and `Event.query()`); `Event.synchronize()` raises, but holds the
lock, which would stop the threads that read files meanwhile. So the stream is waited for first, then the event, which
has happened by then. The stream is a separate one, so that what was launched for the next round is not waited for.

Only communicators that the job has are used and none is created: each costs two HCCL buffers of device memory. Besides
that of all ranks, or of the given group, these belong to the groups that MindSpore made for the network it compiled.
Known bytes are exchanged before the first exchange of a process, see `known_answer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Callable, Optional

import mindspore
import numpy as np
from mindspore import mint
from mindspore.mint import distributed

from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.transport.ascend import (
    call_limit,
    free_bytes,
    lacks_all_to_all,
    on_one_server,
    own_groups,
    soc_version,
)
from ms_ckpt_ext.transport.base import (
    Bytes,
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
from ms_ckpt_ext.transport.known_answer import prove, prove_group
from ms_ckpt_ext.transport.rendezvous.cells import CELL_BYTES

_proven: set[Optional[str]] = set()
"""Groups whose communicator gave the known answer in this process."""


class Hccl:
    """The ranks of `group`, by default all ranks of the job. Communication must have been initialized.

    Args:
        timeout: seconds that one call may last while all ranks are alive.
        group: name of an existing group of which this rank is a member.

    When a rank dies, all others raise PeerError with its number within a second, also while they wait for a
    collective; see `control` for what lingers. A collective that fails by itself raises TransportError.
    """

    def __init__(self, timeout: float, group: Optional[str] = None) -> None:
        self._group = group
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        product = soc_version()
        way = "pairs" if lacks_all_to_all(product, self.size, on_one_server(self.size, group)) else "collective"
        call_bytes = call_limit()
        self._names = own_groups(self.rank, self.size) if group is None else {}
        known = tuple(sorted(self._names))
        self.traits = TransportTraits(True, True, False, known, way, call_bytes, product)
        self._telling = False  # sharing over the backend is no round, and is not to be proven
        self._control = ControlPlane(self.rank, self.size, timeout, self._gather)
        self._control.enter(self._announce)

    def allocate(self, nbytes: int) -> mindspore.Tensor:
        """A device tensor of `nbytes` bytes."""
        return mint.empty((nbytes,), dtype=mindspore.int8)

    def pinned(self, nbytes: int) -> Bytes:
        """Memory that the device reads directly, at the speed of the bus."""
        return pinned(nbytes)

    def upload(self, host: Bytes, buffer: mindspore.Tensor, offset: int) -> None:
        """Copy `host` into `buffer`."""
        source = flat_bytes(host)
        if offset + source.nbytes > buffer.shape[0]:
            raise UsageError(f"{source.nbytes} bytes at offset {offset} do not fit into a buffer of {buffer.shape[0]}")
        if source.nbytes:
            tensor = mindspore.Tensor.from_numpy(source.view(np.int8))
            _front(buffer, source.nbytes, offset).copy_(tensor, non_blocking=True)
            mindspore.runtime.current_stream().synchronize()

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        return self._control.share(payload)

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """See `Transport`."""
        return self._control.start_share(payload)

    def free_bytes(self) -> int:
        """See `Transport`."""
        return free_bytes()

    def start_all_gather(
        self, send: mindspore.Tensor, nbytes: int, recv: mindspore.Tensor, group: Ranks = ()
    ) -> Handle:
        """See `Transport`; by all ranks, or by a group of the job's own."""
        members = check_members("all_gather", group, self.size, self.rank)
        check_room("all_gather", nbytes, "send", send.shape[0])
        check_room("all_gather", nbytes * len(members), "recv", recv.shape[0])
        name = self._name(members)
        self.prove()
        self._control.check("all_gather")
        doing = f"all_gather of {nbytes} bytes each by {len(members)} ranks"
        source, target = _front(send, nbytes), _front(recv, nbytes * len(members))
        with self._control.explaining(doing):
            handle = distributed.all_gather_into_tensor(target, source, name, async_op=True)
        return _Pending(self._control, (handle,), doing, (source, target))

    def start_broadcast(self, buffer: mindspore.Tensor, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """See `Transport`; by all ranks, or by a group of the job's own."""
        name = self._name(check_members("broadcast", group, self.size, self.rank, root))
        check_room("broadcast", nbytes, "buffer", buffer.shape[0])
        self.prove()
        self._control.check("broadcast")
        doing = f"broadcast of {nbytes} bytes from rank {root}"
        front = _front(buffer, nbytes)
        with self._control.explaining(doing):
            handle = distributed.broadcast(front, self._global(root), name, async_op=True)
        return _Pending(self._control, (handle,), doing, (front,))

    @property
    def _backend(self) -> str:
        return f"HCCL on {self.traits.product or 'this device'}"

    def _name(self, members: Ranks) -> Optional[str]:
        """MindSpore's name of a group. Raises UsageError for one that the job does not have: none is made."""
        if len(members) == self.size:
            return self._group
        if members not in self._names:
            raise UsageError(f"groups of some ranks are not made on Ascend, and the job has none of {list(members)}")
        name = self._names[members]
        if name not in _proven:
            _proven.add(name)
            prove_group(self, members, _to_host, self._backend)
        return name

    def start_all_to_all(
        self, send: mindspore.Tensor, send_counts: Sequence[int], recv: mindspore.Tensor, recv_counts: Sequence[int]
    ) -> Handle:
        """See `Transport`."""
        check_counts("all_to_all", send_counts, self.size, "send", send.shape[0])
        check_counts("all_to_all", recv_counts, self.size, "recv", recv.shape[0])
        self.prove()
        self._control.check("all_to_all")
        return self._to_all(send, send_counts, recv, recv_counts)

    def _to_all(
        self, send: mindspore.Tensor, send_counts: Sequence[int], recv: mindspore.Tensor, recv_counts: Sequence[int]
    ) -> Handle:
        source, target = _front(send, sum(send_counts)), _front(recv, sum(recv_counts))
        doing = f"all_to_all, {sum(send_counts)} bytes sent and {sum(recv_counts)} expected"
        with self._control.explaining(doing):
            if self.traits.all_to_all == "pairs":
                handles = self._pairs(source, send_counts, target, recv_counts)
            else:
                sizes = list(recv_counts), list(send_counts)
                handles = [distributed.all_to_all_single(target, source, *sizes, self._group, async_op=True)]
        return _Pending(self._control, tuple(handles), doing, (source, target))

    def _pairs(
        self, send: mindspore.Tensor, send_counts: Sequence[int], recv: mindspore.Tensor, recv_counts: Sequence[int]
    ) -> list[distributed.CommHandle]:
        """In turn k rank r pairs with rank k - r. The lower sends first, so a send may wait for its receiver."""
        places, landings = offsets(send_counts), offsets(recv_counts)
        handles = []
        for turn in range(self.size):
            peer = (turn - self.rank) % self.size
            gives, gets = send_counts[peer], recv_counts[peer]
            if peer == self.rank:
                if gets:
                    _front(recv, gets, landings[peer]).copy_(_front(send, gives, places[peer]))
                continue
            for sends in (self.rank < peer, self.rank > peer):
                count, buffer, start = (gives, send, places[peer]) if sends else (gets, recv, landings[peer])
                call = distributed.isend if sends else distributed.irecv
                if count:
                    handles.append(call(_front(buffer, count, start), self._global(peer), self._group))
        return handles

    def _global(self, rank: int) -> int:
        """The number in the job of a rank of the group."""
        if self._group is None:
            return rank
        return int(mindspore.communication.get_world_rank_from_group_rank(self._group, rank))

    def prove(self) -> None:
        """See `Transport`."""
        if not self._telling and self._group not in _proven:
            with self._among_ranks():
                prove(self, _to_host, self._backend)
            _proven.add(self._group)

    @contextmanager
    def _among_ranks(self) -> Iterator[None]:
        """Exchanges made inside are no rounds, and need no proof."""
        before, self._telling = self._telling, True
        try:
            yield
        finally:
            self._telling = before

    def close(self) -> None:
        """Leave the control plane; the group stays."""
        self._control.close()

    def _gather(self, payload: bytes) -> list[bytes]:
        with self._among_ranks():
            return gather(self, payload, _to_host)

    def _announce(self, payload: bytes) -> list[bytes]:
        """All-gather over HCCL itself, before there is a control plane."""
        cells, mine, host = self.allocate(CELL_BYTES * self.size), self.allocate(CELL_BYTES), pinned(CELL_BYTES)
        host[:] = pack_cell(payload)
        self.upload(host, mine, 0)
        with self._control.explaining(FIRST_MEETING):
            handle = distributed.all_gather_into_tensor(cells, mine, self._group, async_op=True)
        _Pending(self._control, (handle,), FIRST_MEETING, (cells, mine)).wait()
        return [unpack_cell(cell) for cell in np.split(_to_host(cells), self.size)]


class _Pending:
    """Calls in flight; keeps their tensors alive until they have ended."""

    def __init__(
        self,
        control: ControlPlane,
        handles: tuple[distributed.CommHandle, ...],
        doing: str,
        tensors: tuple[mindspore.Tensor, ...],
    ) -> None:
        self._control, self._doing, self._tensors = control, doing, tensors
        self._handles: Optional[tuple[distributed.CommHandle, ...]] = handles

    def wait(self) -> None:
        """Block the host until the bytes are there; a second call does nothing."""
        handles, self._handles = self._handles, None
        if handles is None:
            return
        stream, event = _watch(), mindspore.runtime.Event()
        with self._control.explaining(self._doing):
            for handle in handles:
                handle.wait()  # orders the device's streams, does not block
            with mindspore.runtime.StreamCtx(stream):
                for handle in handles:
                    handle.wait()
                event.record(stream)
        tensors, self._tensors = self._tensors, ()

        def blocking(_in_flight: tuple[mindspore.Tensor, ...] = tensors) -> None:
            stream.synchronize()
            event.synchronize()

        self._control.guard(blocking, self._doing)


@cache
def _watch() -> mindspore.runtime.Stream:
    """The stream on which the ends of collectives are awaited."""
    return mindspore.runtime.Stream()


def _front(buffer: mindspore.Tensor, length: int, start: int = 0) -> mindspore.Tensor:
    return mint.narrow(buffer, 0, start, length)


def pinned(nbytes: int) -> Bytes:
    """Pinned host memory. It lives as long as the array, or a tensor made from it."""
    memory: Bytes = mint.empty(nbytes, dtype=mindspore.int8, device="CPU", pin_memory=True).asnumpy().view(np.uint8)
    return memory


def _to_host(buffer: mindspore.Tensor) -> Bytes:
    return np.asarray(buffer.asnumpy()).view(np.uint8)

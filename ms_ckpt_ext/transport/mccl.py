"""Ranks of a MindSpore job on the CPU. It serves to test the code path; it is not built for speed.

MCCL has no all-to-all, nothing uneven, and no byte counts: ranks that disagree corrupt each other's memory or hang
(different sizes in one collective gave "Memcpy error"). So every exchange first compares calls and counts over the
control plane, which costs 0.2 ms, and a rank that is slow to come is waited for there, where nothing times out early:
inside a collective MCCL gives up after 30 s.

    all_gather   one broadcast per rank, straight into its place, without copies. MCCL's own all_gather is 30 % faster
                 (4 ranks, 16 MiB each: 0.67 s against 0.94 s), which does not matter here.
    all_to_all   one scatter per rank, padded to the longest stretch it sends, in bounded steps. Measured on 4 ranks,
                 16 MiB each: 270 ms; with a broadcast per rank 780 ms, with one all_gather 630 ms.

Exchanges are complete when `start_*` returns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Callable

import mindspore
import numpy as np
from mindspore.mint import distributed

from ms_ckpt_ext.errors import TransportError, UsageError
from ms_ckpt_ext.transport.agree import decode_all
from ms_ckpt_ext.transport.base import (
    HOST_TRAITS,
    Bytes,
    Done,
    Handle,
    Ranks,
    check_counts,
    check_members,
    check_room,
    flat_bytes,
    offsets,
)
from ms_ckpt_ext.transport.control import FIRST_MEETING, ControlPlane, pack_cell, unpack_cell
from ms_ckpt_ext.transport.gather import gather
from ms_ckpt_ext.transport.known_answer import prove
from ms_ckpt_ext.transport.rendezvous.cells import CELL_BYTES

_STEP_BYTES = 16 << 20
"""Longest stretch per peer in one scatter; a step needs (size + 1) times that of memory for padding."""


class Mccl:
    """All ranks of the job; `mindspore.communication.init()` must have been called.

    Args:
        timeout: seconds that one call may last while all ranks are alive.

    When a rank dies, all others raise PeerError with its number within a second, also from inside a collective; see
    `control` for what lingers.
    """

    traits = HOST_TRAITS
    _proven = False

    def __init__(self, timeout: float) -> None:
        self.rank: int = distributed.get_rank()
        self.size: int = distributed.get_world_size()
        self._control = ControlPlane(self.rank, self.size, timeout, self._gather)
        self._control.enter(self._announce)

    def allocate(self, nbytes: int) -> Bytes:
        """An array of `nbytes` bytes."""
        return np.empty(nbytes, np.uint8)

    def pinned(self, nbytes: int) -> Bytes:
        """As `allocate`: there is no device."""
        return self.allocate(nbytes)

    def upload(self, host: Bytes, buffer: Bytes, offset: int) -> None:
        """Copy `host` into `buffer`, unless it lies there already."""
        source, target = flat_bytes(host), buffer[offset : offset + host.nbytes]
        if source.ctypes.data != target.ctypes.data:
            np.copyto(target, source)

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        return self._control.share(payload)

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """See `Transport`."""
        return self._control.start_share(payload)

    def free_bytes(self) -> int:
        """Not known."""
        return 0

    def prove(self) -> None:
        """See `Transport`."""
        if not Mccl._proven:
            prove(self, lambda buffer: buffer, "MCCL")
            Mccl._proven = True

    def start_all_gather(self, send: Bytes, nbytes: int, recv: Bytes, group: Ranks = ()) -> Handle:
        """See `Transport`; all ranks only."""
        self._all("all_gather", group, self.rank)
        check_room("all_gather", nbytes, "send", send.nbytes)
        check_room("all_gather", nbytes * self.size, "recv", recv.nbytes)
        self._compare("all_gather", [nbytes] * self.size, [nbytes] * self.size)
        if nbytes == 0:
            return Done()
        parts = [recv[root * nbytes : (root + 1) * nbytes] for root in range(self.size)]
        parts[self.rank][:] = send[:nbytes]
        tensors = [mindspore.Tensor.from_numpy(part) for part in parts]

        def launch() -> None:
            for root, tensor in enumerate(tensors):
                distributed.broadcast(tensor, root)

        self._run(launch, tensors, f"all_gather of {nbytes} bytes each")
        return Done()

    def start_broadcast(self, buffer: Bytes, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """See `Transport`; all ranks only."""
        self._all("broadcast", group, self.rank, root)
        check_room("broadcast", nbytes, "buffer", buffer.nbytes)
        self._compare("broadcast", [nbytes] * self.size, [nbytes] * self.size)
        if nbytes == 0:
            return Done()
        tensor = mindspore.Tensor.from_numpy(buffer[:nbytes])
        self._run(
            lambda: distributed.broadcast(tensor, root), [tensor], f"broadcast of {nbytes} bytes from rank {root}"
        )
        return Done()

    def _all(self, call: str, group: Ranks, *members: int) -> None:
        if len(check_members(call, group, self.size, *members)) != self.size:
            raise UsageError(f"{call}: MCCL has no groups of some ranks; got {list(group)}")

    def start_all_to_all(
        self, send: Bytes, send_counts: Sequence[int], recv: Bytes, recv_counts: Sequence[int]
    ) -> Handle:
        """See `Transport`."""
        check_counts("all_to_all", send_counts, self.size, "send", send.nbytes)
        check_counts("all_to_all", recv_counts, self.size, "recv", recv.nbytes)
        sent = self._compare("all_to_all", send_counts, recv_counts)
        starts = offsets(send_counts)
        outgoing = [send[start : start + count] for start, count in zip(starts, send_counts)]
        incoming = [recv[start : start + count] for start, count in zip(offsets(recv_counts), recv_counts)]
        for root, row in enumerate(sent):
            for at in range(0, max(row), _STEP_BYTES):
                self._scatter(root, outgoing, incoming[root], at, min(_STEP_BYTES, max(row) - at))
        return Done()

    def close(self) -> None:
        """Leave the control plane."""
        self._control.close()

    def _gather(self, payload: bytes) -> list[bytes]:
        return gather(self, payload, lambda buffer: buffer)

    def _scatter(self, root: int, outgoing: list[Bytes], target: Bytes, at: int, width: int) -> None:
        """Bytes [at, at + width) of what `root` sends to each rank, where there are that many."""
        received = np.empty(width, np.uint8)
        tensor = mindspore.Tensor.from_numpy(received)
        pieces = [tensor] * self.size  # on ranks other than `root` these only give the shape
        if root == self.rank:
            pieces = [mindspore.Tensor.from_numpy(_padded(piece[at : at + width], width)) for piece in outgoing]
        doing = f"all_to_all, {width} bytes from rank {root} to each"
        self._run(lambda: distributed.scatter(tensor, pieces, root), [tensor, *pieces], doing)
        wanted = target[at : at + width]
        wanted[:] = tensor.asnumpy()[: wanted.nbytes]

    def _compare(self, call: str, send: Sequence[int], recv: Sequence[int]) -> list[tuple[int, ...]]:
        """All ranks' send counts, once all have come; all ranks raise the same error if they do not match."""
        pattern = struct.Struct(f"<16s{2 * self.size}Q")
        answers = self._control.share(pattern.pack(call.encode(), *send, *recv), call)
        told = decode_all(answers, pattern.unpack)
        calls = [answer[0].rstrip(b"\0").decode(errors="replace") for answer in told]
        if len(set(calls)) > 1:
            raise TransportError(f"ranks 0, 1, … called {calls}; all ranks must make the same calls in the same order")
        sent, wanted = [answer[1 : self.size + 1] for answer in told], [answer[self.size + 1 :] for answer in told]
        for source, target in product(range(self.size), repeat=2):
            if sent[source][target] != wanted[target][source]:
                raise TransportError(
                    f"{call}: rank {target} expects {wanted[target][source]} bytes of rank {source}, "
                    f"which sends {sent[source][target]}"
                )
        return sent

    def _run(self, launch: Callable[[], None], tensors: Iterable[mindspore.Tensor], doing: str) -> None:
        """Launch operators on `tensors` and wait for them: launching only queues; errors appear when the queue drains.

        `asnumpy()` waits for its tensor. `mindspore.runtime.synchronize()` alone is not enough: on the CPU its first
        call in a process returns at once, with "CPU device is not supported" in the log (seen in MindSpore 2.10.0).
        """

        def blocking() -> None:
            launch()
            for tensor in tensors:
                tensor.asnumpy()
            mindspore.runtime.synchronize()

        self._control.guard(blocking, doing)

    def _announce(self, payload: bytes) -> list[bytes]:
        """All-gather over MCCL itself, before there is a control plane."""
        cells = [mindspore.Tensor.from_numpy(np.zeros(CELL_BYTES, np.uint8)) for _ in range(self.size)]
        mine = mindspore.Tensor.from_numpy(pack_cell(payload))
        self._run(lambda: distributed.all_gather(cells, mine), cells, FIRST_MEETING)
        return [unpack_cell(cell.asnumpy()) for cell in cells]


def _padded(piece: Bytes, width: int) -> Bytes:
    """`piece` itself when it is `width` bytes long, else a copy with zeros behind it."""
    if piece.nbytes == width:
        return piece
    longer = np.zeros(width, np.uint8)
    longer[: piece.nbytes] = piece
    return longer

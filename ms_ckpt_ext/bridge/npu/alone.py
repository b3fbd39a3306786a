"""One NPU and nobody to exchange with: buffers on the device, so that what moves there does not go through the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
from mindspore import mint

from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.transport.base import Bytes, Done, Handle, Ranks, TransportTraits, flat_bytes
from ms_ckpt_ext.transport.hccl import pinned


class OneDevice:
    """A `Transport` of one rank, which receives what it sends."""

    rank, size = 0, 1
    traits = TransportTraits(on_device=True)

    def allocate(self, nbytes: int) -> Any:
        """A device tensor of `nbytes` bytes."""
        return mint.empty((nbytes,), dtype=ms.int8)

    def pinned(self, nbytes: int) -> Bytes:
        """Memory that the device reads by itself."""
        return pinned(nbytes)

    def upload(self, host: Bytes, buffer: Any, offset: int) -> None:
        """Copy `host` into `buffer`."""
        source = ms.Tensor.from_numpy(flat_bytes(host).view(np.int8))
        mint.narrow(buffer, 0, offset, host.nbytes).copy_(source)

    def share(self, payload: bytes) -> list[bytes]:
        """The payload."""
        return [payload]

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """The payload, later."""
        return lambda: [payload]

    def free_bytes(self) -> int:
        """Not known."""
        return 0

    def prove(self) -> None:
        """Nothing is exchanged."""

    def start_all_gather(self, send: Any, nbytes: int, recv: Any, group: Ranks = ()) -> Handle:
        """See `Transport`."""
        return self._copied(send, nbytes, recv)

    def start_broadcast(self, buffer: Any, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """The buffer has it already."""
        return Done()

    def start_all_to_all(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Handle:
        """See `Transport`."""
        return self._copied(send, sum(send_counts), recv)

    def _copied(self, send: Any, nbytes: int, recv: Any) -> Handle:
        if nbytes:
            mint.narrow(recv, 0, 0, nbytes).copy_(mint.narrow(send, 0, 0, nbytes))
        return Done()

    def close(self) -> None:
        """There is no other rank to leave."""

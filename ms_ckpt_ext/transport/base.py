"""The seam between a plan and the wires.

Ranks hold flat staging buffers of bytes and exchange stretches of them: numpy arrays where the ranks meet on the host,
device tensors on Ascend. Two bulk exchanges are enough for every plan (everybody wants everything; everybody wants
something of their own), and one small one, `share`, carries what ranks tell each other about themselves.

Order: all ranks of a transport make the same calls, `wait()` included, in the same order. Between `start_*` and its
handle's `wait()` the send buffer must not be written and the receive buffer not be touched; `wait()` returns when the
bytes are there.
Failure: every call may raise `TransportError`, or its kind `PeerError` when it is known which other rank is the cause.
After either the transport is only good for `close()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.errors import UsageError

Bytes = npt.NDArray[np.uint8]
"""Flat, contiguous bytes in host memory."""

B = TypeVar("B")
"""A staging buffer: `Bytes`, or a uint8 device tensor."""


class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Block until this rank's part is done: `recv` is filled and `send` may be written again."""


class TransportTraits(NamedTuple):
    """What a transport is, beyond what it does.

    Attributes:
        on_device: its buffers are device tensors; else they are `Bytes`.
    """

    on_device: bool = False


HOST_TRAITS = TransportTraits()


class Transport(Protocol[B]):
    """One rank's end. See the module for order and failure."""

    rank: int
    size: int
    traits: TransportTraits

    def allocate(self, nbytes: int) -> B:
        """A staging buffer of `nbytes` bytes, contents undefined."""

    def upload(self, host: Bytes, buffer: B, offset: int) -> None:
        """Copy `host` into `buffer` from byte `offset` on. `host` may be written again when this returns."""

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order; sizes may differ. For small things: bytes to a few hundred kB."""

    def start_all_gather(self, send: B, counts: Sequence[int], recv: B) -> Handle:
        """Rank r contributes the first `counts[r]` bytes of its `send`; `recv` starts with all of them in rank order.

        `counts` is the same on all ranks and may hold zeros.
        """

    def start_all_to_all(self, send: B, send_counts: Sequence[int], recv: B, recv_counts: Sequence[int]) -> Handle:
        """`send` starts with `send_counts[r]` bytes for each rank r in order; `recv` gets `recv_counts[r]` from each.

        What rank a sends to b must be what b expects of a; zeros allowed.
        """

    def close(self) -> None:
        """Release what this end holds. The other ranks' ends stay usable only for `close()`. May be called twice."""


class Done:
    """The handle of an exchange that was over before `start_*` returned."""

    def wait(self) -> None:
        """Nothing to wait for."""


def check_counts(what: str, counts: Sequence[int], size: int, buffer: str, capacity: int) -> None:
    """Raise UsageError unless `counts` is one number per rank that together fit into a buffer of `capacity` bytes."""
    if len(counts) != size or min(counts) < 0:
        raise UsageError(
            f"{what}: one byte count per rank is needed, none negative; got {list(counts)} for {size} ranks"
        )
    if sum(counts) > capacity:
        raise UsageError(
            f"{what}: counts {list(counts)} add up to {sum(counts)} bytes, but `{buffer}` holds {capacity}; "
            "allocate a larger staging buffer or use smaller rounds"
        )


def flat_bytes(array: npt.NDArray[np.generic]) -> Bytes:
    """The bytes of a contiguous array, without copying."""
    if not array.flags.c_contiguous:
        raise UsageError(f"a contiguous array is needed, got shape {array.shape} with strides {array.strides}")
    return array.reshape(-1).view(np.uint8)


def offsets(counts: Sequence[int]) -> list[int]:
    """Where each of consecutive stretches starts.

    >>> offsets([3, 0, 5])
    [0, 3, 3]
    """
    return [0, *accumulate(counts)][:-1]

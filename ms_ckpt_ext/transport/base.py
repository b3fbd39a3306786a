"""The interface between a plan and the backends.

Ranks hold flat staging buffers of bytes and exchange stretches of them: numpy arrays where the ranks meet on the host,
device tensors on Ascend. Three bulk exchanges, which every product has in some form, are enough for every plan: an
all-to-all with a byte count per pair, an all-gather of equal shares, and a broadcast. A small one, `share`, carries
what ranks say about themselves.

Order: all ranks of a transport make the same calls, `wait()` included, in the same order. Calls for a group are made
by its members alone; two groups that share a rank are called in one order by all ranks that are in both. Between
`start_*` and its handle's `wait()` the send buffer must not be written and the receive buffer not be touched; `wait()`
returns when the bytes have arrived.
Failure: every call may raise `TransportError`, or its subclass `PeerError` when it is known which other rank is the
cause. After either, only `close()` may be called.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Callable, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.errors import UsageError

Bytes = npt.NDArray[np.uint8]
"""Flat, contiguous bytes in host memory."""

Ranks = tuple[int, ...]
"""Ranks of a transport, ascending."""

B = TypeVar("B")
"""A staging buffer: `Bytes`, or a uint8 device tensor."""


class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Block until this rank's part is done: `recv` is filled and `send` may be written again."""


class TransportTraits(NamedTuple):
    """Properties of a transport.

    Attributes:
        on_device: its buffers are device tensors; else they are `Bytes`.
        overlaps: `start_*` returns before the bytes have arrived, so that a second round may be prepared meanwhile.
        groups: all-gathers and broadcasts work in any group of ranks; else among all ranks, and in `known_groups`.
        known_groups: groups of some ranks that exist already, of which this rank is a member.
        all_to_all: how `start_all_to_all` works: "collective", or "pairs" where the product lacks the collective and
            stretches are sent from rank to rank, one call a pair; "" where it does not work.
        call_bytes: a call that moves more than this many bytes a rank is slower (HCCL_BUFFSIZE); 0 where none is known.
        product: soc version of an NPU, in lower case; "" without one.
    """

    on_device: bool = False
    overlaps: bool = False
    groups: bool = False
    known_groups: tuple[Ranks, ...] = ()
    all_to_all: str = "collective"
    call_bytes: int = 0
    product: str = ""


HOST_TRAITS = TransportTraits()


class Transport(Protocol[B]):
    """One rank's end. See the module's docstring for order and failure."""

    rank: int
    size: int
    traits: TransportTraits

    def allocate(self, nbytes: int) -> B:
        """A staging buffer of `nbytes` bytes, contents undefined."""

    def pinned(self, nbytes: int) -> Bytes:
        """Host memory from which `upload` is fastest, contents undefined."""

    def upload(self, host: Bytes, buffer: B, offset: int) -> None:
        """Copy `host` into `buffer` from byte `offset` on. `host` may be written again when this returns."""

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order; sizes may differ. What is equal on all ranks costs next to nothing.

        Each distinct payload is sent once, to every rank, so their sum should be small: bytes to some MB.
        """

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """`share` in two steps: this rank sends its payload and may go on; the function returned waits for all.

        Bulk exchanges may be started and waited for in between, and nothing else may be shared.
        """

    def free_bytes(self) -> int:
        """Bytes available for staging buffers of this rank; 0 where that is not known. May differ by rank."""

    def prove(self) -> None:
        """Before the first round of a process: make sure that exchanges deliver what was sent. Collective.

        Raises TransportError on every rank, naming the call, and what was expected and found.
        """

    def start_all_gather(self, send: B, nbytes: int, recv: B, group: Ranks = ()) -> Handle:
        """Every rank contributes the first `nbytes` bytes of its `send`; `recv` starts with all of them in rank order.

        `nbytes` is the same on all ranks. `group`: ranks that take part, ascending; all when it is empty.
        """

    def start_broadcast(self, buffer: B, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """Copy the first `nbytes` bytes of the `buffer` of rank `root` to the start of every other rank's.

        `group`: ranks that take part, ascending, `root` among them; all when it is empty.
        """

    def start_all_to_all(self, send: B, send_counts: Sequence[int], recv: B, recv_counts: Sequence[int]) -> Handle:
        """`send` starts with `send_counts[r]` bytes for each rank r in order; `recv` gets `recv_counts[r]` from each.

        What rank a sends to b must be what b expects from a; zeros allowed.
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


def check_members(what: str, group: Ranks, size: int, *members: int) -> Ranks:
    """The ranks of a group, all when it is empty. Raises UsageError unless they ascend and `members` are among them."""
    ranks = group or tuple(range(size))
    if list(ranks) != sorted(set(ranks)) or not set(members) <= set(ranks) <= set(range(size)):
        raise UsageError(
            f"{what}: a group is ranks below {size} in ascending order, rank {' and '.join(map(str, members))} among "
            f"them; got {list(ranks)}"
        )
    return ranks


def check_room(what: str, nbytes: int, buffer: str, capacity: int) -> None:
    """Raise UsageError unless `nbytes` is not negative and fits into a buffer of `capacity` bytes."""
    if not 0 <= nbytes <= capacity:
        raise UsageError(
            f"{what}: {nbytes} bytes do not fit into `{buffer}`, which holds {capacity}; allocate a larger staging "
            "buffer or use smaller rounds"
        )


def flat_bytes(array: npt.NDArray[np.generic]) -> Bytes:
    """The bytes of a contiguous array, without copying. Raises UsageError for any other."""
    if not array.flags.c_contiguous:
        raise UsageError(f"a contiguous array is needed, got shape {array.shape} with strides {array.strides}")
    return array.reshape(-1).view(np.uint8)


def offsets(counts: Sequence[int]) -> list[int]:
    """Where each of consecutive stretches starts.

    >>> offsets([3, 0, 5])
    [0, 3, 3]
    """
    return [0, *accumulate(counts)][:-1]


SAME_VERSION = "do all ranks run the same version of this package?"
"""Advice about bytes that no rank of a job sends."""


def inflated(data: bytes, most: int) -> bytes:
    """Decompress what `zlib` compressed, at most `most` bytes. Raises ValueError for anything else, or more."""
    stream = zlib.decompressobj()
    try:
        found: bytes = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not stream.eof or len(found) > most:
        raise ValueError(f"more than {most} bytes, or not all of them")
    return found

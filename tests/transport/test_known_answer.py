"""A transport that returns success and other bytes than were sent is found before anything real moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.base import Bytes, Done, Handle, Ranks
from ms_ckpt_ext.transport.known_answer import prove
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld


class Faulty(LocalTransport):
    """One of its calls delivers nothing, zeros or bytes of another rank."""

    call, fault = "", ""

    def _spoil(self, call: str, handle: Handle, into: Bytes, nbytes: int) -> Handle:
        if call != self.call:
            return handle
        before = into.copy()
        handle.wait()
        if self.fault == "nothing":
            into[:] = before
        elif self.fault == "zeros":
            into[:nbytes] = 0
        else:
            into[:nbytes] = np.roll(into[:nbytes], 16)
        return Done()

    def start_all_gather(self, send: Bytes, nbytes: int, recv: Bytes, group: Ranks = ()) -> Handle:
        handle = super().start_all_gather(send, nbytes, recv, group)
        return self._spoil("all_gather", handle, recv, nbytes * self.size)

    def start_broadcast(self, buffer: Bytes, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        return self._spoil("broadcast", super().start_broadcast(buffer, nbytes, root, group), buffer, nbytes)

    def start_all_to_all(self, send: Bytes, send_counts: Sequence[int], recv: Bytes, recv_counts: Sequence[int]) -> Any:
        handle = super().start_all_to_all(send, send_counts, recv, recv_counts)
        return self._spoil("all_to_all", handle, recv, sum(recv_counts))


def test_what_is_right_is_let_through() -> None:
    for size in (1, 2, 5):
        LocalWorld(size).run(lambda t: prove(t, lambda buffer: buffer, "HCCL on a test"))


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        *product(("all_to_all", "all_gather", "broadcast"), ("nothing", "zeros")),
        ("all_to_all", "another rank's"),
        ("all_gather", "another rank's"),
    ],
)
def test_a_fault_is_told_on_all_ranks_with_the_call_and_the_bytes(call: str, fault: str) -> None:
    """One rank of three is served wrongly."""
    world = LocalWorld(3, timeout=10.0)
    told: list[str] = []

    def work(t: LocalTransport) -> None:
        mine = Faulty(world, 1) if t.rank == 1 else t
        if isinstance(mine, Faulty):
            mine.call, mine.fault = call, fault
        with pytest.raises(TransportError, match="HCCL on a test returned success and other bytes") as error:
            prove(mine, lambda buffer: buffer, "HCCL on a test")
        told.append(str(error.value))

    world.run(work)
    assert len(set(told)) == 1 and len(told) == 3
    assert f"(rank 1: {call}: expected " in told[0] and ", found " in told[0]
    assert "rank 0:" not in told[0] and "rank 2:" not in told[0]
    if fault == "zeros":
        assert "found 0000000000000000…" in told[0]
    expected, found = told[0].partition("expected ")[2].split("…")[0], told[0].partition("found ")[2].split("…")[0]
    assert expected != found

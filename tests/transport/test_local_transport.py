"""Ranks as threads: what moves, and what every rank hears when something goes wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.errors import PeerError, StorageError, TransportError, UsageError
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.counting import counted

SOON = 5.0  # seconds; worlds here time out after a minute, unless a test is about just that


def array(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


def run_failing(world: LocalWorld, fn: Callable[[LocalTransport], Any]) -> BaseException:
    """Run, expect a failure, and give the first one."""
    began = time.monotonic()
    with pytest.raises(Exception) as caught:
        world.run(fn)
    assert time.monotonic() - began < SOON, "somebody hung"
    return caught.value


def test_all_gather_concatenates_in_rank_order() -> None:
    def work(t: LocalTransport) -> list[int]:
        send, recv = array(*[10 * t.rank + i for i in range(4)]), np.full(8, 99, np.uint8)
        t.start_all_gather(send, 2, recv).wait()
        return recv.tolist()

    assert LocalWorld(3).run(work) == [[0, 1, 10, 11, 20, 21, 99, 99]] * 3


def test_all_to_all_is_a_transpose_of_uneven_pieces() -> None:
    sends = {0: (array(1, 2, 3), [1, 2]), 1: (array(7, 0, 0), [0, 1])}
    wants = {0: [1, 0], 1: [2, 1]}

    def work(t: LocalTransport) -> list[int]:
        recv = np.full(4, 99, np.uint8)
        t.start_all_to_all(*sends[t.rank], recv, wants[t.rank]).wait()
        return recv.tolist()

    assert LocalWorld(2).run(work) == [[1, 99, 99, 99], [2, 3, 7, 99]]


def test_groups_gather_side_by_side() -> None:
    """Two groups of three ranks, one of one, and all of them after that; calls of a group are its members' alone."""
    groups = {0: (0, 3, 5), 1: (1, 2, 4), 6: (6,)}

    def work(t: LocalTransport) -> tuple[list[int], list[int], dict[int, int]]:
        group = next(ranks for ranks in groups.values() if t.rank in ranks)
        own, all_, counts = t.allocate(2 * len(group)), t.allocate(t.size), counted(t)
        t.start_all_gather(array(t.rank, 10 + t.rank), 2, own, group).wait()
        given = dict(counts.given)
        t.start_all_gather(array(t.rank), 1, all_).wait()
        return own.tolist(), all_.tolist(), given

    for rank, (own, all_, gave) in enumerate(LocalWorld(7).run(work)):
        group = next(ranks for ranks in groups.values() if rank in ranks)
        assert own == [value for peer in group for value in (peer, 10 + peer)]
        assert all_ == list(range(7))
        assert gave == {peer: 2 for peer in group if peer != rank}


def test_a_broadcast_comes_from_its_root() -> None:
    def work(t: LocalTransport) -> tuple[list[int], int, int]:
        buffer, counts = array(t.rank, t.rank, t.rank), counted(t)
        if t.rank != 1:
            t.start_broadcast(buffer, 2, 3, (0, 2, 3)).wait()
        return buffer.tolist(), counts.sent, counts.messages

    ran = LocalWorld(4).run(work)
    assert ran == [([3, 3, 0], 0, 0), ([1, 1, 1], 0, 0), ([3, 3, 2], 0, 0), ([3, 3, 3], 4, 2)]


@pytest.mark.parametrize("group", [(1, 0), (0, 0), (0, 2), (1,), (0, 1, 5)])
def test_a_group_is_ranks_in_order_with_the_caller_and_the_root(group: tuple[int, ...]) -> None:
    error = run_failing(LocalWorld(3), lambda t: t.start_broadcast(array(1), 1, 1, group))
    assert isinstance(error, UsageError) and str(list(group)) in str(error)


def test_share_takes_any_sizes() -> None:
    assert LocalWorld(3).run(lambda t: t.share(b"ab" * t.rank)) == [[b"", b"ab", b"abab"]] * 3


def test_one_process_needs_no_threads() -> None:
    t = LocalTransport()
    recv = t.allocate(3)
    t.upload(array(1, 2, 3), recv, 0)
    assert (t.rank, t.size, t.share(b"x")) == (0, 1, [b"x"])
    t.start_all_gather(array(4, 5), 2, recv).wait()
    assert recv.tolist() == [4, 5, 3]
    t.start_all_to_all(array(6), [1], recv, [1]).wait()
    assert recv.tolist() == [6, 5, 3]
    t.close()


def test_exchanges_may_overlap() -> None:
    def work(t: LocalTransport) -> list[list[int]]:
        recvs = [t.allocate(2), t.allocate(2)]
        handles = [t.start_all_gather(array(t.rank + 10 * k), 1, recvs[k]) for k in (0, 1)]
        for handle in reversed(handles):
            handle.wait()
            handle.wait()  # the second time does nothing
        return [recv.tolist() for recv in recvs]

    assert LocalWorld(2).run(work) == [[[0, 1], [10, 11]]] * 2


def test_send_may_be_overwritten_after_wait() -> None:
    def work(t: LocalTransport) -> list[int]:
        send, recv = array(t.rank), t.allocate(4)
        if t.rank == 3:
            time.sleep(0.05)  # the others are done with their part long before
        t.start_all_gather(send, 1, recv).wait()
        send[:] = 99
        return recv.tolist()

    assert LocalWorld(4).run(work) == [[0, 1, 2, 3]] * 4


def test_uploading_in_place_copies_nothing_and_too_much_is_refused() -> None:
    t = LocalTransport()
    buffer = t.allocate(4)
    buffer[:] = 7
    buffer.flags.writeable = False  # any copy would raise
    t.upload(buffer[1:3], buffer, 1)
    with pytest.raises(UsageError, match="do not fit"):
        t.upload(array(1, 2), t.allocate(4), 3)


def test_counts_calls_and_bytes() -> None:
    def work(t: LocalTransport) -> tuple[dict[str, int], int]:
        counts = counted(t)
        t.share(b"control messages are not counted in bytes")
        t.start_all_gather(array(1, 2), 2, t.allocate(6)).wait()
        t.start_all_to_all(t.allocate(6), [1, 2, 3], t.allocate(9), [t.rank + 1] * 3).wait()
        return dict(counts.collectives), counts.sent

    counts = {"share": 1, "all_gather": 1, "all_to_all": 1}
    assert LocalWorld(3).run(work) == [(counts, 4 + 5), (counts, 4 + 4), (counts, 4 + 3)]


@pytest.mark.parametrize("counts", [[1], [1, -1], [1, 2, 3]])
def test_counts_are_one_per_rank_and_not_negative(counts: list[int]) -> None:
    def work(t: LocalTransport) -> None:
        t.start_all_to_all(t.allocate(8), counts, t.allocate(8), counts).wait()

    error = run_failing(LocalWorld(2), work)
    assert isinstance(error, UsageError) and "one byte count per rank" in str(error)


def test_buffers_that_are_too_small_are_refused() -> None:
    t = LocalTransport()
    for send, recv in ((1, 2), (2, 1)):
        with pytest.raises(UsageError, match="allocate a larger"):
            t.start_all_gather(t.allocate(send), 2, t.allocate(recv))
        with pytest.raises(UsageError, match="allocate a larger"):
            t.start_all_to_all(t.allocate(send), [2], t.allocate(recv), [2])


def test_one_failure_ends_the_world_for_all_at_once() -> None:
    world = LocalWorld(4)

    def work(t: LocalTransport) -> None:
        t.share(b"")
        if t.rank == 2:
            raise FileNotFoundError("shard 7 is missing")
        t.start_all_gather(array(1), 1, t.allocate(4)).wait()

    error = run_failing(world, work)
    assert isinstance(error, FileNotFoundError)
    assert sorted(world.errors) == [0, 1, 2, 3]
    for rank in (0, 1, 3):
        peer = world.errors[rank]
        assert isinstance(peer, PeerError) and peer.rank == 2 and "shard 7 is missing" in str(peer)
    with pytest.raises(PeerError):  # and it stays so
        world.transport(1).share(b"")


def test_different_calls_are_an_error_that_names_both() -> None:
    world = LocalWorld(2)

    def work(t: LocalTransport) -> None:
        if t.rank == 0:
            t.start_all_gather(array(1), 1, t.allocate(2)).wait()
        else:
            t.start_all_to_all(array(1, 1), [1, 1], t.allocate(2), [1, 1]).wait()

    error = run_failing(world, work)
    assert isinstance(error, TransportError)
    for text in ("rank 0 called", "rank 1 called", "all_gather", "all_to_all"):
        assert text in str(error)
    assert len(world.errors) == 2


def test_different_counts_are_an_error() -> None:
    error = run_failing(LocalWorld(2), lambda t: t.start_all_gather(array(1, 1), 1 + t.rank, t.allocate(4)).wait())
    assert isinstance(error, TransportError) and "of 1 bytes" in str(error) and "of 2 bytes" in str(error)

    def work(t: LocalTransport) -> None:
        t.start_all_to_all(array(1, 1), [1, 1], t.allocate(4), [1 + t.rank, 1]).wait()

    error = run_failing(LocalWorld(2), work)
    assert "rank 1 expects 2 bytes of rank 0, which sends 1" in str(error)


def test_a_rank_that_never_comes_is_named_after_the_timeout() -> None:
    world = LocalWorld(3, timeout=0.3)

    def work(t: LocalTransport) -> None:
        if t.rank == 1:
            time.sleep(1)
        t.share(b"")

    error = run_failing(world, work)
    assert isinstance(error, TransportError) and "rank 1 did not come" in str(error) and "0.3 s" in str(error)
    assert {0, 2} <= set(world.errors)
    with pytest.raises(PeerError):
        world.transport(1).share(b"")


def test_a_rank_that_ended_is_not_waited_for() -> None:
    error = run_failing(LocalWorld(3), lambda t: None if t.rank == 2 else t.share(b""))
    assert isinstance(error, TransportError) and "rank 2 ended before" in str(error)


def test_a_world_can_be_run_again() -> None:
    world = LocalWorld(2)
    for _ in range(2):
        assert world.run(lambda t: t.share(bytes([t.rank]))) == [[b"\0", b"\1"]] * 2


def test_importing_does_not_import_mindspore() -> None:
    code = (
        "import sys; import ms_ckpt_ext.transport.select as s, ms_ckpt_ext.transport.agree, ms_ckpt_ext.transport.hub"
    )
    code += (
        "; t = s.select_transport(); assert type(t).__name__ == 'LocalTransport'; assert 'mindspore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


matrices = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 40), min_size=n, max_size=n), min_size=n, max_size=n)
)


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(0, 2**32 - 1))
def test_both_exchanges_equal_numpy(matrix: list[list[int]], seed: int) -> None:
    n = len(matrix)
    rng = np.random.default_rng(seed)
    sends = [rng.integers(0, 256, sum(row), np.uint8) for row in matrix]
    least = min(map(sum, matrix))
    pieces = [np.split(send, np.cumsum(row)[:-1]) for send, row in zip(sends, matrix)]

    def work(t: LocalTransport) -> tuple[bytes, bytes]:
        wanted = [row[t.rank] for row in matrix]
        scattered, gathered = t.allocate(sum(wanted)), t.allocate(least * n)
        t.start_all_to_all(sends[t.rank], matrix[t.rank], scattered, wanted).wait()
        t.start_all_gather(sends[t.rank], least, gathered).wait()
        return scattered.tobytes(), gathered.tobytes()

    for rank, (scattered, gathered) in enumerate(LocalWorld(n).run(work)):
        assert scattered == b"".join(pieces[source][rank].tobytes() for source in range(n))
        assert gathered == b"".join(send[:least].tobytes() for send in sends)


def test_where_a_rank_gets_no_thread_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        if thread.name == "rank 2":
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(StorageError, match="cannot start a thread for rank 2: Cannot allocate memory"):
        LocalWorld(4).run(lambda transport: transport.share(b""))
    assert [thread.name for thread in begun] == ["rank 0", "rank 1"]
    for thread in begun:
        thread.join(5)
        assert not thread.is_alive()

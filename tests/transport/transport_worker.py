"""What every rank of a job does in test_job_transports.py: `transport_worker.py CASE`.

A rank that is content prints "CONTENT <rank>".
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any, Callable

import mindspore
import numpy as np

from ms_ckpt_ext.errors import DisagreementError, PeerError, TransportError
from ms_ckpt_ext.transport.agree import agree, share_status
from ms_ckpt_ext.transport.base import Transport
from ms_ckpt_ext.transport.select import select_transport

LARGE = 1_000_003


def start() -> None:
    """Join the job, on the device that the environment is made for."""
    if os.environ.get("ASCEND_OPP_PATH"):
        mindspore.set_device("Ascend")
        mindspore.mint.distributed.init_process_group()
    else:
        mindspore.set_device("CPU")
        mindspore.communication.init()


def data(source: int, target: int, count: int) -> np.ndarray:
    """What `source` sends to `target`: other bytes for every pair."""
    return ((np.arange(count) * 7 + source * 31 + target * 101) % 251).astype(np.uint8)


def fetch(buffer: Any) -> np.ndarray:
    """Contents of a staging buffer."""
    return buffer.asnumpy().view(np.uint8) if isinstance(buffer, mindspore.Tensor) else buffer


def filled(t: Transport[Any], contents: np.ndarray, spare: int = 3) -> Any:
    """A staging buffer that starts with `contents`; uploaded in two parts, from memory that is overwritten at once."""
    buffer = t.allocate(contents.nbytes + spare)
    for low, high in ((0, contents.nbytes // 3), (contents.nbytes // 3, contents.nbytes)):
        part = contents[low:high].copy()
        t.upload(part, buffer, low)
        part[:] = 0xEE
    return buffer


def raises(kind: type[BaseException], call: Callable[[], object]) -> str:
    """Message of the `kind` that `call` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def gather(t: Transport[Any], count: int) -> None:
    """all_gather equals the concatenation, and leaves what is behind it alone."""
    send = filled(t, data(t.rank, 0, count))
    recv = filled(t, np.full(count * t.size + 5, 9, np.uint8), spare=0)
    handle = t.start_all_gather(send, count, recv)
    handle.wait()
    handle.wait()
    want = np.concatenate([*(data(r, 0, count) for r in range(t.size)), np.full(5, 9, np.uint8)])
    np.testing.assert_array_equal(fetch(recv), want, f"all_gather of {count}")


def broadcast(t: Transport[Any], count: int, root: int) -> None:
    """What the root has comes to all, and what is behind it stays."""
    buffer = filled(t, np.concatenate([data(t.rank, 5, count), np.full(5, t.rank, np.uint8)]), spare=0)
    t.start_broadcast(buffer, count, root).wait()
    want = np.concatenate([data(root, 5, count), np.full(5, t.rank, np.uint8)])
    np.testing.assert_array_equal(fetch(buffer), want, f"broadcast of {count} from {root}")


def scatter(t: Transport[Any], count: Callable[[int, int], int]) -> None:
    """all_to_all brings every pair's bytes; the send buffer is overwritten right after wait()."""
    sizes, wanted = [count(t.rank, r) for r in range(t.size)], [count(r, t.rank) for r in range(t.size)]
    send = filled(t, np.concatenate([data(t.rank, r, n) for r, n in enumerate(sizes)]))
    recv = filled(t, np.full(sum(wanted) + 5, 9, np.uint8), spare=0)
    t.start_all_to_all(send, sizes, recv, wanted).wait()
    t.upload(np.full(sum(sizes), 0xDD, np.uint8), send, 0)
    want = np.concatenate([*(data(r, t.rank, n) for r, n in enumerate(wanted)), np.full(5, 9, np.uint8)])
    np.testing.assert_array_equal(fetch(recv), want, f"all_to_all {sizes}")


def overlapped(t: Transport[Any]) -> None:
    """Two exchanges under way at once, waited for in either order."""
    n = 70_000
    sends = [filled(t, data(t.rank, tag, n)) for tag in (1, 2)]
    recvs = [t.allocate(n * t.size) for _ in sends]
    handles = [t.start_all_gather(send, n, recv) for send, recv in zip(sends, recvs)]
    for handle in reversed(handles):
        handle.wait()
    for tag, recv in zip((1, 2), recvs):
        np.testing.assert_array_equal(fetch(recv), np.concatenate([data(r, tag, n) for r in range(t.size)]))


def talk(t: Transport[Any]) -> None:
    """share, agree, share_status."""
    assert t.share(b"x" * t.rank) == [b"x" * r for r in range(t.size)]
    assert t.share(bytes([t.rank]) * 100_000) == [bytes([r]) * 100_000 for r in range(t.size)]
    long = [bytes([r]) * (3 << 20) for r in range(t.size)]
    assert t.share(long[t.rank]) == long, "what is too much for a hub goes over the backend"
    assert t.share(long[0]) == long[:1] * t.size
    assert t.share(b"") == [b""] * t.size
    agree(t, {"plan": b"same", "version": "1"})
    last = t.size - 1
    message = raises(DisagreementError, lambda: agree(t, {"plan": b"same", "seed": str(t.rank == last)}))
    assert "'seed'" in message and "'plan'" not in message and f"rank {last}" in message, message
    share_status(t)
    mine = FileNotFoundError("no such shard") if t.rank == last else None
    message = raises(FileNotFoundError if mine else PeerError, lambda: share_status(t, mine))
    assert "no such shard" in message, message


def room(t: Transport[Any]) -> None:
    """What is free of a device is told, and goes down by what is taken; what comes back to the pool is free again."""
    if not t.traits.on_device:
        assert t.free_bytes() == 0
        return
    before, taken = t.free_bytes(), 512 << 20
    assert taken < before <= mindspore.hal.get_device_properties(0, "Ascend").total_memory
    held = t.allocate(taken)
    mindspore.runtime.synchronize()
    assert abs(before - t.free_bytes() - taken) < 8 << 20, "but for what the pool takes in one piece"
    del held
    assert before - t.free_bytes() < taken // 2


def no_pageable(t: Transport[Any]) -> None:
    """What ranks tell each other, and the known answer, go up from pinned memory."""
    if t.traits.on_device:
        count = ctypes.CDLL("libascendcl.so").cannemu_uploaded
        count.restype = ctypes.c_size_t
        assert [count(0, later) for later in (0, 1)] == [0, 0]
        assert sum(count(1, later) for later in (0, 1)) > 0


def everything(t: Transport[Any]) -> None:
    """Every method of a transport, with every kind of count."""
    t.prove()
    t.prove()
    talk(t)
    room(t)
    no_pageable(t)
    for count in (1000, LARGE, 257, 0):
        gather(t, count)
    broadcast(t, 1000, t.size - 1)
    broadcast(t, LARGE, 0)
    broadcast(t, 0, 0)
    scatter(t, lambda a, b: 64)
    scatter(t, lambda a, b: (a + b) % 3)
    scatter(t, lambda a, b: 0)
    scatter(t, lambda a, b: LARGE if (a, b) == (0, 1) else 0)
    scatter(t, lambda a, b: 4099 * (a + 1) * b)
    overlapped(t)


def disagree(t: Transport[Any]) -> None:
    """Different calls, and counts that do not match: all ranks hear of it before a byte moves."""
    buffer, counts = t.allocate(64), [8] * t.size
    start = t.start_all_gather if t.rank else lambda *_: t.start_all_to_all(buffer, counts, buffer, counts)
    message = raises(TransportError, lambda: start(buffer, 8, buffer))
    assert "'all_to_all', 'all_gather'" in message, message
    expected = [9, *counts[1:]] if t.rank else counts
    message = raises(TransportError, lambda: t.start_all_to_all(buffer, counts, buffer, expected))
    assert "rank 1 expects 9 bytes of rank 0, which sends 8" in message, message


def lose(t: Transport[Any], victim: int) -> None:
    """One rank is killed while the others are in an exchange; they must hear of it, by number, soon."""
    n = 1 << 20
    send, recv = t.allocate(n), t.allocate(n * t.size)
    t.start_all_gather(send, n, recv).wait()
    if t.rank == victim:
        time.sleep(1)
        os.kill(os.getpid(), 9)
    began = time.monotonic()
    try:
        t.start_all_gather(send, n, recv).wait()
        raise AssertionError("the exchange with a dead rank succeeded")
    except PeerError as error:
        assert error.rank == victim and "gone" in str(error), error
    # The backends' own limits are 30 s and more.
    assert time.monotonic() - began < 15
    raises(PeerError, lambda: t.share(b""))


def zeros(t: Transport[Any]) -> None:
    """The backend returns success and zeros."""
    buffer, counts = t.allocate(64), [8] * t.size
    for start in (
        t.prove,
        lambda: t.start_all_to_all(buffer, counts, buffer, counts),
        lambda: t.start_broadcast(buffer, 8, 0),
    ):
        message = raises(TransportError, start)
        assert "HCCL on ascend910b returned success" in message and "known contents" in message, message
        for rank in range(t.size):
            assert f"rank {rank}: all_to_all: expected " in message, message
        assert message.count(" of rank 0, found 0000000000000000") == t.size, message


def main(case: str) -> None:
    """Run one case; see test_job_transports.py."""
    start()
    t = select_transport(timeout=60)
    name = type(t).__name__
    if case == "everything":
        everything(t)
        if name == "Mccl":
            disagree(t)
    elif case == "zeros":
        zeros(t)
    else:
        lose(t, int(case))
    print(f"{name} CONTENT {t.rank}", flush=True)
    if case.isdecimal():
        os._exit(0)  # at exit MindSpore waits for the collective until the backend gives up
    t.close()
    t.close()


if __name__ == "__main__":
    main(sys.argv[1])

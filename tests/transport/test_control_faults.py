"""What can go wrong with who takes part, or with who does not: every survivor is told which rank it is, and in time.

How long it took is printed (`pytest -rP` shows it) for the table in docs/control-plane.md. What is asserted is what is
told; bounds are there so that a hang is a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import pytest

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.hub.frames import FRAME, HERE, TELL, frame
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from tests.harness.hosts import Host, Hosts
from tests.support.hub_lines import HANG, Job, Took, all_share, job, took

__all__ = ["took"]

WORKER = Path(__file__).with_name("hub_worker.py")


def told(errors: Sequence[Any], kind: type[TransportError], text: str, rank: Optional[int] = None) -> None:
    """Everybody is told the same."""
    assert errors
    for error in errors:
        assert type(error) is kind, error
        assert text in str(error), error
        assert getattr(error, "rank", None) == rank


class Process(NamedTuple):
    """A rank that is a process."""

    rank: int
    popen: subprocess.Popen[str]

    def line(self) -> str:
        """The next line that it prints."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().rstrip("\n")

    def go(self) -> None:
        """Have it share."""
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()


@contextlib.contextmanager
def processes(
    size: int, timeout: float, vanished: float = HANG, stopped: float = HANG, hosts: Sequence[Host] = ()
) -> Iterator[list[Process]]:
    """Ranks that have been let in; each on a host of its own, if there are any."""
    started: list[Process] = []
    port = ""
    try:
        for rank in range(size):
            address = hosts[0].ipv4 if hosts else "127.0.0.1"
            told = [rank, size, timeout, vanished, stopped, address, port]
            command = [sys.executable, str(WORKER), *map(str, told)]
            start = hosts[rank].start if hosts else partial(subprocess.Popen, text=True)
            started.append(Process(rank, start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
            port = port or started[0].line()
        for process in started:
            assert process.line() == "ready"
        yield started
    finally:
        for process in started:
            process.popen.kill()
            process.popen.communicate()


def outcomes(size: int, victim: int, sent: signal.Signals, timeout: float, stopped: float) -> tuple[list[str], float]:
    """What the others are told in a share when one has been sent a signal, and after how many seconds the last is."""
    with processes(size, timeout, stopped=stopped) as ranks:
        others = [process for process in ranks if process.rank != victim]
        began = time.monotonic()
        os.kill(ranks[victim].popen.pid, sent)
        for process in others:
            process.go()
        heard = [process.line().split(" ", 1) for process in others]
    return [told for _, told in heard], max(float(at) for at, _ in heard) - began


@pytest.mark.parametrize("victim", [2, 0], ids=["a rank", "rank 0"])
@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (signal.SIGKILL, "is gone: its process ended or was killed"),
        (signal.SIGSTOP, "answered nothing for 3 s, though its host does: a process was stopped"),
    ],
    ids=["killed", "stopped"],
)
def test_a_process_that_is_killed_or_stopped(victim: int, sent: signal.Signals, why: str, took: Took) -> None:
    heard, seconds = outcomes(4, victim, sent, HANG, 3.0 if sent == signal.SIGSTOP else HANG)
    took("seconds", seconds)
    for told in heard:
        assert told.startswith(f"PeerError {victim} rank ") and f"rank {victim} {why}" in told


@pytest.mark.parametrize(
    ("victim", "why"),
    [
        (2, "rank 2 did not come within 2 s, though alive"),
        (0, "rank 0, which hears the others and answers them, was silent for 2 s"),
    ],
    ids=["a rank", "rank 0"],
)
def test_a_stopped_process_is_waited_for_no_longer_than_any_other(victim: int, why: str) -> None:
    heard, _ = outcomes(3, victim, signal.SIGSTOP, timeout=2.0, stopped=HANG)
    for told in heard:
        assert told.startswith("TransportError None ") and why in told


def test_a_stopped_process_is_noticed_where_nobody_shares_anything() -> None:
    """While a collective of the backend is under way, say."""
    with processes(3, HANG, stopped=3.0) as ranks:
        os.kill(ranks[1].popen.pid, signal.SIGSTOP)
        time.sleep(3.5)
        ranks[2].go()
        _, kind, number, _ = ranks[2].line().split(" ", 3)
    assert (kind, number) == ("PeerError", "1")


def test_a_rank_that_is_busy_is_not_taken_for_a_stopped_one() -> None:
    """Its main thread computes, or reads; what answers is another thread."""
    with job(3, HANG, ControlLimits(stopped_seconds=5.0)) as found:
        with ThreadPoolExecutor(2) as pool:
            early = pool.submit(all_share, found.lines[:2])
            until = time.monotonic() + 6.0
            while time.monotonic() < until:
                sum(range(1000))
            assert all_share(found.lines[2:]) == [[b""] * 3]
            assert early.result() == [[b""] * 3] * 2


def test_several_that_are_silent_are_all_named() -> None:
    """They answer nothing after they have said something at the same time."""
    limits = ControlLimits(stopped_seconds=3.0)
    with job(4, HANG, limits, absent=[1, 3]) as found, found.connect(1) as one, found.connect(3) as other:
        for deaf in (one, other):
            deaf.sendall(frame(HERE))
        told(all_share([found.lines[0], found.lines[2]]), TransportError, "ranks 1, 3 answered nothing for 3 s")
        for line in found.lines:
            line.close()
        found.hub.join(HANG)
        assert "ms_ckpt_ext hub" not in [thread.name for thread in threading.enumerate()], (
            "it waits for who is given up"
        )


@pytest.mark.parametrize(
    ("victim", "act"), [(2, Hosts.cut), (0, Hosts.link_down)], ids=["a rank's host, silence", "rank 0's, no carrier"]
)
def test_a_host_that_is_cut_off(victim: int, act: Callable[[Hosts, Host], None], took: Took) -> None:
    """Both sides hear that the other is out of reach."""
    switch = Hosts(3)
    with switch as hosts, processes(3, HANG, vanished=2.0, hosts=hosts) as ranks:
        began = time.monotonic()
        act(switch, hosts[victim])
        for process in ranks:
            process.go()
        heard = [process.line() for process in ranks]
    took("seconds", max(float(line.split(" ", 1)[0]) for line in heard) - began)
    for rank, line in enumerate(heard):
        _, kind, number, message = line.split(" ", 3)
        lost = {"1", "2"} if rank == victim == 0 else {"0"} if rank == victim else {str(victim)}
        assert kind == "PeerError" and number in lost, line
        assert f"rank {number} is out of reach: its host did not answer" in message


def test_a_rank_that_does_not_read_is_named_like_one_that_does_not_come(took: Took) -> None:
    """The others have their answers meanwhile."""
    with job(4, 2.0, ControlLimits(), absent=[2]) as found, found.connect(2) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        others = [line for line in found.lines if line.rank != 2]
        long = [bytes([rank]) * 1_000_000 for rank in range(4)]
        deaf.sendall(frame(TELL, 2, long[2]))
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda line: line.share(long[line.rank]), others)) == [long] * 3
        began = time.monotonic()
        told(all_share(others), TransportError, "rank 2 did not come within 2 s, though alive")
        assert "rank 2 did not even read the last answer" in str(all_share(others)[0])
        took("seconds", time.monotonic() - began)


@pytest.mark.parametrize(
    "nonsense",
    [
        frame(TELL, 1, b"a") * 2,
        frame(b"what", 1, b"a"),
        FRAME.pack(TELL, 1, 1 << 40),
        os.urandom(100),
    ],
    ids=["twice", "no such kind", "huge", "random"],
)
def test_a_rank_that_talks_nonsense_is_put_out(nonsense: bytes) -> None:
    with job(3, HANG, ControlLimits(), absent=[1]) as found, found.connect(1) as strange:
        strange.sendall(nonsense)
        told(all_share([found.lines[0], found.lines[2]]), PeerError, "rank 1 was put out", 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a socket that drops all it gets needs Linux")
@pytest.mark.parametrize("under_way", [False, True], ids=["idle", "with something under way"])
def test_a_link_that_goes_down(under_way: bool, took: Took) -> None:
    """Nothing comes through any more, in either direction, and nobody says so."""
    with socket.socket() as trial:
        try:
            drop_all(trial)
        except PermissionError:
            pytest.skip("this kernel lets nobody but root say what a socket drops")
    with job(3, HANG, ControlLimits(vanished_seconds=2.0)) as found:
        if not under_way:
            cut(found, 2)
            began = time.monotonic()
            errors = all_share(found.lines[:2])
        else:
            with ThreadPoolExecutor(1) as pool:
                lost = pool.submit(all_share, found.lines[2:])
                while found.hub._share is None:
                    time.sleep(0.01)
                cut(found, 2)
                began = time.monotonic()
                assert all_share(found.lines[:2]) == [[b""] * 3] * 2
                errors = all_share(found.lines[:2])
                told(lost.result(), PeerError, "rank 0 is out of reach", 0)
        took("seconds", time.monotonic() - began)
        told(errors, PeerError, "rank 2 is out of reach: its host did not answer for 2 s", 2)


def cut(found: Job, rank: int) -> None:
    """Drop whatever comes to either end of a connection, acknowledgements as well, as if the cable were out."""
    for end in (found.lines[rank]._socket, found.hub._peers[rank]._socket):
        assert end is not None
        drop_all(end)


def drop_all(end: socket.socket) -> None:
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0, so take 0 bytes
    end.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(drop)))  # SO_ATTACH_FILTER

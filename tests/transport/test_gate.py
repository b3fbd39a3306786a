"""Ranks of a host meet before the backend is called. Ranks are threads, and processes where one is to die."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import pytest

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport import gate
from ms_ckpt_ext.transport.living import leads_elsewhere, living_ranks
from tests.harness.hosts import Hosts
from tests.support.waiting import SOON, comes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """A job of this test's own, which leaves nothing behind."""
    monkeypatch.setenv("MS_SCHED_HOST", str(abs(hash(str(tmp_path))))[:15])
    monkeypatch.setenv("MS_SCHED_PORT", "8118")
    yield
    assert comes(lambda: not _ours()), "a thread is left"


def _ours() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ms_ckpt_ext") and "caller" not in t.name]


def outcome(rank: int, size: int, timeout: float, everybody: bool = True) -> Optional[BaseException]:
    try:
        gate.meet(rank, size, timeout, everybody)
    except Exception as error:
        return error
    return None


def meet(ranks: list[int], size: int, timeout: float = SOON, everybody: bool = True) -> list[Optional[BaseException]]:
    """What these ranks of `size` get."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: outcome(rank, size, timeout, everybody), ranks))


def test_all_pass_time_and_again() -> None:
    """One rank may be at the next meeting before another has left the last one."""

    def often(rank: int) -> None:
        for _ in range(50):
            gate.meet(rank, 4, SOON, True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, range(4)))


def test_ranks_learn_each_others_numbers_in_the_job() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: gate.meet(rank, 2, SOON, False, number=6 + rank), range(2)))
    assert found == [[6, 7]] * 2
    assert gate.meet(0, 1, SOON, False, number=5) == [5]


def test_a_rank_alone_or_without_a_scheduler_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meet([0], 1) == [None]
    monkeypatch.delenv("MS_SCHED_PORT")
    assert meet([0], 2) == [None]


@pytest.mark.parametrize("missing", [[0], [1], [0, 2]])
def test_who_does_not_come_is_named_to_all_others(missing: list[int]) -> None:
    began = time.monotonic()
    for error in meet([rank for rank in range(4) if rank not in missing], 4, timeout=1.0):
        assert type(error) is TransportError
        named = f"rank{'s' if missing[1:] else ''} {', '.join(map(str, missing))} did not come within 1 s"
        assert named in str(error) and "the first meeting" in str(error)
    assert time.monotonic() - began < SOON
    assert meet([*range(4)], 4) == [None] * 4, "who was late once may come to the next one"


def test_who_comes_too_late_waits_for_the_others_in_turn() -> None:
    assert "rank 1 did not come" in str(meet([0], 2, timeout=0.2)[0])
    assert "rank 0 did not come" in str(meet([1], 2, timeout=0.2)[0])
    assert meet([0, 1], 2) == [None, None]


def test_ranks_of_several_hosts_are_told_which_host_it_is() -> None:
    (error,) = meet([0], 2, timeout=0.2, everybody=False)
    assert type(error) is TransportError
    assert "rank 1 did not come" in str(error) and "counted among the ranks of host" in str(error)


def test_a_number_that_two_have_is_an_error() -> None:
    errors = meet([0, 0], 2, timeout=0.5)
    assert all(isinstance(error, TransportError) for error in errors)
    assert any("rank 1 did not come" in str(error) for error in errors)


CHILD = """
import sys, threading, time
from ms_ckpt_ext.transport import gate
from ms_ckpt_ext.transport.hub.limits import ControlLimits

def tell_when_let_in():
    while not any(thread.name == "ms_ckpt_ext control" for thread in threading.enumerate()):
        time.sleep(0.01)
    print("in", flush=True)

threading.Thread(target=tell_when_let_in, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
try:
    gate.meet(int(sys.argv[1]), 3, float(sys.argv[2]), True, ControlLimits(slack_seconds=0.5))
except Exception as error:
    print(type(error).__name__, getattr(error, "rank", None), error, flush=True)
"""


def heard(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None and child.stdout.readline() == f"{word}\n"


@pytest.mark.parametrize(("sent", "kind"), [(signal.SIGKILL, PeerError), (signal.SIGSTOP, TransportError)])
@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_dies_or_is_stopped_while_it_waits(sent: int, kind: type[Exception], first: bool) -> None:
    """Also the one that keeps the hub, which is who came first."""
    timeout = SOON if kind is PeerError else 2.0
    children: dict[int, subprocess.Popen[str]] = {}
    try:
        for rank in range(2):
            command = [sys.executable, "-c", CHILD, str(rank), str(timeout)]
            children[rank] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for child in children.values():
            heard(child, "ready")
        for rank in (1, 0) if first else (0, 1):
            told = children[rank].stdin
            assert told is not None
            told.write("\n")
            told.flush()
            heard(children[rank], "in")
        os.kill(children[1].pid, sent)
        name, number_of, message = children[0].communicate(timeout=2 * SOON)[0].split(" ", 2)
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    assert name == kind.__name__, message
    if kind is PeerError:
        assert number_of == "1" and "rank 1 is gone" in message
    else:
        told = (
            "rank 1, which hears the others"
            if first
            else r"ranks? (1, )?2 did not come .* and (rank 2 )?never did before"
        )
        assert re.search(told, message), message


BUSY = """
import os, socket, subprocess, sys, time
from ms_ckpt_ext.transport import gate

rank, size, port, forks = map(int, sys.argv[1:5])
where = sys.argv[5] if sys.argv[5:] else "127.0.0.1"
scheduler = [socket.create_connection((where, port)) for _ in range(2)]
if forks:  # a worker that loads data, say: it holds the same connections, and is no rank
    for each in scheduler:
        each.set_inheritable(True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
print("ready", flush=True)
if sys.stdin.readline() == "die\\n":
    os._exit(1)
try:
    print("met", *gate.meet(rank, size, 60.0, True), flush=True)
    sys.stdin.readline()  # its connections are there as long as it lives
except Exception as error:
    print(type(error).__name__, getattr(error, "rank", None), error, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="connections are looked up in /proc of Linux")
@pytest.mark.parametrize("before", [True, False], ids=["before any came", "while others wait"])
@pytest.mark.parametrize("dead", [[2], [1, 2]])
def test_who_dies_before_coming_is_noticed_long_before_the_timeout(
    dead: list[int], before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MindSpore's scheduler: connections that ranks keep, and that the kernel closes when they end."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as scheduler:
        port = scheduler.getsockname()[1]
        monkeypatch.setenv("MS_SCHED_PORT", str(port))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", BUSY, str(rank), "4", str(port), str(int(rank == 0))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(4)
        ]  # fmt: skip
        try:
            accepted = [scheduler.accept() for _ in range(8)]
            for rank in ranks:
                heard(rank, "ready")
            told = [ranks[rank] for rank in range(4) if rank not in dead]
            if not before:
                come(told)
                time.sleep(0.5)
            for rank in dead:
                ranks[rank].kill()
            if before:
                come(told)
            began = time.monotonic()
            for rank in told:
                assert rank.stdout is not None
                kind, number, message = rank.stdout.readline().split(" ", 2)
                assert (kind, number) == (("PeerError", "2") if dead == [2] else ("TransportError", "None")), message
                assert "of 4 processes of this host" in message and "ended before coming" in message
                assert ("rank 2" if dead == [2] else "ranks 1, 2") in message
            assert time.monotonic() - began < 30
        finally:
            for connection, _ in accepted:
                connection.close()
            for each in ranks:
                each.kill()
                each.communicate()


def come(ranks: list[subprocess.Popen[str]], word: str = "") -> None:
    """Have them go to the gate, or "die" before."""
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(f"{word}\n")
        rank.stdin.flush()


SCHEDULER = """
import socket
server = socket.create_server(("", 8118), backlog=16)
print("ready", flush=True)
kept = []
while True:
    kept.append(server.accept())
"""


@pytest.mark.parametrize("dead", [None, 3], ids=["all come", "one has died"])
def test_hosts_of_one_name_meet_each_by_itself(dead: Optional[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore counts the ranks of a name, here all. That another has died is then for the next meeting to notice."""
    with Hosts(2, names=["node", "node"]) as hosts:
        monkeypatch.setenv("MS_SCHED_HOST", hosts[0].ipv4)
        heard(hosts[0].start([sys.executable, "-c", SCHEDULER], stdout=subprocess.PIPE), "ready")
        ranks = [
            hosts[rank // 2].start(
                [sys.executable, "-c", BUSY, rank, 4, 8118, 0, hosts[0].ipv4],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(4)
        ]
        for rank in ranks:
            heard(rank, "ready")
        if dead is not None:
            come([ranks[dead]], "die")
            ranks[dead].wait(SOON)
        come([each for rank, each in enumerate(ranks) if rank != dead])
        for rank, each in enumerate(ranks):
            if rank != dead:
                heard(each, "met 0 1" if rank < 2 else "met 2 3" if dead is None else "met 2")


def test_a_rank_that_is_merely_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives: its connections to the scheduler stand."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as scheduler:
        port = scheduler.getsockname()[1]
        monkeypatch.setenv("MS_SCHED_PORT", str(port))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", BUSY, str(rank), "2", str(port), "0"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        accepted = [scheduler.accept() for _ in range(4)]
        try:
            for rank in ranks:
                heard(rank, "ready")
            come(ranks[:1])
            time.sleep(2.0)  # many looks
            come(ranks[1:])
            for rank in ranks:
                heard(rank, "met 0 1")
        finally:
            for connection, _ in accepted:
                connection.close()
            for each in ranks:
                each.kill()
                each.communicate()


def test_what_cannot_be_known_is_not_concluded() -> None:
    """No connection of this process, and one process that holds all: nothing is known of others, or of their number."""
    with socket.create_server(("127.0.0.1", 0)) as scheduler:
        port = scheduler.getsockname()[1]
        assert living_ranks(port, 2) is None
        with socket.create_connection(("127.0.0.1", port)):
            assert living_ranks(port, 1) == 1
            assert living_ranks(port, 3) == 1
            assert not leads_elsewhere(port)


def test_a_connection_is_seen_to_stay_here_in_both_tables_of_the_kernel() -> None:
    """The listener takes IPv4 and IPv6, as MindSpore's may; who comes has an address of IPv4."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no socket takes both IPv4 and IPv6 here")
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as scheduler:
        port = scheduler.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert living_ranks(port, 1) == 1 and not leads_elsewhere(port)

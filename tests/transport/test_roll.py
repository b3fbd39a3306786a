"""When the first meeting takes too long its error names who has not come, on every host. Hosts are namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.roll import calling_roll
from tests.harness.hosts import Host, Hosts

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("roll_worker.py")
TIMEOUT = 5.0


def errors(places: dict[int, Host], scheduler: str, size: int) -> list[str]:
    """What the ranks of these places are told."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MS_SCHED_HOST": scheduler, "MS_SCHED_PORT": "8118"}
    ranks = [
        host.start(
            [sys.executable, WORKER, rank, size, TIMEOUT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for rank, host in places.items()
    ]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    return [rank.communicate(timeout=60)[0].rstrip("\n") for rank in ranks]


@pytest.mark.parametrize("ipv4", [True, False], ids=["IPv4", "IPv6"])
def test_who_did_not_come_is_named_on_all_hosts(ipv4: bool) -> None:
    with Hosts(3, ipv4=ipv4, ipv6=not ipv4) as (a, b, c):
        told = errors({0: a, 3: b, 4: c}, a.ipv4 or a.ipv6, 6)
    for error in told:
        assert error.startswith("it took too long. rank ") and "ranks 1, 2, 5 of 6 did not come" in error


@pytest.mark.parametrize("missing", ["the scheduler's host", "a way"])
def test_nothing_hangs_on_it(missing: str) -> None:
    with Hosts(2) as (a, b):
        if missing == "a way":
            a.open_only(8118)
        told = errors({2: b} if missing != "a way" else {0: a, 2: b}, a.ipv4, 4)
    assert told[-1] == "it took too long"
    assert missing != "a way" or "ranks 1, 2, 3 of 4 did not come, or cannot reach 10.77.0.1:" in told[0]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the threads that are left."""
    left: list[str] = []
    yield left
    left.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("ms_ckpt_ext roll"))


@pytest.mark.parametrize("ends", [None, PeerError("rank 3 is gone", 3), TransportError("no way"), KeyError("other")])
def test_a_meeting_that_does_not_take_long_is_left_alone(ends: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_SCHED_HOST", "127.0.0.1")
    monkeypatch.setenv("MS_SCHED_PORT", "8118")
    found: Sequence[Exception] = []
    with counted() as left:
        try:
            with calling_roll(0, 4, 60.0):
                if ends is not None:
                    raise ends
        except Exception as error:
            found = [error]
    assert list(found) == ([] if ends is None else [ends]) and left == []

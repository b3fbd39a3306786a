"""Ranks of several hosts find each other: hosts are namespaces, the backend a stand-in; MindSpore is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import pytest

from tests.harness.hosts import Host, Hosts, hosts_or_skip
from tests.harness.meeting_point import MeetingPoint

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("meeting_worker.py")
PORT = 4711
ADDRESS = "MS_CKPT_EXT_CONTROL_ADDRESS"


def environment(more: Optional[Mapping[str, str]] = None) -> dict[str, str]:
    """Of a job that no launcher of MindSpore started."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})}


def meet(
    hosts: Sequence[Host],
    tmp_path: Path,
    variables: Optional[Mapping[str, str]] = None,
    own: Optional[Mapping[int, Mapping[str, str]]] = None,
    seconds: float = 20.0,
) -> list[list[str]]:
    """What each rank told; rank r is on `hosts[r]`.

    Args:
        variables: of all ranks; `own` of single ones.
        seconds: how long they try to come to rank 0.
    """
    path = tmp_path / "point"
    with MeetingPoint(path, len(hosts)):
        ranks = [
            host.start(
                [sys.executable, WORKER, path, rank, len(hosts), seconds],
                env=environment({**(variables or {}), **(own or {}).get(rank, {})}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            for rank, host in enumerate(hosts)
        ]
        told = [rank.communicate(timeout=60)[0].splitlines() for rank in ranks]
    path.unlink()
    return told


def met(told: Sequence[Sequence[str]]) -> list[str]:
    """By which address each rank came; all must have met."""
    for lines in told:
        assert lines[1:] == ["met", "shared"], told
    return [lines[0].rpartition(" ")[2] for lines in told]


@pytest.mark.parametrize(("ipv4", "ipv6"), [(True, True), (True, False), (False, True)])
def test_ranks_of_four_hosts_meet(ipv4: bool, ipv6: bool, tmp_path: Path) -> None:
    with Hosts(4, ipv4=ipv4, ipv6=ipv6) as hosts:
        first, *others = met(meet([*hosts[:3], hosts[3]], tmp_path))
    assert first == "127.0.0.1", "rank 0 comes to its own hub without leaving its host"
    assert set(others) == {"10.77.0.1" if ipv4 else "fd00:77::1"}


def test_a_job_of_one_host_does_not_leave_it(tmp_path: Path) -> None:
    with Hosts(1) as (host,):
        assert met(meet([host] * 3, tmp_path, {ADDRESS: f":{PORT}", "MS_WORKER_IP": host.ipv4})) == ["127.0.0.1"] * 3


def test_the_hosts_may_have_one_name(tmp_path: Path) -> None:
    with Hosts(2, names=["node", "node"]) as hosts:
        assert met(meet([*hosts, hosts[1]], tmp_path)) == ["127.0.0.1", "10.77.0.1", "10.77.0.1"]


@pytest.mark.parametrize("address", ["10.77.0.1", "fd00:77::1"])
def test_the_address_that_mindspore_is_to_use_is_used(address: str, tmp_path: Path) -> None:
    with Hosts(2) as hosts:
        assert met(meet(hosts, tmp_path, own={0: {"MS_WORKER_IP": address}})) == [address] * 2


def test_an_address_that_leads_nowhere_does_not_keep_from_the_next(tmp_path: Path) -> None:
    """One is silent, and one both hosts have, where on the rank's own a stranger listens who never says a word."""
    stranger = (
        f"import socket, time; s = socket.create_server(('172.17.0.1', {PORT})); print(flush=True); time.sleep(99)"
    )
    with Hosts(2) as (a, b):
        a.ip("addr flush dev eth0", "addr add 10.99.0.1/24 dev eth0", "addr add 172.17.0.1/16 dev eth0")
        a.ip("addr add 10.77.0.1/24 dev eth0")
        b.ip("link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up")
        b.ip("route add 10.99.0.0/24 dev eth0", "neigh add 10.99.0.1 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
        listener = b.start([sys.executable, "-c", stranger], stdout=subprocess.PIPE)
        assert listener.stdout is not None and listener.stdout.readline() == "\n"
        assert met(meet([a, b], tmp_path, {ADDRESS: f":{PORT}"})) == ["127.0.0.1", "10.77.0.1"]


def test_one_open_port_is_enough_when_it_is_named(tmp_path: Path) -> None:
    """Until then all ranks hear what was tried."""
    with Hosts(3) as hosts:
        hosts[0].open_only(PORT)
        for lines in meet(hosts, tmp_path, seconds=2.0):
            (line,) = lines
            assert line.startswith("TransportError rank ") and "cannot reach rank 0 (on host0)" in line
            assert "10.77.0.1:" in line and "[fd00:77::1]:" in line and "no answer" in line and ADDRESS in line
        for told in (f":{PORT}", f"10.77.0.1:{PORT}", f"[fd00:77::1]:{PORT}"):
            came_by = "10.77.0.1" if told.startswith(":") else told.strip("[").rpartition(":")[0].strip("]")
            for _ in range(2):  # the port is free again at once
                assert met(meet(hosts, tmp_path, {ADDRESS: told}))[1:] == [came_by] * 2


def test_a_port_that_is_taken_is_named_to_all(tmp_path: Path) -> None:
    with Hosts(2) as hosts:
        taker = f"import socket, time; s = socket.create_server(('', {PORT})); print(flush=True); time.sleep(99)"
        process = hosts[0].start([sys.executable, "-c", taker], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == "\n"
        for (line,) in meet(hosts, tmp_path, {ADDRESS: f":{PORT}"}):
            assert "TransportError rank 0 (on host0): cannot listen" in line and f"port {PORT}" in line


def test_where_to_find_rank_0_may_be_told_to_a_rank_alone(tmp_path: Path) -> None:
    """As behind a service of Kubernetes: what rank 0 knows of itself does not lead there."""
    with Hosts(2) as (a, b):
        a.ip("addr add 10.88.0.1/24 dev eth0")
        b.ip("route add 10.88.0.0/24 dev eth0")
        there = {0: {"MS_WORKER_IP": "10.88.0.1", ADDRESS: f":{PORT}"}, 1: {ADDRESS: f"10.88.0.1:{PORT}"}}
        assert met(meet([a, b], tmp_path, own=there)) == ["10.88.0.1"] * 2
        wrong = {0: {ADDRESS: f":{PORT}"}, 1: {ADDRESS: "no address"}}
        for (line,) in meet([a, b], tmp_path, own=wrong):
            assert "rank 1 (on host1) cannot reach rank 0" in line and f"{ADDRESS}: 'no address' is no address" in line


def test_hosts_leave_nothing_behind(tmp_path: Path) -> None:
    """Also when the process that made them is killed."""
    hosts_or_skip()
    script = "import time; from tests.harness.hosts import Hosts\nwith Hosts(2) as (a, b):\n"
    script += "    p = a.start(['sleep', '98765'])\n    print(a.pid, b.pid, flush=True)\n    time.sleep(99)\n"
    maker = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    pids = list(map(int, maker.stdout.readline().split()))
    assert len(pids) == 2
    maker.kill()
    maker.communicate()
    for pid in pids:
        subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], timeout=10, check=True)
    assert "98765" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout

"""msrun on several hosts, as the documentation has it: loads are exact in all modes, with shared and with own disks.

Hosts are namespaces of one machine. A default run has few of them; `scripts/e2e.sh` runs all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.harness.chosen import long_one
from tests.harness.hosts import Host, Hosts

pytestmark = pytest.mark.msrun
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("hosts_worker.py")
ABSENT_WORKER = Path(__file__).with_name("absent_worker.py")
LINK_WORKER = Path(__file__).with_name("link_worker.py")
RANKS = 4
MODES = ("direct", "cooperative", "auto")


def start(hosts: Sequence[Host], tmp_path: Path, worker: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    """msrun on every host, `RANKS` ranks in all, shared out evenly. What ranks say is in `logs` later."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MS_", "RANK_"))}
    env.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", GLOG_v="2")
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    first = hosts[0].ipv4 or hosts[0].ipv6
    return [
        host.start(
            [
                *[sys.executable, "-c", "from mindspore.parallel.cluster.run import main; main()"],
                *[f"--worker_num={RANKS}", f"--local_worker_num={RANKS // len(hosts)}", "--join=True"],
                *[f"--master_addr={first}", "--master_port=8118", f"--node_rank={host.number}"],
                *["--cluster_time_out=60", f"--log_dir={tmp_path / f'logs_{host.number}'}", worker, *arguments],
            ],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        for host in hosts
    ]


def logs(tmp_path: Path) -> list[str]:
    """The logs of all ranks, in their order."""
    return [log.read_text(errors="replace") for log in sorted(tmp_path.glob("logs_*/worker_*.log"))]


def msrun(hosts: Sequence[Host], tmp_path: Path, cases: Sequence[dict[str, Any]], seconds: float = 240) -> list[str]:
    """Run the worker on all ranks, which must succeed; returns their logs."""
    (tmp_path / "cases.json").write_text(json.dumps(cases, default=str))
    launched = start(hosts, tmp_path, WORKER, tmp_path / "cases.json")
    codes = [process.wait(seconds) for process in launched]
    said = logs(tmp_path)
    assert codes == [0] * len(hosts) and len(said) == RANKS, tails(said)
    return said


def tails(said: Sequence[str]) -> str:
    """The end of every log, for a message."""
    return "\n----\n".join(log[-2000:] for log in said)


@pytest.fixture
def disks(golden: Path, tmp_path: Path) -> dict[str, Any]:
    """A case whose source is `tmp_path/disk`, which all hosts share until they mount their own."""
    for rank in range(8):
        shutil.copytree(golden / f"dp2_tp4_zero/shards/rank_{rank}", tmp_path / f"disk/save/rank_{rank}")
    return {
        "name": "from shared disks",
        "source": tmp_path / "disk/save",
        "trained": golden / "dp2_tp4_zero/strategy.ckpt",
        "predicted": golden / "tp4/strategy.ckpt",
        "expected": golden / "tp4/shards",
    }


def give_own_disks(hosts: Sequence[Host], tmp_path: Path) -> None:
    """Every host gets the files of some ranks under the path at which all files were."""
    for host in hosts:
        own = tmp_path / f"disk_{host.number}"
        for rank in range(host.number, 8, len(hosts)):
            shutil.copytree(tmp_path / f"disk/save/rank_{rank}", own / f"save/rank_{rank}")
        host.mount(own, tmp_path / "disk")


@pytest.mark.parametrize(
    ("count", "own", "family", "names"),
    [
        (2, True, "ipv4", ["a", "b"]),
        (2, False, "ipv4", ["a", "b"]),
        (4, True, "ipv4", ["a", "b", "c", "d"]),
        (4, False, "ipv4", ["a", "b", "c", "d"]),
        (2, False, "ipv6", ["a", "b"]),
        (2, True, "ipv4", ["node", "node"]),
    ],
)
def test_loads_of_several_hosts_are_exact(
    count: int, own: bool, family: str, names: list[str], disks: dict[str, Any], tmp_path: Path
) -> None:
    if not (names == ["a", "b"] and own):
        long_one("two hosts with disks of their own find most")
    with Hosts(count, names=names, ipv4=family == "ipv4", ipv6=family == "ipv6") as hosts:
        if own:
            give_own_disks(hosts, tmp_path)
            disks["name"] = "from own disks"
        for log in msrun(hosts, tmp_path, [disks]):
            for mode in MODES:
                for way in ("load", "restore"):
                    assert f"{way} {disks['name']} {mode} is right" in log


@pytest.mark.parametrize("victim", [1, 0], ids=["a host", "rank 0's host"])
def test_a_link_that_goes_down_in_the_middle_of_a_load(victim: int, disks: dict[str, Any], tmp_path: Path) -> None:
    """Every rank is told who is out of reach, on both sides, before MindSpore ends the job without a word."""
    long_one("a vanished host is waited for as long as in a job of users, 30 s")
    (tmp_path / "case.json").write_text(json.dumps(disks, default=str))
    switch = Hosts(2, names=["a", "b"])
    with switch as hosts:
        start(hosts, tmp_path, LINK_WORKER, tmp_path / "case.json", tmp_path)
        wait_for(lambda: len(list(tmp_path.glob("under_way_*"))) == RANKS, tmp_path)
        switch.cut(hosts[victim])
        began = time.monotonic()
        (tmp_path / "cut").touch()
        wait_for(lambda: len(list(tmp_path.glob("told_*"))) == RANKS, tmp_path)
    for rank in range(RANKS):
        told = json.loads((tmp_path / f"told_{rank}").read_text())
        print(f"TOOK {told['at'] - began:.1f} seconds, rank {rank}: {told['kind']} {told['text']}")
        assert told["kind"] == "LoadError", told
        assert any(f"rank {other} is out of reach" in told["text"] for other in range(RANKS) if other // 2 != rank // 2)


def test_a_rank_that_does_not_come_is_named_on_the_other_host(disks: dict[str, Any], tmp_path: Path) -> None:
    long_one("tests/transport/test_roll.py is about the same without MindSpore")
    (tmp_path / "case.json").write_text(json.dumps(disks, default=str))
    with Hosts(2, names=["a", "b"]) as hosts:
        start(hosts, tmp_path, ABSENT_WORKER, tmp_path / "case.json", tmp_path)
        wait_for(lambda: len(list(tmp_path.glob("told_*"))) == RANKS - 1, tmp_path)
    for rank in range(RANKS - 1):
        told = (tmp_path / f"told_{rank}").read_text()
        assert told.startswith("TransportError: ") and "rank 3 of 4 did not come" in told, told


def wait_for(condition: Callable[[], bool], tmp_path: Path, seconds: float = 120.0) -> None:
    """Wait until it holds; fails with what the ranks printed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, tails(logs(tmp_path))
        time.sleep(0.1)

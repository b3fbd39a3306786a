"""Which files are the same and which are not, told by hosts that are namespaces; without MindSpore."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext.engine.load.hosts import host_key, told_apart
from tests.harness.hosts import Host, Hosts
from tests.harness.meeting_point import MeetingPoint

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("disks_worker.py")
ONE_TIME = 1_700_000_000_123_456_789


def look(hosts: Sequence[Host], tmp_path: Path) -> list[dict[str, Any]]:
    """What the ranks report; rank r is on `hosts[r]`."""
    point = tmp_path / "point"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
    env.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    with MeetingPoint(point, len(hosts)):
        ranks = [
            host.start(
                [sys.executable, WORKER, point, rank, len(hosts), tmp_path / "disk"], env=env, stdout=subprocess.PIPE
            )
            for rank, host in enumerate(hosts)
        ]
        told = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    point.unlink()
    return told


def save(disk: Path, *ranks: int, shape: tuple[int, ...] = (4,)) -> None:
    """Files whose size and time of modification are the same everywhere."""
    disk.mkdir(exist_ok=True)
    for rank in ranks:
        save_file({"w": np.zeros(shape, np.float32)}, disk / f"{rank}.safetensors")
        os.utime(disk / f"{rank}.safetensors", ns=(ONE_TIME, ONE_TIME))


def test_hosts_of_other_names_that_share_a_disk_read_a_header_once(tmp_path: Path) -> None:
    save(tmp_path / "disk", 0, 1, 2)
    with Hosts(2, names=["login", "node"]) as (a, b):
        told = look([a, a, b, b], tmp_path)
    assert [rank["hosts"] for rank in told] == [["login", "node"]] * 4 and told[0]["sees"] is None
    assert [rank["read"][:1] for rank in told] == [["list"], ["1"], ["list"], []], "a rank of each host lists"
    assert sorted(name for rank in told for name in rank["read"] if name != "list") == ["0", "1", "2"]


@pytest.mark.parametrize("names", [["node", "node"], ["a", "b"]])
def test_hosts_with_disks_of_their_own_are_told_apart_whatever_their_names(names: list[str], tmp_path: Path) -> None:
    with Hosts(2, names=names) as hosts:
        for host in hosts:
            save(tmp_path / f"of{host.number}", host.number)
            host.mount(tmp_path / f"of{host.number}", tmp_path / "disk")
        told = look([hosts[0], hosts[1], hosts[1]], tmp_path)
    for rank in told:
        assert rank["keys"] == ["0", "1"] and rank["sees"] == {"0": [0], "1": [1, 2]}
        assert rank["hosts"] == (["node", "node (2)"] if names[0] == "node" else names)


def test_files_that_differ_are_not_one_for_their_size_time_and_number(tmp_path: Path) -> None:
    """Each disk is a file system of its own, which numbers its files from the start."""
    with Hosts(2) as hosts:
        numbers = set()
        for host, shape in zip(hosts, [(4,), (2, 2)]):
            (tmp_path / "disk").mkdir(exist_ok=True)
            host.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "disk"])
            script = "import sys; from pathlib import Path\n"
            script += "sys.path.insert(0, sys.argv[1]); from test_disks_of_hosts import save\n"
            script += f"save(Path(sys.argv[2]), 0, shape={shape})"
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            host.run([sys.executable, "-c", script, WORKER.parent, tmp_path / "disk"], env=env)
            status = host.run(["stat", "-c", "%s %Y %i", tmp_path / "disk/0.safetensors"], capture_output=True)
            numbers.add(status.stdout.split()[2])
        assert len(numbers) == 1, "the case is not made: inodes differ"
        told = look(hosts, tmp_path)
    for rank in told:
        assert "LayoutMismatchError" in rank["error"] and "their headers differ" in rank["error"]


def test_a_host_that_is_named_is_what_it_is_called() -> None:
    assert host_key("rack 7") == "rack 7" and host_key() == host_key() != host_key("rack 7")
    assert told_apart(["a (2)", "a\0x", "a\0y", "a"]) == ["a (2)", "a", "a (3)", "a (4)"]

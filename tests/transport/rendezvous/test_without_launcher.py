"""Jobs that msrun did not start, so without MS_SCHED_HOST: by a URL, by a store, by mpirun. On the emulated Ascend.

Processes started one by one are on two hosts, which are namespaces; mpirun starts all on this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip, environment
from tests.harness.hosts import Hosts

pytestmark = [pytest.mark.msrun, pytest.mark.ascend]
ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("unlaunched_worker.py")


def variables(tmp_path: Path) -> dict[str, str]:
    """Of a process that no launcher of MindSpore started."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
    own = {**kept, "PYTHONPATH": str(ROOT), "GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    return environment(emulator_or_skip(), own, messages=tmp_path)


@pytest.mark.parametrize("way", ["url", "store"])
def test_processes_started_one_by_one_load_together(way: str, golden: Path, tmp_path: Path) -> None:
    if way == "store":
        long_one("a URL finds most of it")
    env = variables(tmp_path)
    with Hosts(2) as hosts:
        ranks = [
            host.start(
                [sys.executable, WORKER, golden, way, host.number, len(hosts), hosts[0].ipv4, 9123],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for host in hosts
        ]
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    for rank, text in enumerate(told):
        assert f"rank {rank} is right" in text, "\n----\n".join(each[-2000:] for each in told)


def test_ranks_that_mpirun_started_load_together(golden: Path, tmp_path: Path) -> None:
    """MindSpore has this on Ascend only: on the CPU its `init` fails under mpirun."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not here: install Open MPI 4, which MindSpore's libmpi_collective.so is linked to")
    env = {**variables(tmp_path), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ended = subprocess.run(
        [mpirun, "--oversubscribe", "-n", "2", sys.executable, str(WORKER), str(golden), "mpirun"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    if "libmpi" in ended.stdout and "cannot open shared object" in ended.stdout:
        pytest.skip("MindSpore's libmpi_collective.so finds no libmpi.so.40: install Open MPI 4")
    for rank in range(2):
        assert f"rank {rank} is right" in ended.stdout, ended.stdout[-4000:]

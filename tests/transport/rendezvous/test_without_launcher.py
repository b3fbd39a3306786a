"""Processes started one by one, which meet by a URL: there is no MS_SCHED_HOST, as under mpirun. Two hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.emulator import emulator_or_skip, environment
from tests.harness.hosts import Hosts

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("url_worker.py")


@pytest.mark.msrun
def test_ranks_that_a_url_brought_together_meet() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
    env = environment(emulator_or_skip(), {**kept, "PYTHONPATH": str(ROOT), "GLOG_v": "3", "OMP_NUM_THREADS": "1"})
    with Hosts(2) as hosts:
        ranks = [
            host.start(
                [sys.executable, WORKER, host.number, len(hosts), f"tcp://{hosts[0].ipv4}:9123"],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for host in hosts
        ]
        told = [rank.communicate(timeout=120)[0] for rank in ranks]
    for rank, text in enumerate(told):
        assert f"Hccl met {rank}" in text, "\n----\n".join(each[-2000:] for each in told)

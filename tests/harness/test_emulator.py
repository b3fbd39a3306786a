"""The emulated HCCL refuses what the documentation of each product refuses, and charges and counts what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import emulator

WORKER = Path(__file__).with_name("hccl_worker.py")
OK, INTERNAL, NOT_SUPPORTED = 0, 4, 5
pytestmark = pytest.mark.ascend


def run(tmp_path: Path, world: int, **env: str) -> list[dict[str, Any]]:
    """What each rank tells."""
    prefix, messages = emulator.emulator_or_skip(), tmp_path / "messages"
    messages.mkdir()
    around = {**emulator.environment(prefix, os.environ, messages), "CANNEMU_TIMEOUT": "20", **env}
    command = [sys.executable, str(WORKER), str(tmp_path), str(world)]
    ranks = [
        subprocess.Popen(command, env={**around, "RANK_ID": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    told = []
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert rank.returncode == 0, err.decode()
        told.append(json.loads(out))
    return told


@pytest.mark.parametrize(
    ("soc", "servers", "world", "gather_v", "to_all_v"),
    [
        ("Ascend910B2", "", 3, OK, OK),
        ("Ascend910B2", "2", 4, OK, OK),
        ("Ascend910B2", "2,1", 3, NOT_SUPPORTED, OK),
        ("Ascend910_9392", "", 2, OK, OK),
        ("Ascend910_9392", "1", 2, NOT_SUPPORTED, OK),
        ("Ascend950", "1", 2, NOT_SUPPORTED, OK),
        ("Ascend310P3", "", 4, OK, OK),
        ("Ascend310P3", "", 5, NOT_SUPPORTED, NOT_SUPPORTED),
        ("Ascend910", "", 4, NOT_SUPPORTED, OK),
        ("Ascend910", "", 3, NOT_SUPPORTED, NOT_SUPPORTED),
    ],
)
def test_what_products_refuse(soc: str, servers: str, world: int, gather_v: int, to_all_v: int, tmp_path: Path) -> None:
    for told in run(tmp_path, world, CANNEMU_SOC=soc, CANNEMU_SERVERS=servers):
        assert told["init"] == OK and told["AllGather"] == OK
        assert told["gathered"] == list(range(1, world + 1))
        assert (told["AllGatherV"], told["AlltoAllV"]) == (gather_v, to_all_v)


def test_counts_and_tiers(tmp_path: Path) -> None:
    """Two servers of two: what came from the other one, and what AlltoAllV's counts would add on an A2."""
    for told in run(tmp_path, 4, CANNEMU_SERVERS="2", HCCL_BUFFSIZE="3"):
        assert told["communicator"] == 2 * 3 << 20
        assert told["counts"] == 32 * 4**2
        assert told["link"] == 3 * (3 * 4096 + 512)
        # Two AllGathers bring what the rank at the same place there has, AllGatherV and AlltoAllV come from both there.
        assert told["between"] == 2 * 4096 + 2 * 4096 + 2 * 512
        assert told["exchanged"] == [1, 2, 3, 4]


def test_the_last_rank_that_leaves_removes_the_messages_folder(tmp_path: Path) -> None:
    for told in run(tmp_path, 2, CANNEMU_DIR=str(tmp_path)):
        assert told["destroyed"] == OK
    assert not [*tmp_path.glob("cannemu-*")]


def test_types_between_servers(tmp_path: Path) -> None:
    for told in run(tmp_path, 2, CANNEMU_SERVERS="1", CANNEMU_STRICT_TYPES="1"):
        assert (told["AllGather"], told["uint8"]) == (OK, NOT_SUPPORTED)


def test_a_backend_that_returns_success_and_zeros(tmp_path: Path) -> None:
    for told in run(tmp_path, 2, CANNEMU_ZEROS="1"):
        assert told["AlltoAllV"] == OK and told["exchanged"] == [0, 0]


def test_communicators_come_first_on_a_300i(tmp_path: Path) -> None:
    for told in run(tmp_path, 2, CANNEMU_SOC="Ascend310P3", FIRST="memory"):
        assert told["init"] == INTERNAL


def test_a_communicator_takes_device_memory(tmp_path: Path) -> None:
    for told in run(tmp_path, 2, CANNEMU_HBM_MB="100"):
        assert told["init"] == INTERNAL


def test_uploads(tmp_path: Path) -> None:
    """Pinned or pageable, waited for or not; pages of a mapped file fail."""
    (told,) = run(tmp_path, 1)
    assert (told["pinned"], told["pageable"]) == (OK, OK)
    assert told["mapped"] != OK
    assert told["uploaded"] == [[8192, 0], [0, 8192]]

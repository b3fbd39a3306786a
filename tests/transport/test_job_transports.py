"""The transports of real jobs: one worker script on ranks on the CPU and on the emulated Ascend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.chosen import long_one
from tests.harness.msrun import run_msrun

WORKER = Path(__file__).parent / "transport_worker.py"
NAME = {"cpu": "Mccl", "ascend": "Hccl"}
RUNS_AHEAD = {"CANNEMU_ASYNC": "1", "CANNEMU_POISON": "1"}
IN_PAIRS = {**RUNS_AHEAD, "CANNEMU_SOC": "Ascend910"}
"""A product without an all-to-all for three ranks."""


@pytest.mark.parametrize(
    ("device", "ranks", "env"),
    [("cpu", 2, {}), ("cpu", 4, {}), ("ascend", 2, {}), ("ascend", 4, RUNS_AHEAD), ("ascend", 3, IN_PAIRS)],
    ids=["cpu-2", "cpu-4", "ascend-2", "ascend-4-async", "ascend-3-pairs"],
)
def test_every_method_moves_the_right_bytes(device: str, ranks: int, env: dict[str, str], tmp_path: Path) -> None:
    if ranks == 2:
        long_one("4 ranks find what 2 do")
    result = run_msrun(WORKER, "everything", ranks=ranks, device=device, env=env, tmp_path=tmp_path)
    for rank in range(ranks):
        assert f"{NAME[device]} CONTENT {rank}" in result.worker(rank), result.tails()


def test_a_backend_that_delivers_zeros_is_named(tmp_path: Path) -> None:
    """Every rank hears of it before its first exchange, from a test with known contents."""
    env = {"CANNEMU_ZEROS": "1", "CANNEMU_SERVERS": "1", "CANNEMU_STRICT_TYPES": "1"}
    result = run_msrun(WORKER, "zeros", ranks=2, device="ascend", env=env, tmp_path=tmp_path)
    for rank in range(2):
        assert f"Hccl CONTENT {rank}" in result.worker(rank), result.tails()


@pytest.mark.parametrize(
    ("device", "ranks", "victim", "env"),
    [("cpu", 3, 0, {}), ("ascend", 3, 2, RUNS_AHEAD)],
    ids=["cpu", "ascend"],
)
def test_survivors_of_kill_9_name_the_dead(
    device: str, ranks: int, victim: int, env: dict[str, str], tmp_path: Path
) -> None:
    if device == "cpu":
        long_one("a load on the CPU is killed in tests/live")
    result = run_msrun(
        WORKER,
        victim,
        ranks=ranks,
        device=device,
        env=env,
        tmp_path=tmp_path,
        timeout=60,
        expect_failure=True,
    )
    assert result.returncodes == tuple(-9 if rank == victim else 0 for rank in range(ranks)), result.tails()
    for rank in range(ranks):
        assert (f"{NAME[device]} CONTENT {rank}" in result.worker(rank)) == (rank != victim), result.tails()


@pytest.mark.parametrize("device", ["cpu", "ascend"])
def test_a_rank_that_comes_late_is_named_and_may_come_again(device: str, tmp_path: Path) -> None:
    if device == "ascend":
        long_one("ranks meet before the backend is called, whichever it is")
    worker, done = WORKER.with_name("late_worker.py"), tmp_path / "done"
    result = run_msrun(worker, done, ranks=2, device=device, tmp_path=tmp_path)
    for rank in range(2):
        assert f"CONTENT {rank}" in result.worker(rank), result.tails()

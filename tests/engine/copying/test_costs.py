"""What a job costs: bytes asked of the storage, number of reads, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.support.checkpoints import cut, read_file, source, strategy_of
from tests.support.machine import ReadMade, contents_read

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20


def by_the_job(reads: Sequence[ReadMade], shards: Path, before: Sequence[int] = (4096, 4096)) -> list[ReadMade]:
    """Reads of contents, after those of so many bytes each that come before the job.

    These are of the heads of two slices, see engine.unlisted.whole_slices, and of scalars, of every rank.
    """
    made = contents_read(reads, *shards.rglob("*.safetensors"))
    compared, job = made[: len(before)], made[len(before) :]
    assert [read.nbytes for read in compared] == [*before] and compared[0].path != compared[1].path
    return job


def nbytes_of(reads: Sequence[ReadMade]) -> int:
    return sum(read.nbytes for read in reads)


def test_a_merge_reads_every_byte_once(tmp_path: Path, reads: list[ReadMade]) -> None:
    """Every slice is there twice or more; each is read from one file, and the reading is spread."""
    names = ("a.w", "b.w", "c.w", "d.w")
    root = source(tmp_path / "src", names=names, rows=512)
    report = unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out")
    scalars = 4 + 4
    job = by_the_job(reads, root / "shards", (4096, 4096, *[scalars] * 4))
    assert report.bytes_read == nbytes_of(job) == 4 * 512 * 32 * 4 + scalars
    assert len({read.path for read in job}) == 4


@pytest.mark.parametrize("rank", range(4))
def test_one_rank_reads_its_own_bytes(rank: int, tmp_path: Path, reads: list[ReadMade]) -> None:
    """Rows, columns and both, from wide rows: what lies between is not read."""
    full = {name: np.random.default_rng(n).standard_normal((8, 16384), np.float32) for n, name in enumerate("rcb")}
    trained = strategy_of({n: Layout((2, 2), ((0,), ())) for n in full}, tmp_path / "s.ckpt")
    cut(trained, full, tmp_path / "shards")
    maps = {"r": ((1,), ()), "c": ((), (0,)), "b": ((1,), (0,))}
    predicted = strategy_of({n: Layout((2, 2), m) for n, m in maps.items()}, tmp_path / "t.ckpt")
    load_distributed_checkpoint(
        None, None, predicted, tmp_path / "s.ckpt", format="safetensors", unified_safetensors_dir=tmp_path / "shards",
        dst_safetensors_dir=tmp_path / "out", rank_id=rank,
    )  # fmt: skip
    written = read_file(tmp_path / f"out/rank_{rank}/net.safetensors")
    assert nbytes_of(by_the_job(reads, tmp_path / "shards")) == sum(len(tensor.data) for tensor in written.values())
    for name, tensor in written.items():
        layout = predicted.layout(name, rank)
        assert layout is not None
        assert tensor.data == full[name][layout.region(rank, (8, 16384)).slices].tobytes()


def test_all_ranks_share_what_they_read(tmp_path: Path, reads: list[ReadMade]) -> None:
    """Every byte of the source is wanted by three ranks and read once."""
    full = {"w": np.random.default_rng(1).standard_normal((64, 4096), np.float32)}
    cut(strategy_of({"w": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt"), full, tmp_path / "shards")
    predicted = strategy_of({"w": Layout((3, 2), ((), (0,)))}, tmp_path / "t.ckpt")
    load_distributed_checkpoint(
        None, None, predicted, tmp_path / "s.ckpt", format="safetensors", unified_safetensors_dir=tmp_path / "shards",
        dst_safetensors_dir=tmp_path / "out",
    )  # fmt: skip
    assert nbytes_of(by_the_job(reads, tmp_path / "shards")) == full["w"].nbytes


def test_small_slices_are_read_in_few_calls(tmp_path: Path, reads: list[ReadMade]) -> None:
    names = tuple(f"p{n:03}" for n in range(300))
    root = source(tmp_path / "src", names=names, rows=4)
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out", max_process_num=1)
    assert len(by_the_job(reads, root / "shards", (128, 128, *[4] * 8))) < 100


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One parameter of 200 MiB, cut by columns over four ranks, and merged."""
    root = tmp_path_factory.mktemp("big")
    strategy = strategy_of({"w": Layout((4,), ((), (0,)))}, root / "s.ckpt")
    for rank in range(strategy.world):
        (root / "shards" / f"rank_{rank}").mkdir(parents=True)
        part = np.full((51200, 256), rank + 1, np.float32)
        save_file({"w": part}, root / "shards" / f"rank_{rank}" / "net.safetensors")
    (root / "merged").mkdir()
    save_file({"w": np.ones((51200, 1024), np.float32)}, root / "merged" / "model.safetensors")
    return root


JOBS = {
    "merge of columns": ("merge", "shards", "s.ckpt", Layout((1,), ((), ())), ""),
    "columns to rows": ("recut", "shards", "s.ckpt", Layout((4,), ((0,), ())), ""),
    "columns to finer columns": ("recut", "shards", "s.ckpt", Layout((16,), ((), (0,))), ""),
    "whole to narrow columns, one rank": ("recut", "merged", "", Layout((64,), ((), (0,))), "3"),
}


@pytest.mark.parametrize("job", JOBS)
def test_memory_does_not_grow_with_a_parameter(job: str, big: Path, tmp_path: Path) -> None:
    verb, shards, strategy, layout, rank = JOBS[job]
    strategy_of({"w": layout}, tmp_path / "t.ckpt")
    arguments = [verb, big / shards, big / strategy if strategy else "", tmp_path / "out", tmp_path / "t.ckpt", rank]
    command = [sys.executable, "-m", "tests.engine.copying.memory_child", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["grown"] < 100 * MIB, f"grew by {told['grown'] / MIB:.0f} MiB"
    assert told["read"] <= 200 * MIB * 1.05

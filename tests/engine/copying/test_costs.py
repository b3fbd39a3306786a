"""What a job costs: bytes asked of the storage, number of reads, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.source import catalog
from ms_ckpt_ext.storage.reader import ReadCount, ReaderPool
from tests.support.checkpoints import cut, read_file, source, strategy_of

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[ReadCount]:
    """What every pool of readers was asked for; the last one is the job's."""
    made: list[ReadCount] = []

    class Counting(ReaderPool):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self.count)

    monkeypatch.setattr(catalog, "ReaderPool", Counting)
    return made


def test_a_merge_reads_every_byte_once(tmp_path: Path, counts: list[ReadCount]) -> None:
    """Every slice is there twice or more; each is read from one file, and the reading is spread."""
    names = ("a.w", "b.w", "c.w", "d.w")
    root = source(tmp_path / "src", names=names, rows=512)
    report = unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out")
    scalars = 4 + 4
    assert report.bytes_read == counts[-1].nbytes == 4 * 512 * 32 * 4 + scalars
    assert len(counts[-1].files) == 4
    heads = counts[
        0
    ]  # of two slices, which show that they are no copies of the whole: see engine.unlisted.whole_slices
    assert (heads.reads, heads.nbytes, len(heads.files)) == (2, 2 * 4096, 2)


@pytest.mark.parametrize("rank", range(4))
def test_one_rank_reads_its_own_bytes(rank: int, tmp_path: Path, counts: list[ReadCount]) -> None:
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
    assert counts[-1].nbytes == sum(len(tensor.data) for tensor in written.values())
    for name, tensor in written.items():
        layout = predicted.layout(name, rank)
        assert layout is not None
        assert tensor.data == full[name][layout.region(rank, (8, 16384)).slices].tobytes()


def test_all_ranks_share_what_they_read(tmp_path: Path, counts: list[ReadCount]) -> None:
    """Every byte of the source is wanted by three ranks and read once."""
    full = {"w": np.random.default_rng(1).standard_normal((64, 4096), np.float32)}
    cut(strategy_of({"w": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt"), full, tmp_path / "shards")
    predicted = strategy_of({"w": Layout((3, 2), ((), (0,)))}, tmp_path / "t.ckpt")
    load_distributed_checkpoint(
        None, None, predicted, tmp_path / "s.ckpt", format="safetensors", unified_safetensors_dir=tmp_path / "shards",
        dst_safetensors_dir=tmp_path / "out",
    )  # fmt: skip
    assert counts[-1].nbytes == full["w"].nbytes


def test_small_slices_are_read_in_few_calls(tmp_path: Path, counts: list[ReadCount]) -> None:
    names = tuple(f"p{n:03}" for n in range(300))
    root = source(tmp_path / "src", names=names, rows=4)
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out", max_process_num=1)
    assert counts[-1].reads < 100


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

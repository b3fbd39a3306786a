"""Many small similar tensors: few reads, few copies, and what is alike is planned once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid
from ms_ckpt_ext.core.exchange.plan import decide, plan_of
from ms_ckpt_ext.core.geometry.arrangement import arrangement
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strided import strided_copy
from ms_ckpt_ext.core.geometry.view import frames
from ms_ckpt_ext.core.planning.io_units import Batch, Extent, Limits
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.files.job import tasks_of
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.files.reshard import recut_job
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.formats.strategies.file import save_strategy
from ms_ckpt_ext.rules import Experts, invert
from tests.core.planning.test_weight_rules import strategy
from tests.support.quantised import Tensor, save

LAYERS, EXPERTS = 6, 40
RULES = [
    Experts(["l.{layer}.e.{n}.gate", "l.{layer}.e.{n}.up"], "t.{layer}.w1", merge=False),
    Experts(["l.{layer}.e.{n}.down"], "t.{layer}.w2", merge=False),
]
TARGET = strategy(
    {f"t.{layer}.w1": Layout((4,), ((), (), (0,))) for layer in range(LAYERS)}
    | {f"t.{layer}.w2": Layout((4,), ((), (0,), ())) for layer in range(LAYERS)}
)


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    held = {
        f"l.{layer}.e.{n}.{kind}": rng.integers(0, 1 << 16, (4, 8) if kind == "down" else (8, 4)).astype("<u2")
        for layer in range(LAYERS)
        for n in range(EXPERTS)
        for kind in ("gate", "up", "down")
    }
    save({name: Tensor("BF16", array) for name, array in held.items()}, tmp_path / "in/model.safetensors")
    return held


def test_stacked_experts_are_right_and_few_copies(experts: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_strategy(TARGET, tmp_path / "s.ckpt")
    ms_ckpt_ext.reshard(tmp_path / "in", tmp_path / "out", to_strategy=tmp_path / "s.ckpt", rules=RULES)
    for rank in range(4):
        (file,) = (tmp_path / f"out/rank_{rank}").glob("*.safetensors")
        raw = {n: a.view(np.uint16) for n, a in load_file_as_bits(file).items()}
        for layer in range(LAYERS):
            pairs = [
                np.concatenate([experts[f"l.{layer}.e.{n}.{kind}"] for kind in ("gate", "up")]).T
                for n in range(EXPERTS)
            ]
            assert np.array_equal(raw[f"t.{layer}.w1"], np.stack(pairs)[:, :, 4 * rank : 4 * rank + 4])
            down = np.stack([experts[f"l.{layer}.e.{n}.down"].T for n in range(EXPERTS)])
            assert np.array_equal(raw[f"t.{layer}.w2"], down[:, 2 * rank : 2 * rank + 2])
    catalog = open_catalog(str(tmp_path / "in"), None).ruled(RULES)
    job = recut_job(catalog, TARGET, range(4), lambda rank: f"r{rank}.safetensors")
    units = list(schedule(tasks_of(job.outputs), catalog.stored, Limits()))
    batches = [unit for unit in units if isinstance(unit, Batch)]
    assert len(units) == len(batches) == 1
    reads = batches[0].reads
    assert len(reads) == 1 and sum(read.nbytes for read in reads) == sum(array.nbytes for array in experts.values())
    pieces = 4 * LAYERS * EXPERTS * 2  # of gate or up, and of down, for every rank
    assert sum(copy.nbytes for read in reads for _, copy in read.copies) == reads[0].nbytes
    assert sum(len(read.copies) for read in reads) == pieces // EXPERTS


def load_file_as_bits(file: Path) -> dict[str, np.ndarray]:
    """BF16 as bits, which numpy lacks."""
    from tests.support.checkpoints import read_file

    return {n: np.frombuffer(t.data, "<u2").reshape(t.shape) for n, t in read_file(file).items()}


def test_what_is_alike_is_worked_out_once(experts: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Frames and copies are those of one layer, however many there are."""
    arrangement.cache_clear()
    before = [frames.cache_info().misses, strided_copy.cache_info().misses]
    catalog = open_catalog(str(tmp_path / "in"), None).ruled(RULES)
    job = recut_job(catalog, TARGET, range(4), lambda rank: f"r{rank}.safetensors")
    assert list(schedule(tasks_of(job.outputs), catalog.stored, Limits()))
    after = [frames.cache_info().misses, strided_copy.cache_info().misses]
    assert after[0] - before[0] <= 4 * 2
    assert after[1] - before[1] <= 4 * 2 * EXPERTS


def test_many_tensors_come_with_one_read(experts: dict[str, np.ndarray], tmp_path: Path) -> None:
    catalog = open_catalog(str(tmp_path / "in"), None)
    job = merge_job(catalog, str(tmp_path / "out"), MergeOptions())
    units = list(schedule(tasks_of(job.outputs), catalog.stored, Limits()))
    assert [len(unit.reads) for unit in units if isinstance(unit, Batch)] == [1]
    report = ms_ckpt_ext.merge(tmp_path / "in", tmp_path / "out")
    assert report.reads == 1


def test_parts_of_one_row_share_their_deliveries() -> None:
    """A plan of many parameters that are alike holds what ranks want of one of them once."""
    grid = Grid((4, 1), {(cell, 0): (cell, cell + 4) for cell in range(4)})
    names = [f"w.{n}" for n in range(200)]
    demands = [Demand(n, stored_whole(TensorMeta(n, DTYPES["F32"], (8, 8)), (0,)), (grid,)) for n in names]
    where = {name: Extent(256 * number, 256) for number, name in enumerate(names)}
    plan = plan_of(decide(demands, 8, lambda _, name: (where[name],), ExchangeLimits()))
    assert len(plan.parts) == 200 and len({id(part.deliveries) for part in plan.parts}) == 1
    assert plan.bytes_wanted() == [200 * 64] * 8
    readers = [plan.chunks[part.chunk].reader for part in plan.parts]
    own = [64 * readers.count(rank) for rank in range(8)]
    assert plan.bytes_received() == [200 * 64 - mine for mine in own]


def test_what_was_fused_is_read_once_on_the_way_out(experts: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Gate and up of an expert come with one read, though the first of them is enough for a batch."""
    fused = [Experts(RULES[0].sources, RULES[0].target, merge=False, shares=(1, 1)), RULES[1]]
    ms_ckpt_ext.reshard(tmp_path / "in", tmp_path / "out", rules=fused)
    catalog = open_catalog(str(tmp_path / "out"), None).ruled(invert(fused))
    job = merge_job(catalog, str(tmp_path / "back"), MergeOptions())
    one = experts["l.0.e.0.gate"].nbytes
    batches = [u for u in schedule(tasks_of(job.outputs), catalog.stored, Limits(tile=2 * one)) if isinstance(u, Batch)]
    assert len(batches) == 2 * LAYERS * EXPERTS and max(batch.nbytes for batch in batches) == 2 * one
    assert sum(read.nbytes for batch in batches for read in batch.reads) == sum(a.nbytes for a in experts.values())

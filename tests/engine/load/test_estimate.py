"""What is predicted is what happens: dry runs against loads by ranks as threads, over real files."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext import plan
from ms_ckpt_ext.core.exchange.demand import Ways
from ms_ckpt_ext.core.exchange.one_rank import rank_round
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, decide, plan_of
from ms_ckpt_ext.core.exchange.totals import RankTotals
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.pieces import TensorMeta
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.files.reshard import rank_boxes
from ms_ckpt_ext.engine.load import estimate
from ms_ckpt_ext.engine.load.estimate import DryRun, dry_run
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.slabs import HostMover
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import LayoutMismatchError, StrategyError, UsageError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.sink import MemorySink
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.loads import Load, Loaded, golden_load
from tests.support.outside import Content, Source, listed, slices, source, whole
from tests.support.strategies import pairs

# To 8 and 24 ranks, from more, fewer and as many; stages, optimizer shards, replicas, one merged file.
LIVE = [
    ("dp2_tp4", "dp2_tp4"),
    ("tp4_pp2", "dp3_tp8"),
    ("dp8_zero", "dp3_tp8"),
    ("dp3_tp8", "dp2_tp4_zero"),
    ("dp2_tp2_pp2_zero", "dp3_tp8"),
    ("dp4_tp2_zero2", "dp2_tp2_pp2_zero"),
    ("full", "dp2_tp4"),
]


class WatchedMover(HostMover):
    """Notes how many bytes of slabs it has given away at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def host(self, nbytes: int) -> np.ndarray:
        self.held += nbytes
        self.most = max(self.most, self.held)
        return super().host(nbytes)

    def release(self, staged: np.ndarray) -> None:
        self.held -= len(staged)
        super().release(staged)


class Watched(Load):
    """A load that notes its staging buffers and the slabs it holds at once."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.buffers: dict[int, int] = {}
        self.movers: dict[int, WatchedMover] = {}

    def mover(self, rank: int) -> WatchedMover:
        return self.movers.setdefault(rank, WatchedMover())

    @property
    def staging(self) -> list[int]:
        """Bytes of both, of every rank."""
        return [self.buffers.get(rank, 0) + self.movers[rank].most for rank in range(len(self.movers))]

    def rank(self, transport: LocalTransport) -> Loaded:
        allocate = transport.allocate

        def noted(nbytes: int) -> Any:
            self.buffers[transport.rank] = self.buffers.get(transport.rank, 0) + nbytes
            return allocate(nbytes)

        transport.allocate = noted  # type: ignore[method-assign]
        return super().rank(transport)


def predict(load: Load) -> DryRun:
    """The dry run of a load."""
    catalog = open_catalog(str(load.source), load.trained)
    return dry_run(estimate.of_catalog(catalog), load.target, load.options, ways=Ways(groups=True))


@pytest.mark.parametrize(("bucket", "prefetch"), [(1 << 20, 1), (16384, 2)])
@pytest.mark.parametrize(("source", "target"), LIVE)
def test_counts_equal_those_of_a_load(source: str, target: str, bucket: int, prefetch: int, golden: Path) -> None:
    trained = None if source == "full" else load_strategy(golden / source / "strategy.ckpt")
    shards = golden / source / ("" if trained is None else "shards")
    strategy = load_strategy(golden / target / "strategy.ckpt")
    load = Watched(shards, trained, strategy, bucket_bytes=bucket, prefetch=prefetch)
    loaded, predicted = load.run(), predict(load)
    tally = predicted.tally
    assert tuple(predicted.table.demands) == loaded[0].prepared.demands
    assert tally.read.tolist() == [rank.report.reads.nbytes for rank in loaded]
    assert tally.reads.tolist() == [rank.report.reads.reads for rank in loaded]
    assert tally.received.tolist() == [rank.report.bytes_received for rank in loaded]
    assert tally.wanted.tolist() == [sum(map(len, rank.contents.values())) for rank in loaded]
    assert {len(tally.rounds)} == {rank.report.rounds for rank in loaded}
    assert predicted.direct.counted == len(loaded)
    assert predicted.direct.nbytes.tolist() == [read_directly(load, rank) for rank in range(len(loaded))]
    assert tally.staging.tolist() == load.staging
    assert_blocks(tally, loaded[0].plan)


def read_directly(load: Load, rank: int) -> int:
    """Bytes that the storage is asked for when a rank takes its slices in direct mode."""
    catalog = open_catalog(str(load.source), load.trained)
    boxes = [(tensor, box) for _, tensor, box in rank_boxes(catalog, load.target, rank) if box]
    sizes = [tensor.meta.dtype.nbytes(box.size) for tensor, box in boxes]
    targets = [Target(box, (Landing(n, (Extent(0, sizes[n]),)),)) for n, (_, box) in enumerate(boxes)]
    tasks = [Task(tensor, (target,)) for (tensor, _), target in zip(boxes, targets)]
    sinks = [MemorySink(np.zeros(size, np.uint8)) for size in sizes]
    with catalog.readers() as readers:
        worker.run(schedule(tasks, catalog.stored, Limits()), readers, sinks, 1, lambda *_: None)
    return readers.count.nbytes


def assert_blocks(tally: RankTotals, plan: ExchangePlan) -> None:
    """Messages, by the byte layout of the collectives."""
    sent = np.zeros((plan.world, 2), int)
    for each in plan.rounds:
        for rank in range(plan.world):
            turn = rank_round(plan, each, rank)
            assert turn.send_counts[rank] == 0
            sent[rank] += [sum(map(bool, turn.send_counts)), sum(len(g.ranks) - 1 for g in turn.gathers)]
    assert tally.messages.tolist() == sent.sum(1).tolist()
    assert tally.matrix.sum() == tally.sent.sum() == tally.received.sum() == sum(plan.bytes_received())
    assert sum(r.moved for r in tally.rounds) == tally.sent.sum()
    assert sum(r.read for r in tally.rounds) == tally.read.sum()


def strategy_of(layouts: Sequence[Optional[Layout]], stages: Sequence[int], origin: str = "s") -> Strategy:
    return Strategy.from_items(
        [LayoutItem(f"w{n}", s, la) for n, (la, s) in enumerate(zip(layouts, stages)) if la], origin
    )


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], max_examples=60, deadline=None)
@given(pairs(16), st.sampled_from(["F32", "BF16", "U8"]), st.sampled_from([4096, 1 << 16]), st.integers(1, 4))
def test_tallies_equal_the_plans_own_sums(
    case: tuple[Layout, Layout, tuple[int, ...]], dtype: str, bucket: int, count: int
) -> None:
    """Any two layouts, from shapes alone: the columns and the objects made of them say the same."""
    a, b, shape = case
    if prod(shape) > 50_000:
        return
    metas = [TensorMeta(f"w{n}", DTYPES[dtype], shape) for n in range(count)]
    source = estimate.of_shapes(metas, strategy_of([a] * count, [0] * count))
    target = strategy_of([b] * count, [0] * count)
    done = dry_run(source, target, LoadOptions(bucket_bytes=bucket))
    plan = plan_of(decide(done.table.demands, b.devices, source.located, done.limits))
    assert done.tally.read.tolist() == plan.bytes_read()
    assert done.tally.received.tolist() == plan.bytes_received()
    assert done.tally.wanted.tolist() == [prod(b.slice_shape(shape)) * DTYPES[dtype].bits // 8 * count] * b.devices
    assert done.tally.read.sum() == prod(shape) * DTYPES[dtype].bits // 8 * count
    assert len(done.tally.rounds) == len(plan.rounds)
    turns = [[rank_round(plan, each, rank) for rank in range(plan.world)] for each in plan.rounds]
    sent = [sum(sum(map(bool, t[rank].send_counts)) for t in turns) for rank in range(plan.world)]
    gives = [sum(len(g.ranks) - 1 for t in turns for g in t[rank].gathers) for rank in range(plan.world)]
    assert done.tally.messages.tolist() == [s + g for s, g in zip(sent, gives)]


def test_shapes_and_headers_give_the_same_totals(golden: Path) -> None:
    """A checkpoint that was saved and one that is only described, where the files are laid out alike."""
    load = golden_load(golden, "dp2_tp4_zero", "dp2_tp2")
    assert load.trained is not None
    catalog = open_catalog(str(load.source), load.trained)
    metas = [tensor.meta for tensor in catalog.tensors.values()]
    from_headers = predict(load)
    from_shapes = dry_run(estimate.of_shapes(metas, load.trained), load.target, load.options)
    for name in ("wanted", "read"):
        columns = [getattr(run.tally, name) for run in (from_headers, from_shapes)]
        assert columns[0].sum() == columns[1].sum()
    assert from_shapes.tally.wanted.tolist() == from_headers.tally.wanted.tolist()


def test_scalars_go_to_every_rank(golden: Path) -> None:
    formats = golden / "formats_dp2_tp4"
    load = Load(
        formats / "dedup",
        load_strategy(formats / "strategy.ckpt"),
        load_strategy(golden / "dp2_tp2_pp2_zero/strategy.ckpt"),
    )
    loaded, predicted = load.run(), predict(load)
    assert predicted.tally.read.tolist() == [rank.report.reads.nbytes for rank in loaded]
    assert predicted.tally.received.tolist() == [rank.report.bytes_received for rank in loaded]
    assert [len(rank.contents) > 7 for rank in loaded] == [True] * 8


def layered(dp: int, tp: int, pp: int, layers: int, zero: bool) -> tuple[list[TensorMeta], Strategy]:
    """Layers of four weights and their Adam states."""
    shard = (1, -1) if zero else (0, 0)
    column, row = Layout((dp, tp), ((0,), ()), *shard), Layout((dp, tp), ((), (0,)), *shard)
    kinds = (("up", (8192, 1024), column), ("down", (1024, 8192), row), ("norm", (1024,), Layout((dp, tp), ((),))))
    named = [
        (f"{state}{n}.{name}", n * pp // layers, shape, layout)
        for n in range(layers)
        for name, shape, layout in kinds
        for state in ("", "adam_m.", "adam_v.")
    ]
    items = [LayoutItem(name, stage, layout) for name, stage, _, layout in named]
    metas = [TensorMeta(name, DTYPES["F32"], shape) for name, _, shape, _ in named]
    return metas, Strategy.from_items(items, "layers")


def test_thousands_of_ranks() -> None:
    """Invariants at a size that no machine here can run: every byte is read once, evenly, within the memory allowed."""
    metas, trained = layered(64, 8, 4, 32, True)
    _, target = layered(128, 4, 4, 32, True)
    done = dry_run(estimate.of_shapes(metas, trained), target, LoadOptions())
    tally = done.tally
    total = sum(meta.dtype.nbytes(prod(meta.shape)) for meta in metas)
    assert (len(tally.read), tally.read.sum()) == (2048, total)
    assert tally.read.max() <= 1.05 * tally.read.mean()
    assert tally.received.max() <= tally.wanted.max()
    assert tally.staging.max() <= 2 * done.limits.bucket == 128 << 20
    assert tally.matrix.shape == (64, 64) and tally.group == 32
    stage = tally.matrix.reshape(4, 16, 4, 16).sum((1, 3))
    assert (stage == np.diag(np.diag(stage))).all(), "pipeline stages keep their bytes to themselves"


def test_what_does_not_fit_is_told() -> None:
    metas, trained = layered(2, 2, 1, 1, False)
    other = [TensorMeta(f"other.{meta.name}", meta.dtype, meta.shape) for meta in metas]
    with pytest.raises(UsageError, match="lists none of the 9 parameters"):
        estimate.of_shapes(other, trained)
    with pytest.raises(LayoutMismatchError, match=r"'0\.up': axis 0 of shape \[3, 1024\] cannot be cut"):
        estimate.of_shapes([metas[0]._replace(shape=(3, 1024))], trained)
    with pytest.raises(StrategyError, match="no parameter of the checkpoint"):
        estimate.demands_under(estimate.of_shapes(other, None), trained)


def test_last_rounds_may_begin_no_chunk() -> None:
    """A chunk is read once and may be sent in several rounds, so the last round may have nothing to read."""
    metas = [TensorMeta("w0", DTYPES["F32"], (1024,)), TensorMeta("w1", DTYPES["F32"], (1024,))]
    everywhere = strategy_of([Layout((8, 2), ((0,),))] * 2, [0, 0])
    done = dry_run(estimate.of_shapes(metas, None), everywhere, LoadOptions(bucket_bytes=4096))
    assert done.tally.rounds[-1].read == 0
    assert sum(r.read for r in done.tally.rounds) == done.tally.read.sum() == 8192


def outside(root: Path, ranks: int = 4) -> Source:
    """A frozen matrix that is cut and not listed, a state of each rank's own, and what is alike."""
    frozen = np.arange(48_000, dtype=np.float32).reshape(8, 6000)
    held: dict[str, Content] = {
        "frozen": slices(Layout((2, 2), ((0,), ())), frozen, ranks),
        "seed": lambda rank: np.array(rank, np.int64),
        "ragged": lambda rank: np.ones((rank + 1, 3), np.float32),
        "shared": np.ones((50, 50), np.float32),
    }
    return source(root, listed(ranks, matrices=[(2, 2)]), held)


def test_what_ranks_have_of_their_own_is_planned_as_their_own(tmp_path: Path) -> None:
    made = outside(tmp_path / "src")
    strategy = load_strategy(str(made.strategy))
    done = dry_run(estimate.of_catalog(made.catalog(), strategy), strategy, LoadOptions())
    own, everybodys, listed_ = 4 * 6000 * 4 + 8, 50 * 50 * 4, whole("w0.0").nbytes // 2
    assert done.tally.wanted.tolist() == [own + everybodys + listed_ + 12 * (rank + 1) for rank in range(4)]


def test_other_ranks_are_refused_by_name_unless_it_is_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = outside(tmp_path / "src")
    strategy = load_strategy(str(made.strategy))
    with pytest.raises(LayoutMismatchError, match="'frozen'.*no rank of another job"):
        plan(made.shards, listed(2), src_strategy=strategy)
    plan(made.shards, listed(2), src_strategy=strategy, choice_func=lambda name: name != "frozen")
    assert any("'ragged', 'seed'" in message for message in caplog.messages)

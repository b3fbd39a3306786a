"""Bytes between servers: predicted, counted, and no more than must cross."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ms_ckpt_ext import plan
from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Ways
from ms_ckpt_ext.core.exchange.totals import RankTotals
from ms_ckpt_ext.core.geometry.layout import Layout, cell_region
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.load import estimate
from ms_ckpt_ext.engine.load.estimate import DryRun, dry_run
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import ArgumentTypeError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.counting import Counts, counted
from tests.support.loads import Load, Loaded, assert_shards, wide_source
from tests.support.played import Call, hops_of

SLOW_BETWEEN = Hardware(1e9, True, 8, 1e9, 1e-6, between=1e6)
FAST_BETWEEN = Hardware(1e9, True, 8, 1e6, 1.0, between=1e12)


class Counted(NamedTuple):
    """What a load's ranks handed to their transports for others."""

    inside: list[int]
    between: list[int]
    messages: list[int]
    loaded: list[Loaded]


class OnServers(Load):
    """Ranks that lie on servers of `size`; all see all files. What each hands to every other is counted."""

    def __init__(self, *arguments: Any, size: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.size, self.counts = size, dict[int, Counts]()
        self.calls: dict[int, list[Call]] = {}

    def host(self, rank: int) -> str:
        return f"server {rank // self.size}"

    def rank(self, transport: LocalTransport) -> Loaded:
        self.counts[transport.rank] = counted(transport)
        gather, calls = transport.start_all_gather, self.calls.setdefault(transport.rank, [])

        def recorded(send: Any, nbytes: int, recv: Any, group: tuple[int, ...] = ()) -> Any:
            calls.append(Call(group or tuple(range(transport.size)), nbytes))
            return gather(send, nbytes, recv, group)

        transport.start_all_gather = recorded  # type: ignore[method-assign]
        return super().rank(transport)

    def counted(self) -> Counted:
        loaded = self.run()
        wire = np.zeros((len(loaded), len(loaded)), np.int64)
        for rank, counts in self.counts.items():
            for peer, nbytes in counts.given.items():
                wire[rank, peer] += nbytes
        for rank, calls in self.calls.items():
            for call in calls:  # counted so far as if sent directly to everyone; HCCL sends it in steps
                wire[rank, [peer for peer in call.ranks if peer != rank]] -= call.nbytes
                for sender, receiver, nbytes in (
                    hops_of(call, lambda r: r // self.size) if rank == call.ranks[0] else ()
                ):
                    wire[sender, receiver] += nbytes
        server = np.arange(len(loaded)) // self.size
        near = server[:, None] == server
        columns = (wire * near).sum(1).tolist(), (wire * ~near).sum(1).tolist()
        return Counted(*columns, [self.counts[rank].messages for rank in range(len(loaded))], loaded)

    def predicted(self, hardware: Hardware) -> DryRun:
        catalog = open_catalog(str(self.source), self.trained)
        source = estimate.of_catalog(catalog)
        ways = Ways(groups=True, servers=tuple(rank // self.size for rank in range(self.target.world)))
        return dry_run(source, self.target, self.options, hardware, ways)


def assert_predicted(made: Counted, tally_: RankTotals) -> None:
    assert tally_.inside.tolist() == made.inside
    assert tally_.between.tolist() == made.between
    assert tally_.messages.tolist() == made.messages
    assert tally_.crossing.sum() == sum(made.between)
    assert sum(each.between for each in tally_.rounds) == sum(made.between)
    assert tally_.received.tolist() == [rank.report.bytes_received for rank in made.loaded]
    assert tally_.read.tolist() == [rank.report.reads.nbytes for rank in made.loaded]


@pytest.mark.parametrize("hardware", [SLOW_BETWEEN, FAST_BETWEEN], ids=["slow", "fast"])
@pytest.mark.parametrize(
    ("source", "target", "size"),
    [
        ("dp2_tp4", "dp2_tp4", 2),
        ("dp2_tp4_zero", "dp4_tp2_zero2", 4),
        ("tp4", "dp3_tp8", 8),
        ("full", "dp2_tp2_pp2_zero", 3),
    ],
)
def test_predicted_is_counted(source: str, target: str, size: int, hardware: Hardware, golden: Path) -> None:
    """Per rank and tier, at 8 and 24 ranks, also where the last server has fewer."""
    trained = None if source == "full" else load_strategy(golden / source / "strategy.ckpt")
    shards = golden / source / ("" if trained is None else "shards")
    load = OnServers(
        shards,
        trained,
        load_strategy(golden / target / "strategy.ckpt"),
        size=size,
        hardware=hardware,
        bucket_bytes=1 << 16,
    )
    made, done = load.counted(), load.predicted(hardware)
    assert_shards(made.loaded, golden / target / "shards")
    assert bool(made.loaded[0].plan.servers) == done.table.ways.tiered
    assert_predicted(made, done.tally)


@pytest.mark.parametrize(("ranks", "size"), [(8, 4), (16, 8), (16, 4)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spread", [False, True], ids=["dp inside", "dp over servers"])
def test_what_a_server_wants_crosses_to_it_once(ranks: int, size: int, axis: int, spread: bool, tmp_path: Path) -> None:
    """Data parallel: at most 1.1 times the distinct bytes that a server wants come to it from others."""
    devices, inner = ((ranks // 2, 2), 0) if spread else ((ranks // 4, 4), 1)
    target = Layout(devices, ((inner,), ()) if axis == 0 else ((), (inner,)))
    made = wide_source(tmp_path, Layout((2, 4), ((0,), ())), target)
    load = OnServers(made.source, made.trained, made.target, size=size, hardware=SLOW_BETWEEN, bucket_bytes=1 << 20)
    counted, done = load.counted(), load.predicted(SLOW_BETWEEN)
    assert_shards(counted.loaded, tmp_path / "expected")
    assert_predicted(counted, done.tally)
    assert done.table.ways.tiered == (axis == 1), "gathers of whole rows cross once by themselves"
    distinct = distinct_wanted(load.target, load.host, {f"w{n}": (512, 512) for n in range(4)})
    for server, nbytes in enumerate(done.tally.crossing.tolist()):
        assert nbytes <= 1.1 * distinct[f"server {server}"]
    assert not spread or done.tally.crossing.sum() > 0


def distinct_wanted(target: Strategy, host: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes of float32 that the ranks of every host want, each counted once."""
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        layout = target.layout(name, 0)
        assert layout is not None
        for place in {host(rank) for rank in range(target.world)}:
            cells = {layout.cells[rank] for rank in range(target.world) if host(rank) == place}
            nbytes = sum(4 * cell_region(cell, layout.parts, shape).size for cell in cells)
            found[place] = found.get(place, 0) + nbytes
    return found


def strategy_of(layout: Layout, count: int) -> Strategy:
    return Strategy.from_items([LayoutItem(f"w{n}", 0, layout) for n in range(count)], "s")


def test_the_report_tells_the_way(tmp_path: Path) -> None:
    shapes = {f"w{n}": {"dtype": "F32", "shape": [2048, 4096]} for n in range(8)}
    target = strategy_of(Layout((4, 4), ((), (0,))), 8)
    report = plan(None, target, shapes=shapes, hardware=["atlas-800t-a2"], html=tmp_path / "plan.html")
    assert (report.servers, report.ranks, report.way) == (2, 16, "tiered")
    found = report.to_dict()
    assert found["cooperative"]["between"]["total"] == found["crossing"]["total"] > 0
    assert found["crossing"]["most"] <= 1.1 * 2048 * 4096 * 4 * 8
    one = plan(None, target, shapes=shapes, hardware=["atlas-a3"])
    assert (one.servers, one.way, one.crossing.total) == (1, "flat", 0)


THOUSAND = [f"{state}layers.{n}.{name}" for n in range(8) for name in ("up", "down") for state in ("", "adam_m.")]


def test_few_rounds_without_optimizer_sharding() -> None:
    """Every byte wanted by 128 of 1,024 ranks, 17 GB a rank: few rounds, and most of a device stays free."""
    cut = Layout((128, 8), ((0,), ()))
    sharded = Layout((128, 8), ((0,), ()), 1, -1)
    trained, target = (
        Strategy.from_items([LayoutItem(name, 0, layout) for name in THOUSAND], "t") for layout in (sharded, cut)
    )
    shapes = {name: {"dtype": "F32", "shape": [1 << 17, 8192]} for name in THOUSAND}
    report = plan(None, target, src_strategy=trained, shapes=shapes, hardware=["atlas-800t-a2"])
    assert len(report.rounds) <= 120
    assert report.cooperative["received"].most > 16e9
    assert report.cooperative["staging"].most <= 2 * report.bucket < 2 << 30


def test_a_job_without_groups_is_planned_as_one() -> None:
    """Each replica is sent a copy: more messages, and no gathers."""
    shapes = {f"w{n}": {"dtype": "F32", "shape": [1 << 15, 8192]} for n in range(4)}
    target = strategy_of(Layout((8, 2), ((0,), ())), 4)
    found = [plan(None, target, shapes=shapes, hardware=["atlas-800t-a2"], groups=groups) for groups in (True, False)]
    assert [report.groups for report in found] == [2, 0]
    assert found[0].cooperative["received"].total == found[1].cooperative["received"].total
    assert found[0].crossing.total <= found[1].crossing.total
    with pytest.raises(ArgumentTypeError, match="groups"):
        plan(None, target, shapes=shapes, groups="no")  # type: ignore[arg-type]

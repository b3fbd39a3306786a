"""Bytes between servers: predicted, counted, and no more than must cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext import plan
from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Sees, Ways
from ms_ckpt_ext.core.exchange.one_rank import rank_round
from ms_ckpt_ext.core.exchange.plan import decide, plan_of
from ms_ckpt_ext.core.exchange.tiers import broadcast_crossing, gather_crossing, teams_of, turns
from ms_ckpt_ext.core.exchange.totals import RankTotals, tally
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout, cell_region
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.planning.pieces import TensorMeta
from ms_ckpt_ext.engine.load import estimate
from ms_ckpt_ext.engine.load.estimate import DryRun, dry_run
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import ArgumentTypeError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.loads import Load, Loaded, assert_shards, wide_source
from tests.support.strategies import pairs

SLOW_BETWEEN = Hardware(1e9, True, 8, 1e9, 1e-6, between=1e6)
FAST_BETWEEN = Hardware(1e9, True, 8, 1e6, 1.0, between=1e12)


class Counted(NamedTuple):
    """What a load's ranks handed to their transports for others."""

    inside: list[int]
    between: list[int]
    messages: list[int]
    loaded: list[Loaded]


class Call(NamedTuple):
    """A call of a group: bytes of a share, or of what `root` broadcasts."""

    ranks: tuple[int, ...]
    nbytes: int
    root: Optional[int] = None


def hops_of(call: Call, server: Callable[[int], int]) -> list[tuple[int, int, int]]:
    """(sender, receiver, bytes) of a call as HCCL makes it over servers, step by step."""
    teams: dict[int, list[int]] = {}
    for rank in call.ranks:
        teams.setdefault(server(rank), []).append(rank)
    made = []
    if len({len(team) for team in teams.values()}) == 1:
        for origin in call.ranks:
            place = teams[server(origin)].index(origin)
            for where, team in teams.items():
                carries = origin if where == server(origin) else team[place]
                made += [(origin, carries, call.nbytes)] if carries != origin else []
                made += [(carries, rank, call.nbytes) for rank in team if rank != carries]
        return made
    for _ in range(len(call.ranks) - 1):  # a ring: in every step each passes a share to the next
        made += [(rank, call.ranks[(n + 1) % len(call.ranks)], call.nbytes) for n, rank in enumerate(call.ranks)]
    return made


class OnServers(Load):
    """Ranks that lie on servers of `size`; all see all files. What each hands to every other is counted."""

    def __init__(self, *arguments: Any, size: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.size, self.given = size, dict[int, tuple[Mapping[int, int], int]]()
        self.calls: dict[int, list[Call]] = {}

    def host(self, rank: int) -> str:
        return f"server {rank // self.size}"

    def rank(self, transport: LocalTransport) -> Loaded:
        gather, calls = transport.start_all_gather, self.calls.setdefault(transport.rank, [])

        def recorded(send: Any, nbytes: int, recv: Any, group: tuple[int, ...] = ()) -> Any:
            calls.append(Call(group or tuple(range(transport.size)), nbytes))
            return gather(send, nbytes, recv, group)

        transport.start_all_gather = recorded  # type: ignore[method-assign]
        loaded = super().rank(transport)
        self.given[transport.rank] = dict(transport.given), transport.messages
        return loaded

    def counted(self) -> Counted:
        loaded = self.run()
        wire = np.zeros((len(loaded), len(loaded)), np.int64)
        for rank, (given_, _) in self.given.items():
            for peer, nbytes in given_.items():
                wire[rank, peer] += nbytes
        for rank, calls in self.calls.items():
            for call in calls:  # what was counted as if it went straight to everyone goes by the steps of HCCL
                wire[rank, [peer for peer in call.ranks if peer != rank]] -= call.nbytes
                for sender, receiver, nbytes in (
                    hops_of(call, lambda r: r // self.size) if rank == call.ranks[0] else ()
                ):
                    wire[sender, receiver] += nbytes
        server = np.arange(len(loaded)) // self.size
        near = server[:, None] == server
        columns = (wire * near).sum(1).tolist(), (wire * ~near).sum(1).tolist()
        return Counted(*columns, [self.given[rank][1] for rank in range(len(loaded))], loaded)

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


def planned(
    case: tuple[Layout, Layout, tuple[int, ...]], bucket: int, ways: Ways, sees: Optional[Sees] = None
) -> tuple[list[Demand], Any, Any]:
    a, b, shape = case
    metas = [TensorMeta(f"w{n}", DTYPES["BF16"], shape) for n in range(3)]
    source = estimate.of_shapes(metas, strategy_of(a, 3))
    demands = estimate.demands_under(source, strategy_of(b, 3))
    table = decide(demands, b.devices, source.located, ExchangeLimits(bucket, 4096), sees, ways)
    return demands, table, plan_of(table)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], max_examples=60, deadline=None)
@given(pairs(16), st.sampled_from([4096, 1 << 16]), st.booleans(), st.booleans(), st.data())
def test_every_byte_arrives_once(
    case: tuple[Layout, Layout, tuple[int, ...]], bucket: int, tiered: bool, groups: bool, data: st.DataObject
) -> None:
    """Any layouts, any servers: every rank gets every delivery that it wants in one way, and the columns say so too."""
    if prod(case[2]) > 20_000:
        return
    world = case[1].devices
    servers = tuple(data.draw(st.lists(st.integers(0, 2), min_size=world, max_size=world)))
    ways = Ways(groups=groups, servers=servers, tiered=tiered, broadcast=data.draw(st.booleans()))
    some = st.sets(st.integers(0, world - 1), min_size=1)
    seen = data.draw(st.none() | st.lists(some, min_size=case[0].devices, max_size=case[0].devices))
    sees = None if seen is None else {file: frozenset(ranks) for file, ranks in enumerate(seen)}
    demands, table, made = planned(case, bucket, ways, sees)
    assert all(sees is None or chunk.reader in sees[chunk.file] for chunk in made.chunks)
    counts = tally(table)
    inside, between = np.zeros(world, np.int64), np.zeros(world, np.int64)
    wanted = [0] * world
    wire = np.zeros((world, world), np.int64)
    for each in made.rounds:
        turns_ = [rank_round(made, each, rank) for rank in range(world)]
        for rank, turn in enumerate(turns_):
            late = turn.spread.incoming if turn.spread else ()
            items = [*turn.own, *turn.incoming, *late, *(item for gather in turn.gathers for item in gather.items)]
            keys = [(id(item.part), id(item.delivery)) for item in items]
            assert len(keys) == len(set(keys)), "a delivery arrives twice"
            wanted[rank] += sum(2 * item.delivery.in_part.size for item in items)
            for peer in range(world):
                assert turn.send_counts[peer] == turns_[peer].receive_counts[rank]
                wire[rank, peer] += turn.send_counts[peer]
                if turn.spread is not None:
                    other = turns_[peer].spread
                    assert other is not None and turn.spread.send_counts[peer] == other.receive_counts[rank]
                    wire[rank, peer] += turn.spread.send_counts[peer]
                    assert turn.spread.send_counts[peer] == 0 or servers[peer] == servers[rank]
            for gather in turn.gathers:
                if gather.root != EVERYBODY:
                    assert bool(gather.given) == (rank == gather.root), "one reads, and all have the stream"
                    place = gather.ranks.index(gather.root)
                    moved = broadcast_crossing(gather.share, np.array(servers)[list(gather.ranks)], place)
                    inside[rank] += moved.inside[gather.ranks.index(rank)]
                    between[rank] += moved.between[gather.ranks.index(rank)]
                    continue
                call = Call(gather.ranks, gather.share)
                for sender, receiver, nbytes in hops_of(call, servers.__getitem__) if rank == gather.ranks[0] else ():
                    wire[sender, receiver] += nbytes
        assert_within(made, turns_, bucket)
    assert wanted == counts.wanted.tolist()
    assert sum(wanted) == sum(2 * prod(case[1].slice_shape(case[2])) for _ in range(world)) * len(demands)
    near = np.array(servers)[:, None] == np.array(servers)
    assert counts.inside.tolist() == (inside + (wire * near).sum(1)).tolist()
    assert counts.between.tolist() == (between + (wire * ~near).sum(1)).tolist()
    assert counts.received.tolist() == made.bytes_received()


def assert_within(made: Any, turns_: Sequence[Any], bucket: int) -> None:
    """What a rank reads, sends and receives in a round fits its bucket, but for padding and a part's worth."""
    for rank, turn in enumerate(turns_):
        read = sum(made.chunks[chunk].nbytes for chunk in turn.chunks)
        passed = [*turn.send_counts, *turn.receive_counts, *(g.gives + g.nbytes for g in turn.gathers)]
        if turn.spread is not None:
            passed += [*turn.spread.send_counts, *turn.spread.receive_counts]
        padding = 16 * (2 * len(turns_) + len(turn.gathers) * len(turns_)) * 2
        assert read + sum(passed) <= bucket * 9 / 8 + padding, (rank, read, passed)


def test_turns_are_middles_among_parts_that_the_same_ranks_want() -> None:
    found = turns(np.array([0, 0, 1, 0]), np.array([5, 5, 5, 7]), np.array([30, 10, 8, 2]))
    assert found.tolist() == [15 / 40, 35 / 40, 0.5, 0.5]
    assert turns(*(np.empty(0, np.int64),) * 3).tolist() == []


def test_teams() -> None:
    assert teams_of((5, 0, 2), (0, 0, 1, 1, 1, 0)) == {0: (0, 5), 1: (2,)}


@pytest.mark.parametrize(
    ("servers", "inside", "between", "arriving"),
    [
        ((0, 0, 0), [20, 20, 20], [0, 0, 0], [0, 0, 0]),
        ((0, 1, 2), [0, 0, 0], [20, 20, 20], [20, 20, 20]),
        ((0, 0, 1, 1), [20, 20, 20, 20], [10, 10, 10, 10], [20, 0, 20, 0]),
        ((0, 0, 1, 1, 2, 2), [30] * 6, [20] * 6, [40, 0, 40, 0, 40, 0]),
        ((0, 0, 1), [20, 0, 0], [0, 20, 20], [20, 0, 20]),  # a ring: every share but its own passes each edge
        ((0, 1, 0, 0), [0, 0, 30, 30], [30, 30, 0, 0], [30, 30, 0, 0]),
    ],
)
def test_what_a_gather_of_shares_of_ten_bytes_moves(
    servers: tuple[int, ...], inside: list[int], between: list[int], arriving: list[int]
) -> None:
    found = gather_crossing(10, np.array(servers))
    assert [column.tolist() for column in found] == [inside, between, arriving]


@pytest.mark.parametrize(
    ("servers", "root", "inside", "between", "arriving"),
    [
        ((0, 0, 0, 0), 1, [9, 9, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]),  # 12 bytes to three, in four equal pieces
        ((0, 0, 1, 1), 1, [6, 6, 6, 6], [6, 6, 0, 0], [0, 0, 12, 0]),
        ((0, 1, 2), 2, [0, 0, 0], [0, 0, 24], [12, 12, 0]),
        ((0, 0, 1), 2, [6, 6, 0], [0, 0, 12], [12, 0, 0]),
    ],
)
def test_what_a_broadcast_of_twelve_bytes_moves(
    servers: tuple[int, ...], root: int, inside: list[int], between: list[int], arriving: list[int]
) -> None:
    found = broadcast_crossing(12, np.array(servers), root)
    assert [column.tolist() for column in found] == [inside, between, arriving]
    assert sum(inside) + sum(between) == 12 * (len(servers) - 1), "every rank but the root gets it once"
    assert sum(between) == sum(arriving)


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
    """Replicas that are each sent a copy: more messages, and none gathers."""
    shapes = {f"w{n}": {"dtype": "F32", "shape": [1 << 15, 8192]} for n in range(4)}
    target = strategy_of(Layout((8, 2), ((0,), ())), 4)
    found = [plan(None, target, shapes=shapes, hardware=["atlas-800t-a2"], groups=groups) for groups in (True, False)]
    assert [report.groups for report in found] == [2, 0]
    assert found[0].cooperative["received"].total == found[1].cooperative["received"].total
    assert found[0].crossing.total <= found[1].crossing.total
    with pytest.raises(ArgumentTypeError, match="groups"):
        plan(None, target, shapes=shapes, groups="no")  # type: ignore[arg-type]

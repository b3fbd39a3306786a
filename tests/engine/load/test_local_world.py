"""Cooperative loads with the ranks as threads: survey, agree, plan, exchange, compare, over real files."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.one_rank import rank_round
from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.load.survey import survey
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.errors import (
    CoverageError,
    LayoutMismatchError,
)
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.local import LocalWorld
from tests.harness.chosen import long_one
from tests.support.checkpoints import PAIRS, cut, read_file, strategy_of
from tests.support.loads import Load, assert_shards, golden_load, needed_once, wide_source
from tests.support.strategies import pairs


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_golden_pairs(source: str, target: str, golden: Path) -> None:
    """Every byte right on every rank, and read once, whatever the number of replicas."""
    loaded = golden_load(golden, source, target).run()
    assert_shards(loaded, golden / target / "shards")
    assert sum(rank.report.reads.nbytes for rank in loaded) == needed_once(loaded)
    assert [rank.report.reads.nbytes for rank in loaded] == loaded[0].plan.bytes_read()
    assert all(rank.plan == loaded[0].plan for rank in loaded)


@pytest.mark.parametrize("mode", ["direct", "auto"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_golden_pairs_in_other_modes(source: str, target: str, mode: str, golden: Path) -> None:
    """The same bytes; a direct load reads what each rank wants, replicas included."""
    if mode == "auto" and PAIRS.index((source, target)) % 4:
        long_one("automatic mode takes one of the two that every pair is loaded in")
    loaded = golden_load(golden, source, target, mode=mode).run()
    assert_shards(loaded, golden / target / "shards")
    assert len({rank.report.mode for rank in loaded}) == 1
    assert mode == "auto" or all(rank.report.mode == "direct" for rank in loaded)


@pytest.mark.parametrize(
    ("source", "target"), [("dp2_tp4", "tp4"), ("dp2_tp2_pp2_zero", "dp2_tp2"), ("dp4_tp2_zero2", "dp3_tp8")]
)
def test_a_small_bucket_makes_many_rounds(source: str, target: str, golden: Path) -> None:
    loaded = golden_load(golden, source, target, bucket_bytes=4096).run()
    assert_shards(loaded, golden / target / "shards")
    assert loaded[0].report.rounds > 10


def test_deduplicated_files_and_scalars(golden: Path) -> None:
    formats = golden / "formats_dp2_tp4"
    known = load_strategy(formats / "strategy.ckpt")
    first = read_file(next((formats / "dedup/rank_0").glob("*.safetensors")))
    scalars = {name: tensor.data for name, tensor in first.items() if name not in known.layouts}
    assert len(scalars) == 7
    loaded = Load(formats / "dedup", known, load_strategy(golden / "dp2_tp2/strategy.ckpt")).run()
    assert_shards(loaded, golden / "dp2_tp2/shards", scalars)


def test_a_merged_checkpoint(golden: Path) -> None:
    loaded = Load(golden / "full", None, load_strategy(golden / "dp4_tp2_zero2/strategy.ckpt")).run()
    assert_shards(loaded, golden / "dp4_tp2_zero2/shards")


def test_a_stage_reads_its_own_bytes(golden: Path) -> None:
    """Two pipeline stages want different parameters: nothing crosses between them, nobody reads for the other."""
    loaded = golden_load(golden, "dp2_tp4", "dp2_tp2_pp2_zero").run()
    plan = loaded[0].plan
    for part in plan.parts:
        stages = {rank // 4 for delivery in part.deliveries for rank in delivery.ranks}
        assert stages == {plan.chunks[part.chunk].reader // 4}


@pytest.mark.parametrize(("source", "target"), [("dp2_tp4_zero", "dp2_tp2"), ("dp8_zero", "dp3_tp8")])
def test_what_travels_is_hardly_more_than_what_must(source: str, target: str, golden: Path) -> None:
    """Bytes handed to the collectives against those that some rank needs and did not read itself."""
    loaded = golden_load(golden, source, target).run()
    plan = loaded[0].plan
    bound = sum(plan.bytes_received())
    turns = [rank_round(plan, each, rank) for each in plan.rounds for rank in range(plan.world)]
    travelled = sum(sum(turn.receive_counts) for turn in turns)
    travelled += sum(gather.nbytes - gather.share for turn in turns for gather in turn.gathers)
    assert 0 < bound <= travelled <= 1.05 * bound
    assert sum(rank.report.bytes_received for rank in loaded) == bound


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_reading_is_balanced_and_in_long_stretches(replicas: int, tmp_path: Path) -> None:
    """Within 5 % of a fair share each; at most (bytes / 4 MiB) + 2 reads per parameter."""
    load = wide_source(tmp_path, Layout((2, 4), ((0,), ())), Layout((replicas, 8 // replicas), ((0,), ())))
    loaded = load.run()
    assert_shards(loaded, tmp_path / "expected")
    read = [rank.report.reads.nbytes for rank in loaded]
    assert sum(read) == 4 << 20
    assert max(read) <= 1.05 * sum(read) / len(read)
    stock = len(loaded) * sum(file.stat().st_size for file in (tmp_path / "source").rglob("*.safetensors"))
    print(f"{replicas} replicas: {sum(read):,} bytes read by all ranks; stock's ranks read {stock:,}")


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], max_examples=25)
@given(pairs(8), st.sampled_from([4096, 65536]), st.data())
def test_any_layouts_any_visibility(case: tuple[Layout, Layout, tuple], bucket: int, data: st.DataObject) -> None:
    import tempfile

    a, b, shape = case
    if prod(shape) > 20_000:
        return
    hosts = data.draw(st.lists(st.sampled_from(["x", "y"]), min_size=b.devices, max_size=b.devices))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        full = {n: np.random.default_rng(s).integers(0, 9999, shape, np.int32) for s, n in enumerate(("u", "v"))}
        trained = strategy_of(dict.fromkeys(full, a), root / "a.ckpt")
        target = strategy_of(dict.fromkeys(full, b), root / "b.ckpt")
        cut(trained, full, root / "all")
        cut(target, full, root / "expected")
        names = sorted(set(hosts))
        for rank in range(trained.world):  # every folder on one host at least
            for host in data.draw(st.sampled_from([names, names[:1], names[-1:]])):
                shutil.copytree(root / "all" / f"rank_{rank}", root / host / f"rank_{rank}")

        class Split(Load):
            def directory(self, rank: int) -> Path:
                return root / hosts[rank]

            def host(self, rank: int) -> str:
                return hosts[rank]

        loaded = Split(root / "x", trained, target, bucket_bytes=bucket).run()
        assert_shards(loaded, root / "expected")
        assert sum(rank.report.reads.nbytes for rank in loaded) == needed_once(loaded)
        check_rounds(loaded[0].plan, bucket)


def check_rounds(plan: ExchangePlan, bucket: int) -> None:
    """Every part in one round; a round's staging fits the bucket but for a first part that alone is larger."""
    assert sorted(n for r in plan.rounds for n in r.parts) == list(range(len(plan.parts)))
    assert sorted(c for r in plan.rounds for c in r.chunks) == list(range(len(plan.chunks)))
    for each in plan.rounds:
        received = [0] * plan.world
        for number in each.parts:
            part = plan.parts[number]
            for delivery in part.deliveries:
                for rank in delivery.ranks:
                    if part.gathered or rank != plan.chunks[part.chunk].reader:
                        received[rank] += part.dtype.nbytes(delivery.in_part.size)
        assert max(received) <= bucket


class TwoDisks(Load):
    """Half of the ranks see half of the folders."""

    root: Path

    def directory(self, rank: int) -> Path:
        return self.root / f"disk_{rank % 2}"

    def host(self, rank: int) -> str:
        return f"host-{rank % 2}"


def two_disks(golden: Path, tmp_path: Path, without: Optional[int] = None, **options: Any) -> TwoDisks:
    source = golden / "dp2_tp4_zero"
    for rank in range(8):
        if rank != without:
            shutil.copytree(source / "shards" / f"rank_{rank}", tmp_path / f"disk_{rank // 4}" / f"rank_{rank}")
    target = load_strategy(golden / "tp4/strategy.ckpt")
    load = TwoDisks(tmp_path, load_strategy(source / "strategy.ckpt"), target, **options)
    load.root = tmp_path
    return load


def test_local_disks(golden: Path, tmp_path: Path) -> None:
    assert_shards(two_disks(golden, tmp_path).run(), golden / "tp4/shards")


def test_a_rank_is_sent_what_its_host_does_not_see_in_direct_mode_too(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = two_disks(golden, tmp_path, mode="direct").run()
    assert_shards(loaded, golden / "tp4/shards")
    assert all(rank.prepared.cooperative for rank in loaded)
    assert "mode='direct' is not possible: rank 0 does not see all files that hold its slice of" in caplog.text
    loaded = Load(
        golden / "dp2_tp4_zero/shards",
        load_strategy(golden / "dp2_tp4_zero/strategy.ckpt"),
        load_strategy(golden / "tp4/strategy.ckpt"),
        mode="direct",
    ).run()
    assert not any(rank.prepared.cooperative for rank in loaded)


def test_a_folder_that_no_host_sees(golden: Path, tmp_path: Path) -> None:
    for error in two_disks(golden, tmp_path, without=5).fail().values():
        assert isinstance(error, CoverageError)
        assert "should be in the file of rank 5" in str(error)
        assert "hosts asked: host-0, host-1" in str(error)


def test_hosts_with_different_copies(golden: Path, tmp_path: Path) -> None:
    load = two_disks(golden, tmp_path)
    other = golden / "dp2_tp4/shards/rank_0"
    shutil.copytree(other, tmp_path / "disk_1/rank_0")
    for error in load.fail().values():
        assert isinstance(error, LayoutMismatchError)
        assert "host-0, host-1" in str(error) and "their headers differ" in str(error)


def test_headers_are_read_once_by_all_ranks_together(golden: Path) -> None:
    opened: list[str] = []

    def read(path: str) -> Any:
        opened.append(path)
        return read_index(path)

    strategy = load_strategy(golden / "dp3_tp8/strategy.ckpt")
    look = partial(list_checkpoint, str(golden / "dp3_tp8/shards"), strategy)
    seen = LocalWorld(16).run(lambda transport: survey(transport, look, read, "one"))
    assert len(opened) == len(set(opened)) == 24
    assert all(list(one.indexes.items()) == list(seen[0].indexes.items()) for one in seen)
    assert list(seen[0].indexes) == [str(rank) for rank in range(24)]


class Slow(Load):
    """Its reads are slow."""

    def readers(self, rank: int, catalog: Catalog) -> ReaderPool:
        pool = super().readers(rank, catalog)
        real = pool.read_into

        def read_into(file: int, offset: int, buffer: memoryview) -> None:
            time.sleep(0.005)
            real(file, offset, buffer)

        pool.read_into = read_into  # type: ignore[method-assign]
        return pool


def traced(golden: Path, source: str, target: str, path: Path) -> tuple[ExchangePlan, list[dict[str, Any]]]:
    """The plan of a slow load in many rounds, and its trace."""
    layouts = [load_strategy(golden / name / "strategy.ckpt") for name in (source, target)]
    load = Slow(golden / source / "shards", *layouts, bucket_bytes=32768, trace=str(path))
    return load.run()[0].plan, json.loads(path.read_text())["traceEvents"]


def test_reading_overlaps_the_exchange(golden: Path, tmp_path: Path) -> None:
    """With a slow reader, some chunk of a later round is being read while a round is exchanged."""
    plan, events = traced(golden, "dp2_tp4", "tp4", tmp_path / "trace.json")
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    assert {event["ph"] for event in events} == {"X"}
    round_of = {chunk: number for number, r in enumerate(plan.rounds) for chunk in r.chunks}
    spans = {name: [e for e in events if e["name"] == name] for name in ("read", "exchange")}
    overlapping = [
        (read["args"]["chunk"], exchange["args"]["round"])
        for read in spans["read"]
        for exchange in spans["exchange"]
        if read["pid"] == exchange["pid"]
        and read["ts"] < exchange["ts"] + exchange["dur"]
        and exchange["ts"] < read["ts"] + read["dur"]
    ]
    assert any(round_of[chunk] > number for chunk, number in overlapping)


def test_digesting_overlaps_later_rounds(golden: Path, tmp_path: Path) -> None:
    """A parameter is digested once, after the round that completes it; some of them before a later round ends."""
    plan, events = traced(golden, "tp4", "dp2_tp2", tmp_path / "trace.json")
    digests = [event for event in events if event["name"] == "digest"]
    within = 0
    for rank in range(plan.world):
        exchange = {e["args"]["round"]: e for e in events if e["pid"] == rank and e["name"] == "exchange"}
        complete = {
            part.demand: number
            for number, round_ in enumerate(plan.rounds)
            for part in (plan.parts[n] for n in round_.parts)
            if any(rank in delivery.ranks for delivery in part.deliveries)
        }
        mine = {e["args"]["demand"]: e for e in digests if e["pid"] == rank}
        assert mine.keys() == complete.keys()
        assert len(mine) == sum(e["pid"] == rank for e in digests)
        for demand, number in complete.items():
            begin, end = mine[demand]["ts"], mine[demand]["ts"] + mine[demand]["dur"]
            assert exchange[number]["ts"] + exchange[number]["dur"] <= begin
            within += any(end <= exchange[later]["ts"] for later in range(number + 1, len(plan.rounds)))
    assert within

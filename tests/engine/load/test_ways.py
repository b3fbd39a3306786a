"""How large a round is, what replaces an all-to-all, and how much buffers hold at most."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Optional

import pytest

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid
from ms_ckpt_ext.core.exchange.rounds import Shares, shares_of
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta
from ms_ckpt_ext.engine.load.profiles import bucket_for, left_by, left_on_all
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.base import TransportTraits
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.counting import counted
from tests.support.loads import Load, Loaded, assert_shards, golden_load, wide_source

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("asked", "call", "free", "bucket"),
    [
        (None, 200 * MIB, 40 * GIB, 600 * MIB),  # three calls' worth
        (None, 200 * MIB, 2 * GIB, 256 * MIB),  # an eighth of what is free
        (None, 200 * MIB, 1, 4 * MIB),  # never less
        (None, 0, 40 * GIB, 64 * MIB),  # HCCL_BUFFSIZE not known
        (None, 0, 0, 64 * MIB),  # host memory
        (None, 16 * MIB, 40 * GIB, 64 * MIB),
        (5 * MIB, 200 * MIB, 40 * GIB, 5 * MIB),  # what is asked for counts
    ],
)
def test_the_bucket_fits_the_machine(asked: Optional[int], call: int, free: int, bucket: int) -> None:
    assert bucket_for(asked, call, free) == bucket


@pytest.mark.parametrize(
    ("free", "to_come", "left"),
    [
        ((40, 30, 35), (0, 0, 0), 30 * GIB),
        ((40, 30, 35), (20, 0, 0), 20 * GIB),  # what is still to be put there comes first
        ((40, 30, 35), (50, 0, 0), 1),
        (
            (40, None, 35),
            (0, 0, 0),
            56 * GIB - 6 * MIB,
        ),  # an eighth of 64 GiB is reserved for others, and the Parameters take 6 MiB
        ((None, None, None), (9, 9, 9), 56 * GIB - 6 * MIB),
    ],
)
def test_what_is_left_of_a_device(free: tuple[Optional[int], ...], to_come: tuple[int, ...], left: int) -> None:
    grids = (Grid((2, 1), {(0, 0): (0, 1), (1, 0): (2,)}),)
    demands = [Demand("w", SourceTensor(TensorMeta("w", DTYPES["F32"], (3 << 10, 1 << 10)), "w", ()), grids)]
    hardware = Hardware(1e9, True, 8, 1e9, 1e-6, memory=64 * GIB)

    def rank(transport: LocalTransport) -> int:
        transport.traits = TransportTraits(on_device=True)
        told = free[transport.rank]
        transport.free_bytes = lambda: 0 if told is None else told * GIB  # type: ignore[method-assign]
        return left_on_all(transport, to_come[transport.rank] * GIB, demands, hardware)

    assert LocalWorld(3).run(rank) == [left] * 3


def test_host_memory_has_no_device_to_be_left() -> None:
    assert LocalWorld(2).run(lambda transport: left_on_all(transport, 0, [], Hardware(1, True, 1, 1, 1, memory=9))) == [
        0,
        0,
    ]
    assert left_by([], 2, Hardware(1, True, 1, 1, 1)) == 0


@pytest.mark.parametrize(
    ("totals", "shares"),
    [
        ((0, 0, 0), (100, 100, 100)),
        ((1, 0, 0), (600, 100, 100)),
        ((1, 1, 3), (200, 200, 400)),
        ((0, 0, 9), (100, 100, 600)),
    ],
)
def test_the_bucket_is_shared_out_as_it_is_needed(totals: tuple[int, int, int], shares: tuple[int, int, int]) -> None:
    assert shares_of(Shares(*totals), ExchangeLimits(800, 50)) == shares


class Lacking(Load):
    """A product that has no all-to-all for these ranks; `way` is what takes its place."""

    way, apart = "", False

    def host(self, rank: int) -> str:
        return f"host {rank % 2}" if self.apart else "one"

    def directory(self, rank: int) -> Path:
        return self.source / f"disk_{rank % 2}" if self.apart else self.source

    def rank(self, transport: LocalTransport) -> Loaded:
        transport.traits = transport.traits._replace(all_to_all=self.way, product="ascend310p")
        return super().rank(transport)


def lacking(golden: Path, mode: str) -> Lacking:
    source, target = golden / "dp2_tp4_zero", load_strategy(golden / "tp4/strategy.ckpt")
    return Lacking(source / "shards", load_strategy(source / "strategy.ckpt"), target, mode=mode)


@pytest.mark.parametrize("mode", ["auto", "cooperative"])
@pytest.mark.parametrize("way", ["", "pairs"])
def test_without_an_all_to_all_every_rank_reads_its_own(
    mode: str, way: str, golden: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load = lacking(golden, mode)
    load.way = way
    loaded = load.run()
    assert_shards(loaded, golden / "tp4/shards")
    assert {rank.report.mode for rank in loaded} == {"direct"}
    assert any("ascend310p has no all-to-all" in message for message in caplog.messages)


def test_where_files_are_apart_pairs_send_or_it_is_an_error(golden: Path, tmp_path: Path) -> None:
    for rank in range(8):
        folder = tmp_path / f"disk_{rank // 4}"
        folder.mkdir(exist_ok=True)
        (folder / f"rank_{rank}").symlink_to(golden / "dp2_tp4_zero/shards" / f"rank_{rank}")
    load = lacking(golden, "auto")
    load.source, load.apart, load.way = tmp_path, True, "pairs"
    loaded = load.run()
    assert_shards(loaded, golden / "tp4/shards")
    assert {rank.report.mode for rank in loaded} == {"cooperative"}
    other = lacking(golden, "auto")
    other.source, other.apart = tmp_path, True
    for error in other.fail().values():
        assert isinstance(error, UsageError) and "put the checkpoint where all hosts see it" in str(error)


class Allocating(Load):
    """Counts how much every rank's buffers hold at most."""

    servers = 1

    def host(self, rank: int) -> str:
        return f"server {rank * self.servers // self.target.world}"

    def rank(self, transport: LocalTransport) -> Loaded:
        self.taken = getattr(self, "taken", {})
        allocate = transport.allocate

        def counted(nbytes: int) -> Any:
            self.taken[transport.rank] = self.taken.get(transport.rank, 0) + nbytes
            return allocate(nbytes)

        transport.allocate = counted  # type: ignore[method-assign]
        return super().rank(transport)


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize(
    "target", [Layout((8, 1), ((), ())), Layout((4, 2), ((), (0,))), Layout((2, 4), ((0,), ()))], ids=str
)
def test_buffers_stay_within_the_bucket_on_every_path(target: Layout, servers: int, tmp_path: Path) -> None:
    """Gathered by all, by groups, sent flat, and by tiers; two rounds may be under way."""
    hardware = Hardware(1e9, True, 4, 1e9, 1e-6, between=1e6)
    made = wide_source(tmp_path, Layout((2, 4), ((0,), ())), target)
    bucket = 1 << 18
    load = Allocating(made.source, made.trained, made.target, hardware, bucket_bytes=bucket)
    load.servers = servers
    loaded = load.run()
    assert_shards(loaded, tmp_path / "expected")
    plan = loaded[0].plan
    assert bool(plan.servers) == (servers > 1 and target.parts[1] > 1), "gathers of whole rows cross once by themselves"
    assert len(plan.rounds) > 2
    assert max(load.taken.values()) <= 2 * bucket * 9 // 8


def test_nothing_gathered_is_longer_than_what_is_wanted(golden: Path) -> None:
    """A stream is padded to 16 bytes a rank, and by no more."""
    for source, target in (("dp2_tp4", "dp2_tp4"), ("dp8_zero", "dp3_tp8")):
        plan = golden_load(golden, source, target).run()[0].plan
        streams = list(plan.gathers)
        assert streams
        for gather in streams:
            wanted = sum(plan.parts[number].nbytes for number in gather.parts)
            assert 0 <= gather.share * len(gather.ranks) - wanted <= 16 * (len(gather.ranks) + len(gather.parts))


class Apart(Load):
    """Hosts with disks of their own, each with some of the files; counts the calls of every rank."""

    def host(self, rank: int) -> str:
        return f"host {rank % 2}"

    def directory(self, rank: int) -> Path:
        return self.source / f"disk_{rank % 2}"

    def rank(self, transport: LocalTransport) -> Loaded:
        self.calls = getattr(self, "calls", Counter[str]())
        counts = counted(transport)
        loaded = super().rank(transport)
        self.calls.update(counts.collectives)
        return loaded


def apart(root: Path, target: Layout) -> Apart:
    made = wide_source(root, Layout((2, 4), ((0,), ())), target)
    for rank in range(8):
        folder = root / f"disks/disk_{rank // 7}"  # so that few send much
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank}").symlink_to(root / "source" / f"rank_{rank}")
    return Apart(root / "disks", made.trained, made.target, Hardware(1e9, False, 2, 1e9, 1e-6), bucket_bytes=1 << 19)


@pytest.mark.parametrize(
    ("target", "broadcasts"), [(Layout((4, 1), ((), ())), True), (Layout((1, 4), ((), (0,))), False)], ids=str
)
def test_what_some_see_and_all_want_whole_is_broadcast(target: Layout, broadcasts: bool, tmp_path: Path) -> None:
    """One call by the reader instead of a copy for each rank; what is cut travels as before."""
    load = apart(tmp_path, target)
    loaded = load.run()
    assert_shards(loaded, tmp_path / "expected")
    plan = loaded[0].plan
    roots = [gather.root for gather in plan.gathers]
    assert bool(load.calls["broadcast"]) == broadcasts
    assert load.calls["broadcast"] == 4 * len([root for root in roots if root != EVERYBODY])
    assert sum(rank.report.reads.nbytes for rank in loaded) == 4 * 512 * 512 * 4, "every byte is read once"
    for gather in plan.gathers:
        assert {plan.chunks[number].reader for number in gather.chunks} == {gather.root}


def test_copies_are_sent_where_the_model_says_that_they_are_faster(tmp_path: Path) -> None:
    """A call costs a second there, and broadcasts are many."""
    load = apart(tmp_path, Layout((4, 1), ((), ())))
    load.hardware = Hardware(1e9, False, 2, 1e12, 1.0)
    assert_shards(load.run(), tmp_path / "expected")
    assert load.calls["broadcast"] == 0 < load.calls["all_to_all"]

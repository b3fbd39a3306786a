"""What a cooperative load costs, counted: reads, bytes that travel, memory. Sparse files, ranks as threads."""

from __future__ import annotations

import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext.core.exchange.one_rank import rank_round
from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.layout import Layout, cell_region
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.load import session
from ms_ckpt_ext.engine.load.replicas import SliceBytes
from ms_ckpt_ext.engine.load.slabs import HostMover
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.loads import Load, Loaded

MIB = 1 << 20
SIZES = ((16, 64), (512, 1024), (1536, 2048), (4096, 2048))
"""Parameters of 4 KiB, 2, 12 and 32 MiB."""
CRUMBS = 64 << 10
"""Boxes are not cut at a target's seam into less than this."""
LAYOUTS = [Layout((2, 4), ((0,), ())), Layout((2, 4), ((), (0,))), Layout((2, 4), ((0,), ()), 2, 2)]


def sparse(root: Path, layouts: dict[str, Layout], shapes: dict[str, tuple[int, ...]]) -> Strategy:
    """Shards of float32 zeros that take no space on disk."""
    strategy = Strategy.from_items([LayoutItem(name, 0, layout) for name, layout in layouts.items()], "a test")
    for rank in range(strategy.world):
        specs = [TensorSpec(n, DTYPES["F32"], layouts[n].slice_shape(shapes[n])) for n in layouts]
        laid = safetensors.layout(specs, {"format": "ms"})
        (root / f"rank_{rank}").mkdir(parents=True)
        with (root / f"rank_{rank}/net.safetensors").open("wb") as file:
            file.write(laid.literals[0][1])
            file.truncate(laid.size)
    return strategy


class Landing:
    """Counts what lands and keeps nothing."""

    def __init__(self, width: int) -> None:
        self.width, self.nbytes, self.finished = width, 0, False

    def place(self, source: Any, offset: int, shape: Any, box: Region, region: Region, view: Any) -> None:
        self.nbytes += box.size * self.width

    def finish(self) -> None:
        self.finished = True

    def contents(self) -> SliceBytes:
        raise AssertionError("nothing is kept")


class Counting(Load):
    """A load whose result is discarded, so that everything allocated belongs to the load."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, verify="none", **options)

    def rank(self, transport: LocalTransport) -> Loaded:
        catalog, _, ready = self.prepare(transport)
        sinks = {number: Landing(4) for number in range(len(ready.demands))}
        with self.readers(transport.rank, catalog) as readers:
            report = session.exchange(transport, ready, HostMover(), sinks, readers, self.options)
        landed = sum(sink.nbytes for sink in sinks.values())
        assert landed == ready.plan.bytes_wanted()[transport.rank]
        assert all(sink.finished for sink in sinks.values())
        return Loaded({}, report, ready.plan, ready)


def stock_reads(root: Path, load: Load) -> tuple[int, int]:
    """(reads, bytes) of stock MindSpore on a checkpoint: every rank parses every file and reads its tensors whole."""
    files = list(root.rglob("*.safetensors"))
    tensors = sum(len(read_index(str(file)).tensors) for file in files)
    return load.world.size * tensors, load.world.size * sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    "target", [Layout((4,), ((0,), ())), Layout((2, 2), ((), (0,))), Layout((4, 1), ((), (0,)))], ids=str
)
def test_few_long_reads(target: Layout, tmp_path: Path) -> None:
    """At most (bytes / 4 MiB) + 2 per parameter on every rank, whole bytes once; 24 parameters, 4 KiB to 32 MiB."""
    shapes = {f"layer.{n}": SIZES[n % len(SIZES)] for n in range(24)}
    layouts = {name: LAYOUTS[n // 4 % len(LAYOUTS)] for n, name in enumerate(shapes)}
    trained = sparse(tmp_path, layouts, shapes)
    predicted = Strategy.from_items([LayoutItem(name, 0, target) for name in shapes], "target")
    load = Counting(tmp_path, trained, predicted, bucket_bytes=64 * MIB)
    loaded = load.run()
    reads = [rank.report.reads for rank in loaded]
    for each in reads:
        assert each.reads <= each.nbytes / (4 * MIB) + 2 * len(shapes)
    assert sum(each.nbytes for each in reads) == sum(4 * prod(shape) for shape in shapes.values())
    stock, nbytes = stock_reads(tmp_path, load)
    print(
        f"{[each.reads for each in reads]} reads, {sum(each.nbytes for each in reads):,} bytes of all ranks; "
        f"stock: {stock} reads, {nbytes:,} bytes"
    )


def test_memory_is_a_matter_of_the_bucket(tmp_path: Path) -> None:
    """1 GiB of parameters, four ranks, every byte travels to two: at most 2 buckets + 64 MiB each."""
    shapes = {f"layer.{n}": (4096, 2048) for n in range(32)}
    trained = sparse(tmp_path, dict.fromkeys(shapes, Layout((2, 4), ((0,), ()))), shapes)
    across = Layout((2, 2), ((), (0,)))
    load = Counting(tmp_path, trained, Strategy.from_items([LayoutItem(n, 0, across) for n in shapes], "target"))
    load.options.bucket_bytes = 32 * MIB
    tracemalloc.start()
    try:
        loaded = load.run()
        held = tracemalloc.get_traced_memory()[1] / load.world.size
    finally:
        tracemalloc.stop()
    assert sum(rank.report.reads.nbytes for rank in loaded) == 1 << 30
    print(f"{held / MIB:.1f} MiB a rank with a bucket of 32 MiB; {loaded[0].report.rounds} rounds")
    assert held <= 2 * 32 * MIB + 64 * MIB


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_what_travels(source: Layout, tmp_path: Path) -> None:
    """Bytes handed to the collectives are at most 1.05 x the least there is with reads of whole rows."""
    shapes = {f"layer.{n}": SIZES[n % len(SIZES)] for n in range(8)}
    trained = sparse(tmp_path, dict.fromkeys(shapes, source), shapes)
    for target in (Layout((4,), ((0,), ())), Layout((2, 2), ((), (0,))), Layout((4,), ((), ()))):
        predicted = Strategy.from_items([LayoutItem(name, 0, target) for name in shapes], "target")
        loaded = Counting(tmp_path, trained, predicted, bucket_bytes=16 * MIB).run()
        plan = loaded[0].plan
        bound = sum(least(shape, source, target) for shape in shapes.values())
        print(f"{travelled(plan) / max(bound, 1):.4f} x the lower bound of {bound:,} bytes")
        assert bound <= travelled(plan) <= 1.05 * bound + CRUMBS


def least(shape: tuple[int, ...], source: Layout, target: Layout) -> int:
    """Bytes that must travel when a row of a source slice is read by one rank, the one that wants most of it."""
    total = 0
    boxes = [target.region(rank, shape) for rank in range(target.devices)]
    for cell in set(source.cells):
        slice_ = cell_region(cell, source.parts, shape)
        edges = sorted({*(row for box in (slice_, *boxes) for row in (box.start[0], box.stop[0]))})
        for low, high in zip(edges, edges[1:]):
            rows = slice_.intersect(Region((low, 0), (high, shape[1])))
            common = [] if rows is None else [box.intersect(rows) for box in boxes]
            wanted = [4 * box.size for box in common if box is not None]
            total += sum(wanted) - max(wanted, default=0)
    return total


def travelled(plan: ExchangePlan) -> int:
    """Bytes that arrive from other ranks, padding included."""
    total = 0
    for each in plan.rounds:
        for rank in range(plan.world):
            turn = rank_round(plan, each, rank)
            total += sum(turn.receive_counts) - turn.receive_counts[rank]
            total += sum(gather.nbytes - gather.share for gather in turn.gathers)
    return total

"""Loads by all ranks of a world of threads, for the tests of cooperative loads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.core.geometry.layout import Layout, whole
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.load import profiles, session
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.replicas import Digester, compare_replicas
from ms_ckpt_ext.engine.load.session import LoadReport, Prepared, Want
from ms_ckpt_ext.engine.load.slabs import HostMover, HostSink
from ms_ckpt_ext.engine.load.survey import Survey, survey
from ms_ckpt_ext.engine.source.catalog import Catalog, catalog_of
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats.registry import PLAIN, read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink
from ms_ckpt_ext.transport.agree import on_all
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.checkpoints import cut, read_file, strategy_of

SOON = 5.0
CPU = profiles.profile(profiles.CPU).hardware


class Loaded(NamedTuple):
    """What one rank ended with."""

    contents: dict[str, bytes]
    report: LoadReport
    plan: ExchangePlan
    prepared: Prepared


class Load:
    """One load by all ranks of a world; what differs between ranks is a function of the rank."""

    def __init__(
        self, source: Path, trained: Optional[Strategy], target: Strategy, hardware: Hardware = CPU, **options: Any
    ) -> None:
        self.source, self.trained, self.target, self.hardware = source, trained, target, hardware
        self.options = LoadOptions(
            **{"mode": "cooperative", "bucket_bytes": 1 << 20, "threads": 1, "verify": "replicas", **options}
        )
        self.world = LocalWorld(target.world, timeout=20.0)
        self.access = PLAIN

    def directory(self, rank: int) -> Path:
        return self.source

    def host(self, rank: int) -> str:
        return "one"

    def facts(self, rank: int) -> dict[str, str]:
        return {}

    def sink(self, rank: int, name: str, sink: HostSink) -> Any:
        return sink

    def mover(self, rank: int) -> HostMover:
        return HostMover()

    def readers(self, rank: int, catalog: Catalog) -> ReaderPool:
        return catalog.readers()

    def catalog(self, seen: Survey) -> Catalog:
        return compared(catalog_of(seen.indexes, seen.sharded, seen.names, self.trained, self.access))

    def wants(self, rank: int, catalog: Catalog) -> dict[str, Want]:
        wants = {n: Want(n, whole(len(t.meta.shape))) for n, t in catalog.extras.items()}
        for name in self.target.names_of(rank):
            layout = self.target.layout(name, rank)
            if name in catalog.tensors and layout is not None:
                wants[name] = Want(name, layout)
        return wants

    def prepare(self, transport: LocalTransport) -> tuple[Catalog, dict[str, Want], Prepared]:
        rank = transport.rank
        look = partial(list_checkpoint, str(self.directory(rank)), self.trained)
        seen = survey(transport, look, partial(read_index, access=self.access), self.host(rank))
        catalog = self.catalog(seen)
        wants = self.wants(rank, catalog)
        facts = self.facts(rank)
        return catalog, wants, session.prepare(transport, seen, catalog, wants, self.options, self.hardware, facts)

    def rank(self, transport: LocalTransport) -> Loaded:
        rank = transport.rank
        catalog, wants, ready = self.prepare(transport)
        memory, sinks = {}, {}
        for number, demand in enumerate(ready.demands):
            if demand.name in wants:
                meta = demand.tensor.meta
                shape = wants[demand.name].layout.slice_shape(meta.shape)
                memory[demand.name] = np.full(meta.dtype.nbytes(prod(shape)), 0xAA, np.uint8)
                sinks[number] = self.sink(rank, demand.name, HostSink(memory[demand.name], shape, meta.dtype))
        with self.readers(rank, catalog) as readers:
            if ready.cooperative:
                report = session.exchange(transport, ready, self.mover(rank), sinks, readers, self.options)
            else:
                report = read_alone(ready, wants, rank, memory, readers)
                with Digester() as digester:
                    for number, sink in sinks.items():
                        digester.add(number, sink.contents())
                    report = report._replace(digests=digester.wait())
            on_all(transport, readers.verify)
        if self.options.verify != "none":
            compare_replicas(transport, ready.demands, report.digests)
        return Loaded({n: a.tobytes() for n, a in memory.items()}, report, ready.plan, ready)

    def run(self) -> list[Loaded]:
        return self.world.run(self.rank)

    def fail(self) -> dict[int, BaseException]:
        """Every rank's error; all must have one, soon."""
        began = time.monotonic()
        with pytest.raises(Exception):  # noqa: B017 - looked at below
            self.run()
        assert time.monotonic() - began < SOON
        assert sorted(self.world.errors) == list(range(self.world.size))
        assert all(isinstance(error, CheckpointError) for error in self.world.errors.values()), self.world.errors
        return self.world.errors


def read_alone(
    ready: Prepared, wants: Mapping[str, Want], rank: int, memory: Mapping[str, np.ndarray], readers: ReaderPool
) -> LoadReport:
    """A direct load: this rank's own boxes, straight into memory."""
    tasks = []
    for number, demand in enumerate(d for d in ready.demands if d.name in wants):
        layout = wants[demand.name].layout
        landing = Landing(number, (Extent(0, memory[demand.name].size),))
        box = layout.region(rank % layout.devices, demand.tensor.meta.shape)
        tasks.append(Task(demand.tensor, (Target(box, (landing,)),)))
    units = schedule(tasks, ready.catalog.stored, Limits())
    worker.run(units, readers, [MemorySink(array) for array in memory.values()], 1, lambda *_: None)
    return LoadReport("direct", readers.count)


def golden_load(golden: Path, source: str, target: str, **options: Any) -> Load:
    trained = load_strategy(golden / source / "strategy.ckpt")
    return Load(golden / source / "shards", trained, load_strategy(golden / target / "strategy.ckpt"), **options)


def assert_shards(loaded: list[Loaded], shards: Path, more: Mapping[str, bytes] = {}) -> None:
    for rank, held in enumerate(loaded):
        expected = {n: t.data for n, t in read_file(next((shards / f"rank_{rank}").glob("*.safetensors"))).items()}
        assert held.contents == {**expected, **more}, f"rank {rank}"


def needed_once(loaded: list[Loaded]) -> int:
    demands = loaded[0].prepared.demands
    return sum(d.tensor.meta.dtype.nbytes(prod(d.tensor.meta.shape)) for d in demands)


def wide_source(root: Path, trained: Layout, target: Layout, rows: int = 512, columns: int = 512) -> Load:
    """Four parameters of a MiB each."""
    full = {f"w{n}": np.random.default_rng(n).standard_normal((rows, columns)).astype(np.float32) for n in range(4)}
    strategies = [
        strategy_of(dict.fromkeys(full, layout), root / f"{name}.ckpt")
        for name, layout in (("trained", trained), ("target", target))
    ]
    cut(strategies[0], full, root / "source")
    cut(strategies[1], full, root / "expected")
    return Load(root / "source", strategies[0], strategies[1])

"""A fault in a cooperative load ends it on every rank, soon, with an error that names it; ranks as threads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ms_ckpt_ext.engine.load.slabs import HostSink
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import (
    CheckpointError,
    ChecksumError,
    DisagreementError,
    PeerError,
    StorageError,
    TruncatedFileError,
)
from ms_ckpt_ext.formats.registry import open_reader
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.loads import Load, golden_load


def test_a_different_input_on_one_rank(golden: Path) -> None:
    class Odd(Load):
        def facts(self, rank: int) -> dict[str, str]:
            return {"source strategy": "mine" if rank == 2 else "theirs"}

    load = Odd(
        golden / "dp2_tp4/shards",
        load_strategy(golden / "dp2_tp4/strategy.ckpt"),
        load_strategy(golden / "tp4/strategy.ckpt"),
    )
    for error in load.fail().values():
        assert isinstance(error, DisagreementError)
        assert "'source strategy' on rank 2 is not what it is on ranks 0, 1, 3" in str(error)


def test_a_file_that_one_rank_cannot_open_any_more(golden: Path) -> None:
    class Blind(Load):
        def readers(self, rank: int, catalog: Catalog) -> ReaderPool:
            def refuse(path: str) -> Any:
                return open_reader(path if rank != 1 else path + ".gone")

            return ReaderPool(catalog.files, refuse)

    load = Blind(
        golden / "dp2_tp4/shards",
        load_strategy(golden / "dp2_tp4/strategy.ckpt"),
        load_strategy(golden / "tp4/strategy.ckpt"),
    )
    errors = load.fail()
    assert "No such file or directory" in str(errors[1])
    for rank in (0, 2, 3):
        error = errors[rank]
        assert isinstance(error, PeerError) and error.rank == 1
        assert "No such file or directory" in str(error)


def test_a_truncated_shard(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "dp2_tp4/shards", tmp_path / "source")
    victim = tmp_path / "source/rank_3/net.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    load = golden_load(golden, "dp2_tp4", "tp4")
    load.source = tmp_path / "source"
    errors = load.fail().values()
    assert any(isinstance(error, TruncatedFileError) for error in errors)
    assert all("the tensors end at byte" in str(error) for error in errors)


def test_a_sink_that_refuses(golden: Path) -> None:
    class Refusing(Load):
        def sink(self, rank: int, name: str, sink: HostSink) -> Any:
            class Broken:
                def place(self, *_: Any) -> None:
                    raise CheckpointError(f"{name} is read-only")

            return Broken() if (rank, name) == (2, "layers.1.norm") else sink

    load = Refusing(
        golden / "dp2_tp4/shards",
        load_strategy(golden / "dp2_tp4/strategy.ckpt"),
        load_strategy(golden / "tp4/strategy.ckpt"),
        bucket_bytes=16384,
    )
    errors = load.fail()
    assert all("layers.1.norm is read-only" in str(error) for error in errors.values())
    assert [type(errors[rank]) for rank in (0, 1, 3)] == [PeerError] * 3


def test_a_rank_without_memory_for_its_buffers(golden: Path) -> None:
    """Before the first round, where the others would wait for it."""

    class Full(Load):
        def prepare(self, transport: LocalTransport) -> Any:
            ready = super().prepare(transport)
            if transport.rank == 2:
                transport.allocate = refuse  # type: ignore[method-assign]
            return ready

    def refuse(_nbytes: int) -> Any:
        raise MemoryError

    load = Full(
        golden / "dp2_tp4/shards",
        load_strategy(golden / "dp2_tp4/strategy.ckpt"),
        load_strategy(golden / "tp4/strategy.ckpt"),
    )
    errors = load.fail()
    assert isinstance(errors[2], StorageError) and isinstance(errors[2], MemoryError)
    assert "cannot do the part of rank 2: Cannot allocate memory" in str(errors[2])
    for rank in (0, 1, 3):
        error = errors[rank]
        assert isinstance(error, PeerError) and error.rank == 2 and str(errors[2]) in str(error)


def test_replicas_that_differ_are_found(golden: Path) -> None:
    class Flipping(Load):
        def sink(self, rank: int, name: str, sink: HostSink) -> Any:
            class Flip(HostSink):
                def finish(self) -> None:
                    self.array[7] ^= 1

            return Flip(sink.array, sink.shape, sink.dtype) if (rank, name) == (3, "head.weight") else sink

    load = Flipping(
        golden / "tp4/shards",
        load_strategy(golden / "tp4/strategy.ckpt"),
        load_strategy(golden / "dp2_tp2/strategy.ckpt"),
    )
    for error in load.fail().values():
        assert isinstance(error, ChecksumError)
        assert "'head.weight', region [48:96, 0:24]: rank 1 holds digest" in str(error) and "rank 3" in str(error)

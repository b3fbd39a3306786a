"""How ranks exchange their status round by round: who waits, and what a failed round leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.load.slabs import HostSink
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import PeerError, StorageError
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.checkpoints import read_file
from tests.support.loads import Load, Loaded, wide_source

COLUMNS = Layout((4, 2), ((), (0,)))
TRAINED = Layout((2, 4), ((0,), ()))


class Watched(Load):
    """Records what each rank does, in order: send a status, start an exchange, wait for one, receive a status."""

    overlaps = True

    def rank(self, transport: LocalTransport) -> Loaded:
        self.done = getattr(self, "done", {})
        events = self.done.setdefault(transport.rank, [])
        transport.traits = transport.traits._replace(overlaps=self.overlaps)
        told, started = transport.start_share, transport.start_all_to_all

        def tell(payload: bytes) -> Callable[[], list[bytes]]:
            events.append("tell")
            answers = told(payload)

            def hear() -> list[bytes]:
                events.append("hear")
                return answers()

            return hear

        def start(*arguments: Any) -> Any:
            events.append("start")
            return started(*arguments)

        transport.start_share, transport.start_all_to_all = tell, start  # type: ignore[method-assign]
        return super().rank(transport)


def watched(root: Path, bucket: int, overlaps: bool) -> tuple[int, list[str]]:
    """Rounds of a load, and what a rank did in them."""
    made = wide_source(root, TRAINED, COLUMNS)
    load = Watched(made.source, made.trained, made.target, bucket_bytes=bucket, verify="none")
    load.overlaps = overlaps
    rounds = load.run()[0].report.rounds
    events = load.done[0]
    return rounds, events[events.index("start") - 2 :]


def waits(events: Sequence[str]) -> int:
    """Statuses that are waited for at once: nothing was started since they were told."""
    return sum(pair == ("tell", "hear") for pair in zip(events, events[1:]))


@pytest.mark.parametrize("bucket", [1 << 18, 1 << 20])
def test_nobody_waits_for_a_status_while_rounds_travel(bucket: int, tmp_path: Path) -> None:
    """Two waits, however many rounds: before anything is changed, and at the end. Else one a round.

    One more follows when every rank has looked at its files again.
    """
    looked = ["tell", "hear"]
    rounds, events = watched(tmp_path / "ahead", bucket, overlaps=True)
    assert rounds > 2
    between = ["tell", "start", "hear"] * (rounds - 1)
    assert events == ["tell", "hear", "start", *between, "tell", "hear", *looked]
    assert waits(events) == 2 + 1
    rounds, events = watched(tmp_path / "in turn", bucket, overlaps=False)
    assert events == ["tell", "hear", "start"] * rounds + ["tell", "hear", *looked]
    assert waits(events) == rounds + 1 + 1


class Failing(Load):
    """Rank 1 cannot read any more after this many reads."""

    reads = 0

    def readers(self, rank: int, catalog: Catalog) -> ReaderPool:
        pool = catalog.readers()
        real, left = pool.read_into, [self.reads]

        def read(*arguments: Any) -> Any:
            left[0] -= 1
            if rank == 1 and left[0] < 0:
                raise StorageError("the disk is gone")
            return real(*arguments)

        pool.read_into = read  # type: ignore[method-assign]
        return pool

    def sink(self, rank: int, name: str, sink: HostSink) -> Any:
        self.held = getattr(self, "held", {})
        self.held[rank, name] = sink.array
        return sink


@pytest.mark.parametrize("reads", [0, 3, 9])
def test_of_a_round_that_failed_nothing_is_placed(reads: int, tmp_path: Path) -> None:
    """Others start the round that one could not read for, with what its buffers hold; no byte of it stays."""
    made = wide_source(tmp_path, TRAINED, COLUMNS)
    load = Failing(made.source, made.trained, made.target, bucket_bytes=1 << 18)
    load.reads = reads
    errors = load.fail()
    assert isinstance(errors[1], StorageError)
    assert all(isinstance(error, PeerError) and error.rank == 1 for rank, error in errors.items() if rank != 1)
    landed = 0
    for (rank, name), array in load.held.items():
        wanted = read_file(tmp_path / f"expected/rank_{rank}/net.safetensors")[name].data
        right = array == np.frombuffer(wanted, np.uint8)
        assert (right | (array == 0xAA)).all(), f"rank {rank}, {name}: bytes that were never read"
        landed += int((array != 0xAA).sum())
    assert bool(landed) == bool(reads), "what came before stays"

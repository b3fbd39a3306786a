"""Threads and the readers they share: errors, Ctrl-C, open files, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.io_units import Direct, Unit
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.files import execution
from ms_ckpt_ext.formats.registry import open_reader, read_index
from ms_ckpt_ext.storage.reader import PlainReader, ReaderPool, Traits
from ms_ckpt_ext.storage.sink import MemorySink
from tests.harness.msrun import ROOT
from tests.support.checkpoints import source, strategy_of, tree


def pool_of(root: Path, **more: Any) -> ReaderPool:
    return ReaderPool([read_index(str(p)) for p in sorted(root.glob("shards/*/*.safetensors"))], open_reader, **more)


def test_the_pool_keeps_few_files_open(tmp_path: Path) -> None:
    root, opened = source(tmp_path / "src"), []

    def counting(path: str) -> Any:
        opened.append(path)
        return open_reader(path)

    files = [read_index(str(p)) for p in sorted(root.glob("shards/*/*.safetensors"))] * 8
    with ReaderPool(files, counting, most=3) as pool:

        def read(number: int) -> None:
            buffer = bytearray(8)
            pool.read_into(number % len(files), 0, memoryview(buffer))
            assert int.from_bytes(buffer, "little") < 4096
            assert len(pool._open) <= 3 + 4

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(read, range(400)))
        assert pool.count.reads == 400 and pool.count.nbytes == 3200
        assert len(pool._open) <= 3 and len(opened) > 4
        held = [entry.reader for entry in pool._open.values()]
    assert all(reader.fd is None for reader in held)


def test_the_pool_keeps_to_its_memory(tmp_path: Path) -> None:
    """Eight threads, readers of 64 bytes each and room for three; one of 500 is used alone."""
    files = [read_index(str(p)) for p in sorted(source(tmp_path / "src").glob("shards/*/*.safetensors"))] * 4
    held, most, lock = [0], [0], threading.Lock()

    class Keeping(PlainReader):
        traits = Traits(keeps=64)

        def close(self) -> None:
            with lock:
                held[0] -= getattr(self, "taken", 0)
            super().close()

        def read_into(self, offset: int, buffer: memoryview) -> None:
            with lock:
                if not hasattr(self, "taken"):
                    self.taken = self.traits.keeps
                    held[0] += self.taken
                most[0] = max(most[0], held[0])
            super().read_into(offset, buffer)

    for keeps, limit in ((64, 192), (500, 500)):
        held[0] = most[0] = 0
        Keeping.traits = Traits(keeps=keeps)
        with ReaderPool(files, Keeping, most_bytes=200) as pool, ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: pool.read_into(n % len(files), 0, memoryview(bytearray(8))), range(400)))
            assert pool.count.reads == 400
        assert (most[0], held[0]) == (limit, 0)


def units(count: int, fail_at: int = -1) -> Iterator[Unit]:
    for number in range(count):
        if number == fail_at:
            raise RuntimeError(f"planning failed at unit {number}")
        yield Direct(0, 0, 0, 0, 8)


def workers_left() -> list[threading.Thread]:
    """Python goes on listing threads that the system never ran (other tests make some): they have no identity."""
    return [t for t in threading.enumerate() if t.name.startswith("worker-") and t.ident is not None]


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_of_the_plan_is_raised_and_ends_all_threads(workers: int, tmp_path: Path) -> None:
    with pool_of(source(tmp_path / "src")) as pool:
        sink = MemorySink(np.zeros(8, np.uint8))
        with pytest.raises(RuntimeError, match="planning failed at unit 50"):
            worker.run(units(100, fail_at=50), pool, [sink], workers, lambda *_: None)
    assert not workers_left()


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("error", [OSError("worker"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_an_error_of_a_worker_stops_the_others(workers: int, error: BaseException, tmp_path: Path) -> None:
    done = []

    def landed(sink: int, nbytes: int) -> None:
        done.append(nbytes)
        if len(done) == 20:
            raise error

    with pool_of(source(tmp_path / "src")) as pool:
        sink = MemorySink(np.zeros(8, np.uint8))
        with pytest.raises(type(error)):
            worker.run(units(100_000), pool, [sink], workers, landed)
    assert len(done) < 1000
    assert not workers_left()


def test_ctrl_c_while_waiting_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread may still be writing when the caller closes the files."""
    release, real, interrupted = threading.Event(), threading.Thread.join, []

    def join(thread: threading.Thread, timeout: Optional[float] = None) -> None:
        if thread.name.startswith("worker-") and not interrupted:
            interrupted.append(thread)
            release.set()
            raise KeyboardInterrupt
        real(thread, timeout)

    def landed(sink: int, nbytes: int) -> None:
        if threading.current_thread().name.startswith("worker-"):
            release.wait(10)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pool_of(source(tmp_path / "src")) as pool, pytest.raises(KeyboardInterrupt):
        worker.run(units(2000), pool, [MemorySink(np.zeros(8, np.uint8))], 2, landed)
    assert interrupted and not interrupted[0].is_alive()


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    from ms_ckpt_ext.core.planning.io_units import Limits
    from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
    from ms_ckpt_ext.engine.source.catalog import open_catalog
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    root = source(tmp_path / "src")
    catalog = open_catalog(str(root / "shards"), load_strategy(root / "strategy.ckpt"))
    with pytest.raises(KeyboardInterrupt):
        execution.execute(
            merge_job(catalog, str(tmp_path / "out"), MergeOptions()), str(tmp_path / "out"), 2, Limits(), interrupt
        )
    assert tree(tmp_path / "out") == {} if (tmp_path / "out").exists() else True


def test_more_target_ranks_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    strategy_of({"w": Layout((256,), ((0,), ()))}, tmp_path / "t.ckpt")
    source(tmp_path / "src", rows=256, names=("w",))
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from ms_ckpt_ext import load_distributed_checkpoint
load_distributed_checkpoint(None, None, "t.ckpt", "src/strategy.ckpt", format="safetensors",
    unified_safetensors_dir="src/shards", dst_safetensors_dir="out")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(tree(tmp_path / "out")) == 256

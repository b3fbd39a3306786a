"""The parts below a job: kernel copies, runs at the same time, locks, permissions, order of syncs, sinks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors, load_distributed_checkpoint
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.integrity import manifest
from ms_ckpt_ext.storage import sink
from ms_ckpt_ext.storage.sink import FileSink, MemorySink
from ms_ckpt_ext.storage.staging import Staging
from tests.support.checkpoints import assert_merged, merge, read_merged, source, strategy_of, tree
from tests.support.dying import begun
from tests.support.machine import c_library, copies_by_itself, fails, refuses

ROWS = 1 << 14  # slices of 512 KiB and more: long enough for direct copies


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("large") / "src", rows=ROWS)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's file system copies by itself, as NFS 4.2 does."""
    copies_by_itself(monkeypatch)


def reluctant() -> Callable[..., int]:
    """Copies 1,000 bytes of the first request, then refuses."""
    real, asked = os.copy_file_range, iter([1000])

    def call(source: int, target: int, count: int, *offsets: int) -> int:
        if (some := next(asked, None)) is None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(source, target, min(some, count), *offsets)

    return call


@pytest.mark.parametrize("how", ["EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EPERM", "zero", "after a while", "short"])
@pytest.mark.usefixtures("copying")
def test_a_kernel_that_does_not_copy(how: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("no copy_file_range here")
    real, calls = os.copy_file_range, []
    call: Callable[..., int] = {
        "zero": lambda *_: 0,
        "after a while": reluctant(),
        "short": lambda s, t, count, *at: real(s, t, min(count, 70_001), *at),
    }.get(how) or refuses(getattr(errno, how))

    def counted(*args: Any) -> int:
        calls.append(args)
        return call(*args)

    monkeypatch.setattr(os, "copy_file_range", counted)
    merge(large, tmp_path)
    assert_merged(tmp_path, rows=ROWS)
    assert calls


@pytest.mark.usefixtures("copying")
def test_a_kernel_copy_that_fails_for_good(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuses(errno.EIO))
    with pytest.raises(errors.StorageError, match="cannot copy .* bytes from .* into offset .*Input/output error"):
        merge(large, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_local_file_systems_are_not_asked_to_copy(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuses(errno.EIO))
    with (tmp_path / "f").open("wb") as file:
        if sink.copies_by_itself(file.fileno()):
            pytest.skip("the temporary folder is on a file system that copies by itself")
    merge(large, tmp_path)
    assert_merged(tmp_path, rows=ROWS)


def test_room_is_reserved_although_a_signal_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fallocate(fd: int, *_: Any) -> int:
        calls.append(fd)
        return fails(errno.EINTR)() if len(calls) < 3 else real.fallocate(fd, *_)

    real: Any = c_library(monkeypatch, fallocate=fallocate)
    with closing(FileSink(str(tmp_path / "x"), 5000, sync=False)):
        assert len(calls) == 3
        assert (tmp_path / "x").stat().st_size == 5000


@pytest.mark.parametrize("call", ["no C library", "fallocate"])
def test_without_preallocation(call: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other systems have no fallocate, and network file systems refuse it."""
    refuses = fails(errno.EOPNOTSUPP)
    c_library(monkeypatch, call == "fallocate", fallocate=refuses, sync_file_range=refuses, fstatfs=refuses)
    merge(large, tmp_path)
    assert_merged(tmp_path, rows=ROWS)


def test_a_source_that_changes_during_the_run(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between header and first read, and after the last read."""
    victim = large / "shards" / "rank_2" / "net.safetensors"
    before = victim.stat()

    def touch_then(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns + 5))
            return call(*args)

        return wrapper

    for when in ("the target's room is looked at", "a file is complete"):
        with monkeypatch.context() as patch:
            if when == "a file is complete":
                patch.setattr(os, "fsync", touch_then(os.fsync))
            else:
                patch.setattr(shutil, "disk_usage", touch_then(shutil.disk_usage))
            with pytest.raises(errors.StorageError, match="rank_2.*changed since its header was read.*at rest"):
                merge(large, tmp_path / "out")
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert tree(tmp_path / "out") == {} if (tmp_path / "out").exists() else True
    merge(large, tmp_path / "out")
    assert_merged(tmp_path / "out", rows=ROWS)


def test_what_was_made_of_a_source_that_changed_is_not_kept(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was overwritten while it was read, and put back as it was, with its time: the next run begins anew."""
    victim = large / "shards" / "rank_0" / "net.safetensors"
    before, contents = victim.stat(), victim.read_bytes()
    preadv = os.preadv

    def overwritten(*args: Any) -> Any:
        if victim.read_bytes() == contents:
            victim.write_bytes(contents[:-9000] + bytes(9000))
        return preadv(*args)

    def convert() -> None:
        ms_ckpt_ext.convert(large / "shards", tmp_path / "out", to="ckpt", max_process_num=1)

    with monkeypatch.context() as patch:
        real = shutil.disk_usage

        def room(path: Any) -> Any:
            patch.setattr(os, "preadv", overwritten)
            return real(path)

        patch.setattr(shutil, "disk_usage", room)
        with pytest.raises(errors.StorageError, match="rank_0.*changed since its header was read"):
            convert()
    victim.write_bytes(contents)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    convert()
    assert ms_ckpt_ext.verify(large / "shards" / "rank_0", tmp_path / "out" / "rank_0").ok


def outcomes(jobs: list[Callable[[], Any]]) -> list[Optional[BaseException]]:
    """Start all at once; the error of each, or None."""
    barrier = threading.Barrier(len(jobs))

    def one(job: Callable[[], Any]) -> Optional[BaseException]:
        barrier.wait()
        try:
            job()
        except errors.StorageError as error:
            return error
        return None

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(one, jobs))


@pytest.mark.parametrize("attempt", range(6))
def test_several_jobs_into_one_target(attempt: int, tmp_path: Path) -> None:
    """One runs, and the others run in turn or not at all; the result is never a mixture."""
    roots = [source(tmp_path / f"src_{seed}", seed) for seed in range(3)]
    found = outcomes([lambda root=root: merge(root, tmp_path / "out", part_bytes=9000) for root in roots])  # type: ignore[misc]
    assert None in found
    for error in found:
        assert error is None or (error.errno == errno.EBUSY and "another run is writing into" in str(error))  # type: ignore[attr-defined]
    step = int.from_bytes(read_merged(tmp_path / "out")[1]["global_step"].data, "little")
    assert_merged(tmp_path / "out", step - 7)
    assert found[step - 7] is None
    merge(roots[1], tmp_path / "out")
    assert_merged(tmp_path / "out", 1)


@pytest.mark.parametrize("attempt", range(6))
def test_the_same_job_twice_at_once(attempt: int, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    found = outcomes([lambda: merge(root, tmp_path / "out", part_bytes=9000)] * 3)
    assert None in found and all(error is None or error.errno == errno.EBUSY for error in found)  # type: ignore[attr-defined]
    assert_merged(tmp_path / "out")


@pytest.mark.parametrize("attempt", range(6))
def test_shares_at_the_same_time(attempt: int, tmp_path: Path) -> None:
    """No share takes away what another is writing, and the last one publishes."""
    root = source(tmp_path / "src")
    jobs = [lambda n=n: merge(root, tmp_path / "out", part_bytes=9000, split_dst_file=(n, 4)) for n in range(1, 5)]  # type: ignore[misc]
    assert outcomes(jobs) == [None] * 4
    assert_merged(tmp_path / "out")
    assert merge(root, tmp_path / "out", part_bytes=9000, split_dst_file=(2, 4)).published


def test_a_share_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")
    running = Staging(str(tmp_path / "out"), "1234", manifest, "task-1-of-2")
    running.open(["part0.safetensors", "part1.safetensors"])
    Path(running.partial("part0.safetensors")).write_bytes(b"under way")
    failing = Staging(str(tmp_path / "out"), "1234", manifest, "task-2-of-2")
    failing.open(["part0.safetensors", "part1.safetensors"])
    failing.abandon(["part1.safetensors"])
    failing.close()
    assert Path(running.partial("part0.safetensors")).read_bytes() == b"under way"
    running.close()
    merge(root, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".ms_ckpt_ext"))


def test_ranks_of_a_job_at_the_same_time(tmp_path: Path) -> None:
    """Every rank of an inference job cuts its own file, into one directory."""
    root = source(tmp_path / "src", names=("w",))
    target = strategy_of({"w": Layout((4,), ((0,), ()))}, tmp_path / "t.ckpt")

    def cut(rank: Optional[int], into: str) -> bool:
        done: bool = load_distributed_checkpoint(
            None, None, target, root / "strategy.ckpt", format="safetensors", unified_safetensors_dir=root / "shards",
            dst_safetensors_dir=tmp_path / into, rank_id=rank,
        )  # fmt: skip
        return done

    assert outcomes([lambda rank=rank: cut(rank, "out") for rank in range(4)]) == [None] * 4  # type: ignore[misc]
    cut(None, "expected")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_order_of_syncs_and_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are on disk before a file has its name; every file is in place before the index is."""
    root, log, lock = source(tmp_path / "src"), [], threading.Lock()

    def logged(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            done = real(*args, **more)
            what = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
            with lock:
                log.append((name, os.path.basename(what), what))
            return done

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace"):
        logged(name)
    merge(root, tmp_path / "out", part_bytes=9000)
    parts = [n for n in tree(tmp_path / "out") if n.endswith(".safetensors")]
    events = [(call, base) for call, base, _ in log]
    moved = max(
        i for i, (call, _, what) in enumerate(log) if call == "rename" and what.startswith(str(tmp_path / "out/part"))
    )
    for part in parts:
        assert events.index(("fsync", f"{part}.partial")) < events.index(("rename", part))
    folder_synced = next(i for i, event in enumerate(events) if i > moved and event == ("fsync", "out"))
    true_index = max(i for i, event in enumerate(events) if event == ("replace", "param_name_map.json"))
    index_synced = max(i for i, e in enumerate(events[:true_index]) if e == ("fsync", "param_name_map.json.partial"))
    assert moved < folder_synced < index_synced < true_index
    assert events.index(("replace", ".ms_ckpt_ext.json")) > true_index


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    root, before = source(tmp_path / "src"), os.umask(umask)
    try:
        merge(root, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").glob("*.safetensors")}
    assert modes == {"part0.safetensors": mode, "hyper_param.safetensors": mode}


def test_a_sink_writes_anywhere_and_closes_once(tmp_path: Path) -> None:
    sink = FileSink(str(tmp_path / "f"), 10)
    sink.write(7, memoryview(b"abc"))
    sink.write(0, memoryview(b""))
    sink.finish()
    sink.close()
    assert (tmp_path / "f").read_bytes() == bytes(7) + b"abc"
    with pytest.raises(ValueError, match="flat, contiguous, writable"):
        MemorySink(np.zeros((2, 2), np.uint8))


def test_a_finished_part_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    """What the killed run left is checked: length and header."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    begun(lambda: merge(root, target, part_bytes=9000, max_process_num=1))
    (part,) = target.glob(".ms_ckpt_ext/*/part*.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    report = merge(root, target, part_bytes=9000)
    assert part.name in report.files_written and report.published
    assert_merged(target)
    shutil.rmtree(target)
    begun(lambda: merge(root, target, part_bytes=9000, max_process_num=1))
    kept = {path.name for path in target.glob(".ms_ckpt_ext/*/*.safetensors")}
    assert {*merge(root, target, part_bytes=9000).files_kept} == kept != set()


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")
    merge(root, tmp_path / "warm")
    before = os.listdir("/proc/self/fd")
    merge(root, tmp_path / "good")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuses(errno.EIO))
        with pytest.raises(errors.StorageError):
            merge(root, tmp_path / "bad")
    assert len(os.listdir("/proc/self/fd")) == len(before)

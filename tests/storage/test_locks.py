"""Of two runs that write one file, one goes on: who claims what, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import pytest

from ms_ckpt_ext import errors
from ms_ckpt_ext.api.jobs import reshard
from ms_ckpt_ext.storage.publishing import OBSTACLE
from ms_ckpt_ext.storage.staging import Staging
from tests.support.checkpoints import merge, source
from tests.support.machine import system_call
from tests.support.staged import staged


def cut(root: Path, target: Path, rank: Any = None) -> Any:
    known = root / "strategy.ckpt"
    return reshard(root / "shards", target, strategy=known, to_strategy=known, rank=rank)


def refusing(monkeypatch: pytest.MonkeyPatch, code: int, blocking: bool) -> None:
    """Locks fail: those that do not wait, or those that do."""
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if bool(operation & fcntl.LOCK_NB) != blocking:
            raise OSError(code, os.strerror(code))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_locks(
    code: int, blocking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = source(tmp_path / "src")
    with monkeypatch.context() as patch:
        refusing(patch, code, blocking)
        with pytest.raises(errors.StorageError, match="does not support flock.*mount it with locks.*another") as caught:
            merge(root, tmp_path / "out")
    assert caught.value.errno == code and "another run" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert merge(root, tmp_path / "out").published


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_held(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")
    refusing(monkeypatch, code, blocking=False)
    with pytest.raises(errors.StorageError, match="another run is writing into") as caught:
        merge(root, tmp_path / "out")
    assert caught.value.errno == errno.EBUSY


NETS = [f"rank_{rank}/net.safetensors" for rank in range(4)]


def test_a_lock_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is not taken for a lock that was removed, which is tried again, for ever."""
    root, real, lock = source(tmp_path / "src"), os.stat, tmp_path / "out" / ".ms_ckpt_ext" / ".lock"

    def stat(path: Any, *args: Any, **more: Any) -> Any:
        if str(path) == str(lock):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **more)

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        system_call(patch, "stat", stat)
        with pytest.raises(errors.StorageError, match=r"Input/output error") as caught:
            merge(root, tmp_path / "out")
    assert caught.value.errno == errno.EIO and os.listdir("/proc/self/fd") == before
    assert merge(root, tmp_path / "out").published


def test_all_ranks_and_one_of_them(tmp_path: Path) -> None:
    """A job for all ranks and that of one rank keep each other out; those of two ranks do not."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for running, names, refused in ((target, NETS, 0), (target / "rank_0", ["net.safetensors"], None)):
        staging = staged(running, names)
        with pytest.raises(errors.StorageError, match="another run is writing into.*both write '.*net.saf") as caught:
            cut(root, target, refused)
        assert repr(str(running)) in str(caught.value)
        assert refused is None or not (target / "rank_0").exists()
        if refused is None:
            assert cut(root, target, 1).published
        staging.abandon([])
        staging.close()
    assert cut(root, target).published
    assert not list(target.rglob(".ms_ckpt_ext"))


# (target, names) of one run, and of another: in the same folders, whatever their targets are
PAIRS = [
    (("out", ["a.ckpt"]), ("out", ["b.ckpt"]), False),
    (("out", ["a.ckpt", "b.ckpt"]), ("out", ["b.ckpt", "c.ckpt"]), True),
    (("out", ["rank_0/a.ckpt"]), ("out/rank_0", ["b.ckpt"]), False),
    (("out", ["rank_0/a.ckpt"]), ("out/rank_1", ["a.ckpt"]), False),
    (("out", ["x/y/z/a.ckpt"]), ("out/x/y/z", ["a.ckpt"]), True),
    (("out", ["x/y/z/a.ckpt"]), ("out/x", ["y/z/a.ckpt"]), True),
    (("out", ["x/y/z/a.ckpt"]), ("out/x", ["a.ckpt"]), False),
    (("out", ["rank_0/a.ckpt"]), ("link", ["rank_0/a.ckpt"]), True),
    (("out", ["rank_0/a.ckpt"]), ("link/rank_0", ["a.ckpt"]), True),
    (("out", ["link/a.ckpt"]), ("elsewhere", ["a.ckpt"]), False),
]


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_what_two_runs_write(pair: Any, exchanged: bool, tmp_path: Path) -> None:
    one, other, both = (pair[1], pair[0], pair[2]) if exchanged else pair
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    first = staged(tmp_path / one[0], one[1])
    if both:
        with pytest.raises(errors.StorageError, match="another run is writing into"):
            staged(tmp_path / other[0], other[1], "5678")
        first.abandon([])
        first.close()
    second = staged(tmp_path / other[0], other[1], "5678")
    for staging in (first, second):
        staging.abandon([])
        staging.close()
    assert not list(tmp_path.rglob(".ms_ckpt_ext"))


def test_a_rank_folder_that_is_a_link(tmp_path: Path) -> None:
    """A run through the link sees a run at its target."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/rank_0").symlink_to(tmp_path / "elsewhere")
    for target in ("elsewhere", "out/rank_0"):
        first = staged(tmp_path / target, ["a.ckpt"])
        with pytest.raises(errors.StorageError, match="both write 'rank_0/a.ckpt'"):
            staged(tmp_path / "out", ["rank_0/a.ckpt"], "5678")
        first.close()
    first = staged(tmp_path / "out", ["rank_0/a.ckpt"], "5678")
    with pytest.raises(errors.StorageError, match="both write 'a.ckpt'"):
        staged(tmp_path / "out/rank_0", ["a.ckpt"])
    first.close()


def test_an_index_is_one_of_the_files(tmp_path: Path) -> None:
    """Two merges into one folder, whatever their parts are called; and what a job removes is claimed as well."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    cut(root, tmp_path / "three")
    running = staged(target, ["model.safetensors.index.json", OBSTACLE])
    with pytest.raises(errors.StorageError, match="both write 'publishing-was-interrupted"):
        merge(root, target)
    running.close()
    running = staged(tmp_path / "three", ["rank_3/net.safetensors"])
    with pytest.raises(errors.StorageError, match="both write 'rank_3/net.safetensors'"):
        reshard(root / "shards", tmp_path / "three", strategy=root / "strategy.ckpt")
    running.close()


def test_ranks_beside_a_folder_that_nobody_runs(tmp_path: Path) -> None:
    """What a killed job for all ranks left keeps no rank out, and is kept for its rerun."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    dead = staged(target, NETS)
    (dead.folder / "part0.safetensors").touch()
    dead.close()
    assert cut(root, target, 0).published and cut(root, target, 3).published
    assert (dead.folder / "part0.safetensors").exists()


def test_what_is_left_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A dead job that would write the same files is removed, with a message; one that writes others is kept."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for job, names in (("1234", ["part0.safetensors"]), ("5678", ["other.ckpt"])):
        dead = staged(target, names, job)
        (dead.folder / names[0]).touch()
        dead.close()
    with caplog.at_level("WARNING", "ms_ckpt_ext"):
        merge(root, target)
    assert "drops 1 finished files of another" in caplog.text
    assert [path.name for path in target.glob(".ms_ckpt_ext/*/*.*ckpt")] == ["other.ckpt"]
    assert sorted(path.name for path in (target / ".ms_ckpt_ext").iterdir()) == ["5678", "claims"]
    staged(target, ["other.ckpt"], "5678").discard(["other.ckpt"])


def test_a_claim_that_was_cut_short(tmp_path: Path) -> None:
    """Because its writer died: the line is ignored, and those after it are read."""
    dead = staged(tmp_path, ["a.ckpt"])
    with (tmp_path / ".ms_ckpt_ext/claims").open("ab") as file:
        file.write(b'{"job": "77", "names": ["b.ckpt')
    second = staged(tmp_path, ["b.ckpt"], "5678")
    with pytest.raises(errors.StorageError, match="both write 'b.ckpt'"):
        staged(tmp_path, ["b.ckpt"], "9")
    for staging in (dead, second):
        staging.close()


def test_who_is_refused_keeps_what_an_earlier_run_finished(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    dead = staged(target, ["part0.safetensors"])
    (dead.folder / "part0.safetensors").touch()
    dead.close()
    other = staged(target, ["part1.safetensors"], "5678")
    with pytest.raises(errors.StorageError, match="another run is writing into"):
        merge(root, target, part_bytes=9000)
    with pytest.raises(errors.StorageError, match="another run is writing into"):
        staged(target, ["part0.safetensors", "part1.safetensors"])
    other.close()
    assert (dead.folder / "part0.safetensors").exists()


@pytest.mark.parametrize("running", ["task-1-of-1", "task-3-of-3"])
def test_one_job_shared_out_in_two_ways(running: str, tmp_path: Path) -> None:
    """Tasks of another split would meet those that run in the same files; who comes later is refused."""
    first = staged(tmp_path, ["part0.safetensors"], task=running)
    for share in (1, 2):
        with pytest.raises(errors.StorageError, match="another run .* among another number of tasks"):
            staged(tmp_path, ["part0.safetensors"], task=f"task-{share}-of-2")
    first.close()
    second = staged(tmp_path, ["part0.safetensors"], task="task-2-of-2")
    third = staged(tmp_path, ["part0.safetensors"], task="task-1-of-2")
    assert second.seen() == {"task-1-of-2", "task-2-of-2", running}
    for staging in (second, third):
        staging.abandon([])
        staging.close()


def test_a_target_that_vanishes_while_it_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had been made by a run that has ended meanwhile: it is made again."""
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        shutil.rmtree(tmp_path / "out")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    first = staged(tmp_path / "out", ["a.ckpt"])
    with pytest.raises(errors.StorageError, match="another run is writing into"):
        staged(tmp_path / "out", ["a.ckpt"], "5678")
    first.close()


@pytest.mark.parametrize("place", ["file", "file/below", "dangling", "dangling/below"])
def test_a_target_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(errors.StorageError, match="cannot write into"):
        staged(tmp_path / place, ["a.ckpt"])


@pytest.mark.parametrize("attempt", range(3))
def test_tree_and_folders_at_the_same_time(attempt: int, tmp_path: Path) -> None:
    """Of jobs above and below each other one claims what they share, and never none; those below all may."""
    nets = [f"rank_{rank}/net.ckpt" for rank in range(6)]
    targets = [(tmp_path / "out", nets), *((tmp_path / f"out/rank_{rank}", ["net.ckpt"]) for rank in range(6))]
    barrier = threading.Barrier(len(targets))

    def one(number: int) -> Optional[Staging]:
        barrier.wait()
        try:
            return staged(*targets[number], str(number))
        except errors.StorageError as error:
            assert error.errno == errno.EBUSY
            return None

    with ThreadPoolExecutor(len(targets)) as pool:
        above, *below = pool.map(one, range(len(targets)))
    if above is not None:
        assert below == [None] * 6
    else:
        assert any(below)
    for staging in filter(None, (above, *below)):
        staging.abandon([])
        staging.close()

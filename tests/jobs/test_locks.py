"""One run per target: who holds it, where there are no locks, and targets that are parts of others."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import errors
from ms_ckpt_ext.api.jobs import reshard
from ms_ckpt_ext.storage.hold import Hold
from ms_ckpt_ext.storage.staging import Staging
from tests.jobs.support import assert_merged, merge, source


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


def test_all_ranks_and_one_of_them(tmp_path: Path) -> None:
    """A job for all ranks and that of one rank keep each other out; those of two ranks do not."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for running, refused in ((target, 0), (target / "rank_0", None)):
        staging = Staging(str(running), "1234")
        staging.open()
        with pytest.raises(errors.StorageError, match="another run is writing into") as caught:
            cut(root, target, refused)
        assert repr(str(running)) in str(caught.value)
        assert refused is None or not (target / "rank_0").exists()
        if refused is None:
            assert cut(root, target, 1).published
        staging.abandon([])
        staging.close()
    assert cut(root, target).published


def test_ranks_beside_a_folder_that_nobody_runs(tmp_path: Path) -> None:
    """What a killed job for all ranks left keeps no rank out, and is kept for its rerun."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    left = target / ".ms_ckpt_ext-1234"
    left.mkdir(parents=True)
    (left / "task-1-of-1.lock").touch()
    (left / "part0.safetensors").touch()
    looking = os.open(left / "task-1-of-1.lock", os.O_RDWR)
    try:
        fcntl.flock(looking, fcntl.LOCK_SH)  # another rank that looks at the same time
        assert cut(root, target, 0).published and cut(root, target, 3).published
    finally:
        os.close(looking)
    assert (left / "part0.safetensors").exists()


def test_who_is_refused_keeps_what_an_earlier_run_finished(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target, part_bytes=9000, split_dst_file=(1, 2))
    before = sorted(target.glob(".ms_ckpt_ext-*/part*"))
    other = Staging(str(target / "rank_0"), "1234")
    other.open()
    with pytest.raises(errors.StorageError, match="another run is writing into"):
        merge(root, target, part_bytes=9000, split_dst_file=(1, 2))
    other.close()
    assert sorted(target.glob(".ms_ckpt_ext-*/part*")) == before != []


@pytest.mark.parametrize("running", ["task-1-of-1", "task-3-of-3"])
def test_one_job_shared_out_in_two_ways(running: str, tmp_path: Path) -> None:
    """Tasks of another split would meet those that run in the same files; who comes later is refused."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target, part_bytes=9000, split_dst_file=(1, 2))
    (folder,) = target.glob(".ms_ckpt_ext-*")
    first = Staging(str(target), folder.name.split("-", 1)[1], running)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hold, "_busy_target", lambda self: None)
        first.open()
    for share in (1, 2):
        with pytest.raises(errors.StorageError, match="another run is writing into"):
            merge(root, target, part_bytes=9000, split_dst_file=(share, 2))
    first.close()
    assert merge(root, target, part_bytes=9000, split_dst_file=(2, 2)).published
    assert_merged(target)


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become two other users")
@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_two_users_of_one_target(mask: int, everybodys: Path) -> None:
    """Whatever may be written by whom, a job that another user runs is seen, and is not taken away."""
    target = everybodys / "out"
    target.mkdir()
    os.chown(target, -1, 2000)
    target.chmod(0o2775)

    def staged(job: str) -> Staging:
        staging = Staging(str(target), job)
        staging.open()
        return staging

    def refused() -> None:
        with pytest.raises(errors.StorageError, match="another run is writing into"):
            staged("5678")

    first = as_user(2001, mask, lambda: staged("1234"), stay=True)
    try:
        as_user(2002, mask, refused)
        assert (target / ".ms_ckpt_ext-1234/task-1-of-1.lock").exists()
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)


def as_user(user: int, mask: int, do: Callable[[], Any], stay: bool = False) -> int:
    """Do something in a process of another user, which ends, or stays when it has done it; its number."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(2000)
            os.setuid(user)
            os.umask(mask)
            kept = do()
            os.write(tell, b"done")
            if stay:
                signal.pause()
            del kept
        finally:
            os._exit(1)
    os.close(tell)
    told = os.read(ready, 4)
    os.close(ready)
    if not stay:
        os.waitpid(child, 0)
    assert told == b"done"
    return child


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become two other users")
def test_another_users_folder_that_cannot_be_removed(everybodys: Path) -> None:
    everybodys.chmod(0o777)

    def refused() -> None:
        with pytest.raises(errors.StorageError, match="cannot remove .*5678.*have its owner remove it"):
            Staging(str(everybodys), "1234").open()

    def left() -> None:
        Path(everybodys, ".ms_ckpt_ext-5678").mkdir()
        Path(everybodys, ".ms_ckpt_ext-5678", "part0.safetensors").touch()

    as_user(2001, 0o022, left)
    as_user(2002, 0o022, refused)
    assert (everybodys / ".ms_ckpt_ext-5678/part0.safetensors").exists()


def test_a_folder_that_is_removed_after_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that looked at it before, and has ended when this one looks: the lock is taken anew."""
    staging = Staging(str(tmp_path / "out"), "1234")
    real = Hold._busy_target

    def busy(self: Hold) -> Any:
        monkeypatch.setattr(Hold, "_busy_target", real)
        shutil.rmtree(tmp_path / "out")
        return real(self)

    monkeypatch.setattr(Hold, "_busy_target", busy)
    staging.open()
    with pytest.raises(errors.StorageError, match="another run is writing into"):
        Staging(str(tmp_path / "out"), "5678").open()
    staging.close()

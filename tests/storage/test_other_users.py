"""Jobs of several users that write into one target."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import errors
from tests.support.staged import staged


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        # Root may not empty folders of others (see tests/harness/permissions.py), and takes them over.
        for parent, folders, _ in os.walk(folder):
            for name in folders:
                os.chown(os.path.join(parent, name), 0, -1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become two other users")
@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_two_users_of_one_target(mask: int, everybodys: Path) -> None:
    """Whatever may be written by whom, files that another user's run writes are seen, and others can be written."""
    target = everybodys / "out"
    target.mkdir()
    os.chown(target, -1, 2000)
    target.chmod(0o2775)

    def refused() -> None:
        with pytest.raises(errors.StorageError, match="another run is writing into"):
            staged(target, ["a.ckpt"], "5678")
        other = staged(target, ["b.ckpt"], "5678")
        other.abandon([])
        other.close()

    first = as_user(2001, mask, lambda: staged(target, ["a.ckpt"]), stay=True)
    try:
        as_user(2002, mask, refused)
        assert (target / ".ms_ckpt_ext/1234/task-1-of-1.lock").exists()
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
    everybodys.chmod(0o1777)

    def refused() -> None:
        with pytest.raises(errors.StorageError, match="cannot remove .*5678.*have its owner remove it"):
            staged(everybodys, ["part0.safetensors"])
        other = staged(everybodys, ["part1.safetensors"])
        other.abandon([])
        other.close()

    def left() -> None:
        dead = staged(everybodys, ["part0.safetensors"], "5678")
        (dead.folder / "part0.safetensors").touch()
        dead.close()

    as_user(2001, 0o022, left)
    as_user(2002, 0o022, refused)
    assert (everybodys / ".ms_ckpt_ext/5678/part0.safetensors").exists()

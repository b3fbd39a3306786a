"""Bad places: full and refusing disks, files that may not be read; nothing is left that looks complete."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import errors, unified_safetensors
from ms_ckpt_ext.storage import sink
from tests.jobs.support import (
    arrays,
    assert_nothing_complete,
    read_merged,
    source,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_disk_too_small(small_disk: Path, tmp_path: Path) -> None:
    root = source(tmp_path / "src", rows=1024)  # 512 KiB
    with pytest.raises(errors.StorageError, match="needs .* bytes for this job, its file system has .* free") as caught:
        unified_safetensors(root / "shards", root / "strategy.ckpt", small_disk / "out")
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_disk_full_on_the_way_and_a_rerun(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space is there when the job looks, and gone when it writes: finished parts are kept and used."""
    root = source(tmp_path / "src", rows=320)  # 4 x 40 KiB
    (small_disk / "ballast").write_bytes(bytes(100_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    options = {"part_bytes": 41_000, "max_process_num": 1}
    with pytest.raises(errors.StorageError, match="No space left on device; free some space"):
        unified_safetensors(root / "shards", root / "strategy.ckpt", small_disk / "out", **options)
    assert_nothing_complete(small_disk / "out")
    (small_disk / "ballast").unlink()
    unified_safetensors(root / "shards", root / "strategy.ckpt", small_disk / "out", **options)
    assert {n: t.data for n, t in read_merged(small_disk / "out")[0].items()} == {
        n: a.tobytes() for n, a in arrays(0, 320).items()
    }


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["preallocate", "pwrite", "fsync"])
def test_the_disk_refuses(code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")

    def refuse(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(sink if call == "preallocate" else os, call, refuse)
        with pytest.raises(errors.StorageError, match=os.strerror(code)) as caught:
            unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out")
        assert caught.value.errno == code
    assert_nothing_complete(tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").glob(".ms_ckpt_ext-*"))
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out")
    assert read_merged(tmp_path / "out")[0].keys() == arrays(0).keys()


def test_an_unreadable_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")
    real = os.preadv

    def fail(fd: int, buffers: Any, offset: int) -> int:
        if offset > 2000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with pytest.raises(errors.StorageError, match="cannot read .* bytes at offset .* of .*rank_.*Input/output error"):
        unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out")
    assert_nothing_complete(tmp_path / "out")


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    root = source(tmp_path / "src")
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(errors.StorageError, match="Permission denied; check the permissions"):
        unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "locked" / "out")

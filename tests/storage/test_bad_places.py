"""Bad places: full and refusing disks, files that may not be read; nothing is left that looks complete."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors, transform_checkpoints, unified_safetensors
from ms_ckpt_ext.api.jobs import reshard
from ms_ckpt_ext.engine.integrity.manifest import Manifest
from ms_ckpt_ext.engine.resume.sightings import look
from tests.support.checkpoints import (
    arrays,
    assert_merged,
    assert_nothing_complete,
    merge,
    read_merged,
    source,
    tree,
)
from tests.support.machine import c_library, fails, refuses, system_call


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("the command `mount` is not here")
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
@pytest.mark.parametrize("call", ["fallocate", "pwrite", "fsync"])
def test_the_disk_refuses(code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")

    with monkeypatch.context() as patch:
        if call == "fallocate":
            c_library(patch, fallocate=fails(code))
        else:
            patch.setattr(os, call, refuses(code))
        with pytest.raises(errors.StorageError, match=os.strerror(code)) as caught:
            unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out")
        assert caught.value.errno == code
    assert_nothing_complete(tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").glob(".ms_ckpt_ext"))
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


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As for somebody who has no read permission for a folder."""
    for name in ("listdir", "scandir"):
        real = getattr(os, name)

        def refusing(path: Any = ".", real: Any = real) -> Any:
            if not isinstance(path, int) and os.fspath(path) == str(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path)

        system_call(monkeypatch, name, refusing)


def refuse_to_look(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As for somebody who may list a folder but not search it: everything in it is nameless to `stat`."""
    real = os.stat

    def stat(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if isinstance(path, (str, os.PathLike)) and Path(path).parent == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **more)

    system_call(monkeypatch, "stat", stat)


@pytest.mark.parametrize("refuse", [refuse_to_list, refuse_to_look])
@pytest.mark.parametrize("where", ["shards", "shards/rank_2"])
def test_a_source_that_may_not_be_looked_into(
    where: str, refuse: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = source(tmp_path / "src")
    refuse(monkeypatch, root / where)
    for call in (
        lambda: unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "out"),
        lambda: transform_checkpoints(root / "shards", tmp_path / "out", "net", root / "strategy.ckpt"),
        lambda: ms_ckpt_ext.load(root / "shards", root / "strategy.ckpt"),
        lambda: ms_ckpt_ext.load(root / "shards"),
    ):
        with pytest.raises(errors.StorageError, match=f"cannot look into '.*{where}': Permission denied; check the p"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["", "rank_2"])
def test_a_tree_that_may_not_be_looked_into(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is skipped without a message."""
    shards = source(tmp_path / "src") / "shards"
    (shards / "ms_ckpt_ext.digests.json").write_bytes(Manifest({}).to_json())
    refuse_to_list(monkeypatch, shards / where)
    for call in (
        lambda: ms_ckpt_ext.convert(shards, tmp_path / "out", to="ckpt"),
        lambda: ms_ckpt_ext.safetensors_to_ckpt(shards, tmp_path / "out"),
        lambda: ms_ckpt_ext.encrypt(shards, tmp_path / "out", enc_key=b"k" * 16),
        lambda: ms_ckpt_ext.inspect(shards),
        lambda: ms_ckpt_ext.verify(shards, manifest=True),
        lambda: look(str(shards), None),
    ):
        with pytest.raises(errors.StorageError, match=f"cannot look into '.*{where or 'shards'}': Permission denied"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_file_system_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the root of a disk there is `lost+found`, which only root may read."""
    root = source(tmp_path / "src")
    shards = root / "shards"
    (shards / "lost+found").mkdir()
    (shards / "ms_ckpt_ext.digests.json").write_bytes(Manifest({}).to_json())
    refuse_to_list(monkeypatch, shards / "lost+found")
    for call in (
        lambda: unified_safetensors(shards, root / "strategy.ckpt", tmp_path / "merged"),
        lambda: transform_checkpoints(shards, tmp_path / "cut", "net", root / "strategy.ckpt"),
        lambda: ms_ckpt_ext.load(shards, root / "strategy.ckpt"),
        lambda: ms_ckpt_ext.inspect(shards),
        lambda: ms_ckpt_ext.verify(shards, strategy=root / "strategy.ckpt"),
        lambda: look(str(shards), None),
    ):
        call()
    assert [r.getMessage() for r in caplog.records if "lost+found' is passed over" in r.getMessage()] != []
    caplog.clear()
    assert len(ms_ckpt_ext.verify(shards, manifest=True).unlisted) == 4  # type: ignore[union-attr]
    ms_ckpt_ext.convert(shards, tmp_path / "out", to="ckpt")
    assert len(list((tmp_path / "out").glob("rank_*/*.ckpt"))) == 4
    assert len([r for r in caplog.records if "lost+found' is passed over" in r.getMessage()]) == 2


def test_a_merged_source_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "net.ckpt").write_bytes(b"")
    real = open

    def refuse(path: Any, *args: Any, **more: Any) -> Any:
        if str(path).endswith("net.ckpt"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **more)

    with monkeypatch.context() as patched, pytest.raises(errors.StorageError, match="cannot read '.*net.ckpt': Permi"):
        patched.setattr(builtins, "open", refuse)
        ms_ckpt_ext.load(tmp_path / "merged")
    refuse_to_list(monkeypatch, tmp_path / "merged")
    with pytest.raises(errors.StorageError, match="cannot look into '.*merged': Permission denied"):
        ms_ckpt_ext.load(tmp_path / "merged")


def test_a_target_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    target.mkdir()
    refuse_to_list(monkeypatch, target)
    for call in (
        lambda: unified_safetensors(root / "shards", root / "strategy.ckpt", target),
        lambda: transform_checkpoints(root / "shards", target, "net", root / "strategy.ckpt"),
    ):
        with pytest.raises(errors.StorageError, match="cannot look for an older result in '.*out': Permission denied"):
            call()


def test_no_permission(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(errors.StorageError, match="Permission denied; check the permissions"):
        unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "locked" / "out")


@pytest.mark.parametrize("in_the_way", ["part1.safetensors", "param_name_map.json"])
def test_what_stands_in_the_way_of_a_result(in_the_way: str, tmp_path: Path) -> None:
    """The old result is there until the new one can be; then the same command finishes."""
    old, new, target = source(tmp_path / "old", 0), source(tmp_path / "new", 1), tmp_path / "out"
    merge(old, target)
    (target / in_the_way).unlink(missing_ok=True)
    (target / in_the_way).mkdir()
    before = tree(target)
    with pytest.raises(errors.StorageError, match=f"{in_the_way}' stands where a file .* belongs; move it away"):
        merge(new, target, part_bytes=9000)
    assert tree(target) == before
    (target / in_the_way).rmdir()
    again = merge(new, target, part_bytes=9000)
    assert again.published and again.bytes_written == 0
    assert_merged(target, 1)


@pytest.mark.parametrize("as_folder", [True, False])
def test_what_stands_in_the_way_of_a_rank(as_folder: bool, tmp_path: Path) -> None:
    old, new, target = source(tmp_path / "old", 0), source(tmp_path / "new", 1), tmp_path / "out"
    known = old / "strategy.ckpt"
    reshard(old / "shards", target, strategy=known, to_strategy=known)
    (obstacle,) = (target / "rank_2").iterdir()
    obstacle.unlink()
    if as_folder:
        obstacle.mkdir()
    else:
        (target / "rank_2").rmdir()
        (target / "rank_2").touch()
    before = tree(target)
    with pytest.raises(errors.StorageError, match="rank_2.* stands where a .* of the result belongs"):
        reshard(new / "shards", target, strategy=known, to_strategy=known)
    assert tree(target) == before


@pytest.mark.parametrize(("ending", "call"), [(".note", "write_bytes"), ("", "rename")])
def test_a_disk_without_room_for_small_things(
    ending: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    write, rename = Path.write_bytes, os.rename

    def refused(path: Path) -> None:
        if str(path).endswith(".safetensors" + ending):
            raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as patch:
        if call == "rename":
            patch.setattr(os, "rename", lambda old, new: refused(new) or rename(old, new))
        else:
            patch.setattr(Path, "write_bytes", lambda path, data: refused(path) or write(path, data))
        with pytest.raises(errors.StorageError, match="part0.safetensors.*No space left on device; free some space"):
            merge(root, target)
    assert_nothing_complete(target)
    assert merge(root, target).published


@pytest.mark.parametrize("length", [243, 300])
def test_a_name_that_is_too_long(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before anything is written."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    known = root / "strategy.ckpt"
    c_library(monkeypatch, fallocate=lambda *_: pytest.fail("room was reserved"))
    with pytest.raises(errors.StorageError, match=f"File name too long: it has {length + 13} bytes.*takes 255"):
        transform_checkpoints(root / "shards", target, "n" * length, known, known, output_format="safetensors")
    assert not target.exists()

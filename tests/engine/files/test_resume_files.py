"""What an interrupted run left: compared with what was written, found under any spelling of the source, or dropped."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import unified_safetensors
from ms_ckpt_ext.engine.files.job import job_fingerprint
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import arrays, read_merged, source
from tests.support.dying import begun
from tests.support.machine import ReadMade


def merge(root: Path, target: Path, share: Any = (), **more: Any) -> Any:
    options: dict[str, Any] = {"part_bytes": 9000, "split_dst_file": share, **more}
    return unified_safetensors(root / "shards", root / "strategy.ckpt", target, **options)


def staged(target: Path) -> list[Path]:
    return sorted(target.glob(".ms_ckpt_ext/*/part*.safetensors"))


def assert_merged(target: Path) -> None:
    assert {n: t.data for n, t in read_merged(target)[0].items()} == {n: a.tobytes() for n, a in arrays(0).items()}


def digested(reads: list[ReadMade]) -> list[str]:
    """Names of staged files, each as often as its contents were read: more than was looked at first, the header."""
    heads: dict[str, int] = {}
    found = []
    for path, offset, nbytes in reads:
        if ".ms_ckpt_ext" in path and offset <= heads.setdefault(path, offset + nbytes) < offset + nbytes:
            found.append(os.path.basename(path))
    return found


def flip(path: Path) -> None:
    """One bit of the last tensor: size and header stay."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def test_a_damaged_bit_is_written_again(tmp_path: Path, reads: list[ReadMade]) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    begun(lambda: merge(root, target, (2, 2)))
    of_the_other = {*staged(target)}
    merge(root, target, (1, 2))
    assert digested(reads) == []
    damaged, whole = sorted({*staged(target)} - of_the_other)
    flip(damaged)
    report = merge(root, target, (1, 2))
    assert report.files_written == (damaged.name,) and whole.name in report.files_kept
    assert sorted(digested(reads)) == sorted(["hyper_param.safetensors", damaged.name, whole.name])
    assert merge(root, target, (2, 2)).published
    assert_merged(target)


def test_a_file_that_is_gone_bad_is_not_read_twice(tmp_path: Path, reads: list[ReadMade]) -> None:
    """An uninterrupted run reads nothing extra, and neither does a rerun of a published result."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target)
    merge(root, target)
    merge(source(tmp_path / "more", 1), target)
    assert digested(reads) == []
    merge(root, target, (1, 2))
    merge(root, target, (2, 2))
    assert digested(reads) == []


def test_without_digests_size_and_framing_must_do(tmp_path: Path, reads: list[ReadMade]) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target, (1, 2), digests=False)
    assert merge(root, target, (1, 2), digests=False).files_written == ()
    assert digested(reads) == []


def test_any_spelling_of_the_source_is_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    begun(lambda: merge(root, target, (3, 3)), files=0)
    merge(root, target, (1, 3))
    kept = staged(target)
    assert merge(Path("src"), target, (1, 3)).files_written == ()
    merge(tmp_path / "link", target, (2, 3))
    assert set(kept) < set(staged(target))
    assert merge(Path("link"), target, (3, 3)).published
    assert_merged(target)


def test_another_mount_point_is_the_same_job_and_other_files_are_not(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    shutil.copytree(root, tmp_path / "mnt/here/src", copy_function=shutil.copy2)

    def identity(where: Path) -> str:
        catalog = open_catalog(str(where / "shards"), load_strategy(where / "strategy.ckpt"))
        return job_fingerprint(merge_job(catalog, str(tmp_path / "out"), MergeOptions()))

    before = identity(root)
    assert identity(tmp_path / "mnt/here/src") == before
    os.utime(root / "shards/rank_1/net.safetensors", (1, 1))
    assert identity(root) != before
    (root / "shards/rank_0/net.safetensors").rename(root / "shards/rank_0/other.safetensors")
    assert identity(root) != before


def test_who_drops_finished_files_of_another_job_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    begun(lambda: merge(root, target, (2, 2)))
    merge(root, target, (1, 2))
    count = len(staged(target)) + 1  # and the training scalars
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        merge(root, target, (1, 2))
        assert caplog.messages == []
        merge(root, target, (1, 2), part_bytes=20_000)
    said = caplog.messages[0]
    assert f"drops {count} finished files" in said and "source, layouts or options" in said and str(target) in said


def test_a_lock_that_could_not_be_removed_is_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target was read-only just then; the same command finds all in place, and leaves nothing of the first."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith(".digests.json.lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        merge(root, target, digests=True)
    assert [path.name for path in target.glob("*.lock")] == [".ms_ckpt_ext.digests.json.lock"]
    merge(root, target, digests=True)
    assert not [*target.glob("*.lock")]
    assert_merged(target)

"""A merge in shares: in any order, by any launcher."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.api.jobs import share_of
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import load_manifest
from ms_ckpt_ext.errors import CheckpointError, UsageError
from ms_ckpt_ext.storage import publishing
from tests.support.checkpoints import assert_merged, merge, read_merged, source, tree
from tests.support.dying import begun

SMALL = {"part_bytes": 8192}


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_shares_in_any_order_give_the_same_files(tasks: int, tmp_path: Path) -> None:
    """Before the last, what is there does not load, and the error names what is missing."""
    root = source(tmp_path / "src")
    merge(root, tmp_path / "whole", split_dst_file=(), **SMALL)
    for order in itertools.islice(itertools.permutations(range(1, tasks + 1)), 0, None, max(1, tasks)):
        target = tmp_path / "-".join(map(str, order))
        for n in order:
            report = merge(root, target, split_dst_file=(n, tasks), **SMALL)
            assert report.files_written and report.files_kept == ()
            assert report.published is (n == order[-1]) is not bool(report.missing)
            assert tree(target).items() <= tree(tmp_path / "whole").items()
            for name in report.missing:
                assert not (target / name).exists()
                with pytest.raises(CheckpointError, match="part|hyper" if "hyper" in name else name):
                    ms_ckpt_ext.load(target)
        assert tree(target) == tree(tmp_path / "whole")
        assert load_manifest(str(target)) == load_manifest(str(tmp_path / "whole"))
        again = merge(root, target, split_dst_file=(order[0], tasks), **SMALL)
        assert again.published and again.bytes_written == 0 and again.bytes_read == 0
        assert not (target / ".ms_ckpt_ext").exists()


@pytest.mark.parametrize(
    ("form", "naming"), [("safetensors", "mindspore"), ("safetensors", "huggingface"), ("ckpt", "mindspore")]
)
def test_shares_on_disks_of_their_own(form: str, naming: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each publishes what it has, says what is missing, and does not load by itself; gathered they are the whole."""
    root = source(tmp_path / "src")
    options: dict[str, Any] = {"output_format": form, "naming": naming, **SMALL}
    merge(root, tmp_path / "whole", **options)
    for n in (1, 2, 3):
        disk = tmp_path / f"disk{n}"
        with caplog.at_level("WARNING", "ms_ckpt_ext"):
            report = merge(root, disk, split_dst_file=(n, 3), **options)
        assert not report.published and {*report.missing} == tree(tmp_path / "whole").keys() - tree(disk).keys()
        assert f"it is complete with {', '.join(report.missing)}" in caplog.text
        assert [*publishing.read_published(disk).missing.values()] == [sorted(report.missing)]
        assert tree(disk).items() <= tree(tmp_path / "whole").items() and report.files_written
        with pytest.raises(CheckpointError, match=re.escape(next(m for m in report.missing if "hyper" not in m))):
            ms_ckpt_ext.load(disk)
        held = load_manifest(str(disk))
        assert held is not None and check_digests(str(disk), held) == [] and {*held.files} == {*report.files_written}
        again = merge(root, disk, split_dst_file=(n, 3), **options)
        assert (again.bytes_written, again.published, again.missing) == (0, False, report.missing)
        assert not (disk / ".ms_ckpt_ext").exists()
        shutil.copytree(disk, tmp_path / "gathered", ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    assert tree(tmp_path / "gathered") == tree(tmp_path / "whole")
    found, expected = ms_ckpt_ext.load(tmp_path / "gathered"), ms_ckpt_ext.load(tmp_path / "whole")
    assert {n: found[n][...].tobytes() for n in found} == {n: expected[n][...].tobytes() for n in expected}


def test_gathered_where_one_share_is(tmp_path: Path) -> None:
    """What was put beside a share stays when its command is run again, which has nothing to do."""
    root, one, two = source(tmp_path / "src"), tmp_path / "one", tmp_path / "two"
    for n, disk in ((1, one), (2, two)):
        merge(root, disk, split_dst_file=(n, 2), **SMALL)
    for path in two.glob("[!.]*"):
        shutil.copy(path, one)
    assert_merged(one)
    assert merge(root, one, split_dst_file=(1, 2), **SMALL).bytes_written == 0
    assert_merged(one)
    assert merge(root, one, split_dst_file=(2, 2), **SMALL).published
    assert_merged(one)
    assert load_manifest(str(one)) is not None


def test_two_of_three_on_one_disk(tmp_path: Path) -> None:
    root, one, two = source(tmp_path / "src"), tmp_path / "one", tmp_path / "two"
    for n, disk in ((3, one), (2, two), (1, one)):
        report = merge(root, disk, split_dst_file=(n, 3), **SMALL)
    assert not report.published and report.missing
    shutil.copytree(two, one, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    assert_merged(one)


def test_shares_that_see_each_other_appear_together(tmp_path: Path) -> None:
    """A share that died is waited for; until it is run again, the older result stays."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(source(tmp_path / "old", 1), target)
    before = tree(target)
    begun(lambda: merge(root, target, split_dst_file=(1, 2), **SMALL))
    report = merge(root, target, split_dst_file=(2, 2), **SMALL)
    assert not report.published and report.missing and tree(target) == before
    assert_merged(target, 1)
    report = merge(root, target, split_dst_file=(1, 2), **SMALL)
    assert report.published and report.files_kept
    assert_merged(target)


def test_a_share_alone_over_an_older_result(tmp_path: Path) -> None:
    """Nothing of the older result can be taken for a part of the new one, also under names of missing parts."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(source(tmp_path / "old", 1), target, **SMALL)
    report = merge(root, target, split_dst_file=(1, 2), **SMALL)
    assert not report.published and not {*tree(target)} & {*report.missing}
    with pytest.raises(CheckpointError, match=report.missing[0]):
        ms_ckpt_ext.load(target)
    assert merge(root, target, split_dst_file=(2, 2), **SMALL).published
    assert_merged(target)


def test_a_share_of_another_source(tmp_path: Path) -> None:
    """Shares of two checkpoints are never put together."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(source(tmp_path / "old", 1), target, split_dst_file=(1, 2), **SMALL)
    report = merge(root, target, split_dst_file=(2, 2), **SMALL)
    assert not report.published
    with pytest.raises(CheckpointError, match="part0"):
        ms_ckpt_ext.load(target)
    merge(root, target, split_dst_file=(1, 2), **SMALL)
    assert_merged(target)


def test_more_shares_than_parameters(tmp_path: Path) -> None:
    root = source(tmp_path / "src", names=("a", "b"))
    reports = [merge(root, tmp_path / "out", split_dst_file=(n, 6)) for n in range(1, 7)]
    assert [report.published for report in reports].count(True) >= 1 and reports[-1].published
    assert read_merged(tmp_path / "out")[0].keys() == {"a", "b"}


LAUNCHERS = [
    ("RANK_ID", "RANK_SIZE"),
    ("RANK_ID", "MS_WORKER_NUM"),
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in LAUNCHERS:
        for name in names:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(("rank_of", "world_of"), LAUNCHERS)
def test_share_from_the_launcher(rank_of: str, world_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")
    monkeypatch.setenv(world_of, "2")
    for rank in "10":
        monkeypatch.setenv(rank_of, rank)
        report = merge(root, tmp_path / "out", split_dst_file="auto")
        assert report.published is (rank == "0")
    assert_merged(tmp_path / "out", 0)


@pytest.mark.usefixtures("no_launcher")
def test_the_launcher_that_started_this_process_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM starts msrun once on a node, and that starts the ranks."""
    for rank, world in reversed(LAUNCHERS):
        monkeypatch.setenv(rank, str(LAUNCHERS.index((rank, world))))
        monkeypatch.setenv(world, "9")
        assert share_of("auto", "share") == (LAUNCHERS.index((rank, world)) + 1, 9)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("share", [(1, 2, 3), "1/2", (1.0, 2)])
def test_a_share_that_is_none(share: Any, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    with pytest.raises(UsageError, match="share must be .* or 'auto'"):
        ms_ckpt_ext.merge(root / "shards", tmp_path / "out", strategy=root / "strategy.ckpt", share=share)
    ms_ckpt_ext.merge(root / "shards", tmp_path / "out", strategy=root / "strategy.ckpt", share="auto")


@pytest.mark.usefixtures("no_launcher")
def test_no_launcher_or_a_strange_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source(tmp_path / "src")
    assert merge(root, tmp_path / "out", split_dst_file="auto").published
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="'auto' needs numbers in RANK='one', WORLD_SIZE='2'"):
        merge(root, tmp_path / "out", split_dst_file="auto")


def test_a_finished_share_again_while_the_last_one_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the result there, and leaves nothing of its own."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    begun(lambda: merge(root, target, split_dst_file=(2, 2), **SMALL))
    merge(root, target, split_dst_file=(1, 2), **SMALL)
    real = os.open

    def opened(path: Any, *args: Any, **more: Any) -> int:
        """Before the first note of a finished file is read: the other share publishes."""
        if str(path).endswith(".note"):
            monkeypatch.setattr(os, "open", real)
            assert merge(root, target, split_dst_file=(2, 2), **SMALL).published
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", opened)
    again = merge(root, target, split_dst_file=(1, 2), **SMALL)
    assert os.open is real
    assert again.published and again.bytes_written == 0
    assert_merged(target)
    assert not list(target.glob(".ms_ckpt_ext"))


def test_what_a_share_writes_again_is_published_by_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    begun(lambda: merge(root, target, split_dst_file=(2, 2), **SMALL))
    merge(root, target, split_dst_file=(1, 2), **SMALL)
    (damaged,) = target.glob(".ms_ckpt_ext/*/part0.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    real = shutil.disk_usage

    def disk_usage(path: Path) -> Any:
        """Before the first byte is written: another share comes to its end."""
        monkeypatch.setattr(shutil, "disk_usage", real)
        assert not merge(root, target, split_dst_file=(2, 2), **SMALL).published
        return real(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert merge(root, target, split_dst_file=(1, 2), **SMALL).published
    assert_merged(target)


def test_a_published_part_that_was_changed(tmp_path: Path) -> None:
    """It alone is written again; of the share's own, and of the other's, which only that can."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for n in (1, 2):
        report = merge(root, target, split_dst_file=(n, 2), **SMALL)
    part = target / report.files_written[0]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    one = merge(root, target, split_dst_file=(1, 2), **SMALL)
    assert (one.bytes_written, one.published, one.missing) == (0, False, (part.name,))
    two = merge(root, target, split_dst_file=(2, 2), **SMALL)
    assert two.files_written == (part.name,) and two.published
    assert_merged(target)

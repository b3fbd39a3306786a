"""A merge in shares: in any order, by any launcher."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.api.share import share_of
from ms_ckpt_ext.engine import offline
from ms_ckpt_ext.errors import UsageError
from tests.jobs.support import assert_merged, merge, read_merged, source, tree


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_shares_in_any_order_give_the_same_files(tasks: int, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    merge(root, tmp_path / "whole", part_bytes=8192, split_dst_file=())
    for order in itertools.islice(itertools.permutations(range(1, tasks + 1)), 0, None, max(1, tasks)):
        target = tmp_path / "-".join(map(str, order))
        reports = [merge(root, target, part_bytes=8192, split_dst_file=(n, tasks)) for n in order]
        assert [report.published for report in reports] == [False] * (tasks - 1) + [True]
        assert sum((report.files_written for report in reports), ()) and all(r.files_kept == () for r in reports)
        assert tree(target) == tree(tmp_path / "whole")
        again = merge(root, target, part_bytes=8192, split_dst_file=(order[0], tasks))
        assert again.published and again.bytes_written == 0 and again.bytes_read == 0
        assert not list(target.glob(".ms_ckpt_ext"))


def test_before_the_last_share_nothing_is_seen(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    for share in (3, 1):
        merge(root, tmp_path / "out", part_bytes=8192, split_dst_file=(share, 3))
        assert tree(tmp_path / "out") == {}


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
    merge(root, target, part_bytes=8192, split_dst_file=(1, 2))
    real = offline.is_done

    def is_done(*args: Any) -> bool:
        monkeypatch.setattr(offline, "is_done", real)
        assert merge(root, target, part_bytes=8192, split_dst_file=(2, 2)).published
        return False

    monkeypatch.setattr(offline, "is_done", is_done)
    again = merge(root, target, part_bytes=8192, split_dst_file=(1, 2))
    assert again.published and again.bytes_written == 0
    assert_merged(target)
    assert not list(target.glob(".ms_ckpt_ext"))


def test_what_a_share_writes_again_is_published_by_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target, part_bytes=8192, split_dst_file=(1, 2))
    (damaged,) = target.glob(".ms_ckpt_ext/*/part0.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    real = offline._fill

    def fill(*args: Any) -> Any:
        monkeypatch.setattr(offline, "_fill", real)
        assert not merge(root, target, part_bytes=8192, split_dst_file=(2, 2)).published
        return real(*args)

    monkeypatch.setattr(offline, "_fill", fill)
    assert merge(root, target, part_bytes=8192, split_dst_file=(1, 2)).published
    assert_merged(target)

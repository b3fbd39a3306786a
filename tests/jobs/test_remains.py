"""Killed while publishing, and then another job into that target: nothing of the first is left, or nothing loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest

from ms_ckpt_ext import CheckpointError, convert, training_scalars, transform_checkpoint_by_rank, unified_safetensors
from ms_ckpt_ext.api.jobs import reshard
from ms_ckpt_ext.storage import remains, staging
from tests.jobs.support import read_merged, source, tree


class Killed(BaseException):
    """No handler of the package is to tidy up after it."""


def merge(root: Path, target: Path, **more: Any) -> Any:
    options: dict[str, Any] = {"part_bytes": 9000, **more}
    return unified_safetensors(root / "shards", root / "strategy.ckpt", target, **options)


def cut(root: Path, target: Path, **more: Any) -> Any:
    strategy = root / "strategy.ckpt"
    return reshard(root / "shards", target, strategy=strategy, to_strategy=strategy, **more)


def killed_while_moving(root: Path, target: Path, moves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that dies after `moves` of its files are in place."""
    real, left = staging.os.rename, [moves]

    def rename(old: Path, new: Path) -> None:
        if Path(new).parent == target and (left := left_moves()) < 0:
            raise Killed(left)
        real(old, new)

    def left_moves() -> int:
        left[0] -= 1
        return left[0]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(staging.os, "rename", rename)
        patch.setattr(staging.Staging, "abandon", lambda *_: None)
        merge(root, target)
    assert (target / remains.OBSTACLE).exists() and remains.is_unfinished(target / "param_name_map.json")


@pytest.mark.parametrize("moves", [1, 3])
def test_another_job_takes_away_what_was_moved(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(source(tmp_path / "old", 1), target, part_bytes=20_000)
    killed_while_moving(root, target, moves, monkeypatch)
    cut(root, target)
    assert sorted(tree(target)) == [f"rank_{rank}/net.safetensors" for rank in range(4)]


def test_a_third_job_inherits_what_the_second_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_while_moving(root, target, 1, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(staging.Staging, "publish", lambda *_: (_ for _ in ()).throw(Killed()))
        cut(root, target)
    assert (target / remains.OBSTACLE).exists()
    with pytest.raises(CheckpointError):
        training_scalars(target)
    convert(root / "shards/rank_0/net.safetensors", target, to="ckpt")
    assert sorted(tree(target)) == ["net.ckpt"]


def test_a_merge_under_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_while_moving(root, target, 2, monkeypatch)
    merge(root, target, naming="huggingface")
    merge(root, tmp_path / "expected", naming="huggingface")
    assert tree(target) == tree(tmp_path / "expected")


def test_what_nobody_knows_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden folder is gone, so who moved what cannot be told: the obstacle stays."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_while_moving(root, target, 1, monkeypatch)
    shutil.rmtree(next(target.glob(".ms_ckpt_ext-*")))
    cut(root, target)
    assert (target / remains.OBSTACLE).exists()
    merge(root, target)
    assert not (target / remains.OBSTACLE).exists() and read_merged(target)


def test_an_old_result_that_still_loads_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before anything was taken away, or when all was done: both results are whole, and stay."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for old, patched in ((source(tmp_path / "old", 1), "write_atomically"), (root, "remove")):
        merge(old, target)
        before = tree(target)
        with monkeypatch.context() as patch:
            patch.setattr(staging.Staging, "abandon", lambda *_: None)
            if patched == "remove":
                shutil.rmtree(target)
                patch.setattr(staging.Staging, "remove", lambda *_: None)
                merge(root, target)
            else:
                patch.setattr(staging, patched, lambda *_: (_ for _ in ()).throw(Killed()))
                with pytest.raises(Killed):
                    merge(root, target)
        cut(root, target)
        after = {name: data for name, data in tree(target).items() if not name.startswith("rank_")}
        assert after == before
        shutil.rmtree(target)


def killed_before_the_record(monkeypatch: pytest.MonkeyPatch, job: Callable[[], Any]) -> None:
    """A job that dies when all its files are in place, and its index, but nothing on record."""
    real = staging.write_atomically

    def write(path: Path, *more: Any) -> None:
        if Path(path).name == remains.MANIFEST:
            raise Killed
        real(path, *more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(staging, "write_atomically", write)
        patch.setattr(staging.Staging, "abandon", lambda *_: None)
        job()


def by_rank(root: Path, target: Path, rank: int) -> Any:
    files = {each: root / f"shards/rank_{each}/net.safetensors" for each in range(4)}
    strategy = root / "strategy.ckpt"
    return transform_checkpoint_by_rank(rank, files, target / f"r{rank}.safetensors", strategy, strategy)


def test_a_rank_that_lacks_only_its_record_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_before_the_record(monkeypatch, lambda: by_rank(root, target, 0))
    before = tree(target)
    by_rank(root, target, 1)
    assert sorted(tree(target)) == ["r0.safetensors", "r1.safetensors"]
    assert tree(target)["r0.safetensors"] == before["r0.safetensors"]


def test_a_merge_that_lacks_only_its_record_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, tmp_path / "expected")
    killed_before_the_record(monkeypatch, lambda: merge(root, target))
    cut(root, target)
    assert tree(tmp_path / "expected").items() <= tree(target).items()
    merge(root, target, part_bytes=1 << 30)
    assert sorted(name for name in tree(target) if name.startswith("part")) == ["part0.safetensors"]


def test_a_model_that_lacks_only_its_record_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever merges again, or otherwise, is not told that somebody else made it."""
    root = source(tmp_path / "src")
    for naming, part_bytes in (("huggingface", 9000), ("huggingface", 20_000), ("mindspore", 9000)):
        target, expected = tmp_path / f"{naming}_{part_bytes}", tmp_path / f"expected_{naming}_{part_bytes}"
        killed_before_the_record(monkeypatch, lambda to=target: merge(root, to, naming="huggingface"))
        merge(root, target, naming=naming, part_bytes=part_bytes)
        merge(root, expected, naming=naming, part_bytes=part_bytes)
        assert tree(target) == tree(expected)


def test_what_lacks_only_its_record_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a result on record is: the same in another format."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_before_the_record(monkeypatch, lambda: cut(root, target))
    cut(root, target, to="ckpt")
    assert sorted(tree(target)) == [f"rank_{rank}/net.ckpt" for rank in range(4)]


def test_a_recut_that_was_half_moved_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    moves = []

    def rename(old: Path, new: Path) -> None:
        if new.parent.parent == target and ".ms_ckpt_ext" not in str(new):
            moves.append(new)
            if len(moves) > 2:
                raise Killed
        os.replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(staging.os, "rename", rename)
        patch.setattr(staging.Staging, "abandon", lambda *_: None)
        cut(root, target)
    assert len(tree(target)) == 2
    by_rank(root, target, 1)
    assert sorted(tree(target)) == ["r1.safetensors"]
